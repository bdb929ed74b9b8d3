"""From a config.json to the architecture it describes, without reading a weight."""

import copy
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from amprune.errors import UnsupportedModelError
from amprune.model.families import Cut, ModelFamily, Unit, find_family, refusal_of_blocks, refusal_of_heads
from amprune.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel as PreTrainedModel
else:  # the module that it is in loads torchao, SciPy and torch._dynamo: what opens no model does without them
    PreTrainedModel = torch.nn.Module

logger = logging.getLogger(__name__)

_UNEVEN_BLOCKS = "its blocks hold different numbers of parameters, so that a ratio says nothing of how many go"
_MOST_LAYERS = 4096
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")


@contextmanager
def quiet_transformers(*, bars_on_terminal: bool = False) -> Iterator[None]:
    """Silences transformers' advice, which speaks of the library and not of the user's model, and its progress bars.

    With `bars_on_terminal`, for work that may take long, its bars stay where stderr is a terminal.
    """
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    offload = logging.getLogger("accelerate.big_modeling")
    offload_level = offload.level
    offload.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    if not (bars_on_terminal and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        offload.setLevel(offload_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_supported(config: Mapping[str, Any], *, where: str) -> ModelFamily:
    """Returns the family of a raw config, refusing what cannot be pruned: experts, quantised weights, unknown types."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError(f"{where}: config.json has no model_type; is this a transformers checkpoint?")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModelError(
            f"{where}: the checkpoint is quantised ({method}); pruning needs the full-precision weights. "
            "Prune the original checkpoint first and quantise the result"
        )
    experts = next((key for key in _EXPERT_KEYS if config.get(key)), None)
    if experts is not None or model_type.endswith("_moe") or model_type == "mixtral":
        raise UnsupportedModelError(
            f"{where}: model type {model_type!r} is a mixture of experts"
            + (f" ({experts} = {config[experts]})" if experts else "")
            + "; only dense models can be pruned"
        )
    if isinstance(part := config.get("text_config"), Mapping):
        raise UnsupportedModelError(
            f"{where}: model type {model_type!r} holds a language model of the type {part.get('model_type')!r} beside "
            "other parts; only a language model by itself can be pruned"
        )
    try:
        return find_family(model_type)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{where}: {error}") from None


def make_config(config: Mapping[str, Any], *, where: str) -> PreTrainedConfig:
    """Builds the transformers config of a raw config.json."""
    check_claims(config, where=where)
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # transformers raises many types here
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"{where}: transformers refuses this config.json: {reason}") from error


def check_claims(config: Mapping[str, Any], *, where: str) -> None:
    """Refuses more layers than any model has, each of which would be built before one is missed."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(value := part.get(name), int) and value > _MOST_LAYERS:
                raise UnsupportedModelError(f"{where}: {name} is {value:,}, expected at most {_MOST_LAYERS:,}")


def meta_model(config: PreTrainedConfig, *, where: str) -> PreTrainedModel:
    """Builds the model on the meta device: names and shapes, no memory."""
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each architecture fails in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(f"{where}: transformers cannot build this config.json: {reason}") from error
    return model


def unwrapped(model: Any) -> PreTrainedModel:
    """Returns the causal language model that compiling or parallelising has wrapped; refuses what is none."""
    while (inner := getattr(model, "_orig_mod", None) or _parallelised(model)) is not None:
        model = inner
    name = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(f"the {name} has PEFT adapters; merge them first: `model.merge_and_unload()`")
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"the model is a {name}, expected a causal language model of transformers")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UnsupportedModelError(f"the {name} is no causal language model; load it by AutoModelForCausalLM")
    return model


def _parallelised(model: Any) -> Any:
    kinds = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, kinds) else None


def unit_width(cut: Cut, unit: Unit, head_dim: int) -> int:
    """Returns how many consecutive indices along the cut's axis one unit owns."""
    return 1 if unit is Unit.NEURON or cut.one_row_per_head else head_dim


def unit_counts(shape: ModelShape) -> dict[Unit, int]:
    """Returns how many units of each kind a layer has."""
    return {
        Unit.QUERY_HEAD: shape.num_attention_heads,
        Unit.KEY_VALUE_HEAD: shape.num_key_value_heads,
        Unit.NEURON: shape.intermediate_size,
    }


@dataclass(frozen=True)
class Architecture:
    """What a config.json describes: sizes, and the name and shape of every tensor of `model.state_dict()`."""

    family: ModelFamily
    shape: ModelShape
    tensors: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    """Tensors that are another's data (target to source), such as a tied language-model head."""
    buffers: frozenset[str]
    """Those of `tensors` that are no parameters."""
    base_prefix: str

    def layer_tensors(self, layer: int) -> dict[Cut, str]:
        """Maps each cut that this model has to its tensor's name in the given layer."""
        prefix = self.family.layer_prefix.format(layer=layer)
        return {cut: prefix + cut.tensor for cut in self.family.cuts if prefix + cut.tensor in self.tensors}

    def block(self, layer: int) -> str:
        """Names the module of the given decoder block."""
        return self.family.layer_prefix.format(layer=layer).removesuffix(".")

    def cut_tensors(self) -> Iterator[str]:
        """Names every tensor that pruning may cut, layer by layer."""
        for layer in range(self.shape.num_layers):
            yield from self.layer_tensors(layer).values()


@dataclass(frozen=True)
class _Entries:
    """A raw config.json, equal to any other of the same entries."""

    text: str
    where: str = field(compare=False)
    """Where it was read, for messages alone."""


def describe(raw: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """Measures a raw config.json on a meta model, once for the same entries; reads no weights."""
    return _described(_Entries(json.dumps(raw, sort_keys=True), where))


# Every stage of pruning reads the same few config.json anew, and a meta model of a large one takes seconds.
@lru_cache(maxsize=32)
def _described(entries: _Entries) -> Architecture:
    raw, where = json.loads(entries.text), entries.where
    family = check_supported(raw, where=where)
    config = make_config(raw, where=where)
    _check_sizes(config, where)
    model = meta_model(config, where=where)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    prefixes = [family.layer_prefix.format(layer=layer) for layer in range(config.num_hidden_layers)]
    layers = [
        {cut: parameters[prefix + cut.tensor] for cut in family.cuts if prefix + cut.tensor in parameters}
        for prefix in prefixes
    ]
    uneven = next((layer for layer, sizes in enumerate(layers) if sizes != layers[0]), None)
    if uneven is not None:
        raise UnsupportedModelError(f"{where}: layer {uneven} has other shapes than layer 0; widths must be uniform")
    shape = _shape_without_costs(config, family, layers[0], where)
    costs = _unit_costs(layers[0], shape, where=where)
    refused = refusal_of_heads(family, raw)
    # All parameters of each decoder block, norms included.
    blocks = [
        sum(math.prod(size) for name, size in parameters.items() if name.startswith(prefix)) for prefix in prefixes
    ]
    uniform = len(set(blocks)) == 1
    shape = replace(
        shape,
        parameters=sum(map(math.prod, parameters.values())),
        query_head_parameters=costs[Unit.QUERY_HEAD],
        key_value_head_parameters=costs[Unit.KEY_VALUE_HEAD],
        neuron_parameters=costs[Unit.NEURON],
        heads_refused=refused,
        query_head_counts=() if refused else _accepted_head_counts(raw, family, shape),
        layer_parameters=blocks[0] if uniform else 0,
        blocks_refused=refusal_of_blocks(family, raw) or (None if uniform else _UNEVEN_BLOCKS),
    )
    return Architecture(
        family=family,
        shape=shape,
        tensors={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=dict(model.all_tied_weights_keys),
        buffers=frozenset(name for name, _ in model.named_buffers()),
        base_prefix=model.base_model_prefix,
    )


def _check_sizes(config: PreTrainedConfig, where: str) -> None:
    heads, key_value_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 1
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise UnsupportedModelError(f"{where}: {name} is {value!r}, expected a whole number of at least 1")
    if heads % key_value_heads:
        raise UnsupportedModelError(
            f"{where}: {heads} query heads cannot be shared out evenly among {key_value_heads} key-value heads"
        )


def _shape_without_costs(
    config: PreTrainedConfig, family: ModelFamily, layer: Mapping[Cut, tuple[int, ...]], where: str
) -> ModelShape:
    """Reads the sizes; the MLP's width off its first cut tensor, since configs may leave it to a default."""
    first = next(cut for cut in family.cuts if cut.units[0] is Unit.NEURON)
    if first not in layer:
        name = family.layer_prefix.format(layer=0) + first.tensor
        raise UnsupportedModelError(f"{where}: the architecture has no tensor {name}; its family entry is wrong")
    heads = config.num_attention_heads
    return ModelShape(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=family.key_value_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=layer[first][first.axis] // len(first.units),
        parameters=0,
        query_head_parameters=0,
        key_value_head_parameters=0,
        neuron_parameters=0,
        query_head_counts=(),
    )


def _unit_costs(layer: Mapping[Cut, tuple[int, ...]], shape: ModelShape, *, where: str) -> dict[Unit, int]:
    """Counts the parameters, within one layer, that one unit of each kind owns."""
    costs, counts = dict.fromkeys(Unit, 0), unit_counts(shape)
    for cut, size in layer.items():
        widths = [unit_width(cut, unit, shape.head_dim) for unit in cut.units]
        expected = sum(counts[unit] * width for unit, width in zip(cut.units, widths, strict=True))
        if cut.axis >= len(size) or size[cut.axis] != expected:
            blocks = " + ".join(
                f"{counts[u]} x {width} ({u.value})" for u, width in zip(cut.units, widths, strict=True)
            )
            raise UnsupportedModelError(
                f"{where}: {cut.tensor} has shape {size}, but axis {cut.axis} should be {expected} = {blocks} by "
                "config.json; config and weights disagree, or the architecture is not the one that its model_type names"
            )
        for unit, width in zip(cut.units, widths, strict=True):
            costs[unit] += width * math.prod(size) // size[cut.axis]
    return costs


def config_with_heads(raw: Mapping[str, Any], family: ModelFamily, shape: ModelShape) -> dict[str, Any]:
    """Returns the config entries with the head counts of `shape`, under an architecture that accepts them.

    Stock transformers refuses some head counts for some types (LlamaConfig: those that do not divide the hidden size).
    The family's equivalents, which compute the same function, are tried then.
    """
    heads = {name: getattr(shape, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    own = {**raw, **heads}
    if _accepted(own):
        return own
    # Through JSON, which turns the integer keys of id2label into text as config.json has them.
    resolved = json.loads(json.dumps(make_config(raw, where="config.json").to_dict()))
    resolved.pop("transformers_version", None)  # else what is written depends on the installed release
    for other in family.equivalents:
        if any(resolved.get(key) for key in other.absent):
            continue
        settings = {
            key: shape.head_dim**-0.5 if value == "1/sqrt(head_dim)" else value for key, value in other.settings.items()
        }
        names = {"model_type": other.model_type, "architectures": [other.architecture]}
        entries = {**resolved, **raw, **heads, **settings, **names}
        if _accepted(entries):
            return entries
    raise UnsupportedModelError(
        f"transformers accepts no {raw['model_type']} config with {shape.num_attention_heads} heads on hidden size "
        f"{shape.hidden_size}; make the plan again, which picks an accepted number"
    )


def config_of_blocks(raw: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Returns the config entries that change where the blocks `kept`, ascending, alone stay.

    What an architecture derives from a block's index (sliding windows, layers without positions) is written out for
    each kept block, as `layer_types` or `no_rope_layers`; the pattern that it came from stays and is not read then.
    """
    config = make_config(raw, where="config.json")
    layers = config.num_hidden_layers
    own = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    entries: dict[str, Any] = {name: len(kept) for name in (own, "num_hidden_layers") if name == own or name in raw}
    for name, values in config.to_dict().items():
        if "layer" in name and isinstance(values, list) and len(values) == layers:
            entries[name] = [values[layer] for layer in kept]
    if type(full := raw.get("max_window_layers")) is int:  # Qwen: how many blocks in front have no sliding window
        entries["max_window_layers"] = sum(layer < full for layer in kept)
    return entries


def _accepted(entries: Mapping[str, Any]) -> bool:
    try:
        make_config(entries, where="config.json")
    except UnsupportedModelError:
        return False
    return True


def _accepted_head_counts(raw: Mapping[str, Any], family: ModelFamily, shape: ModelShape) -> tuple[int, ...]:
    """Lists the numbers of query heads for which a loadable config exists."""
    counts = []
    for heads in range(1, shape.num_attention_heads + 1):
        grouped = math.gcd(heads, shape.num_key_value_heads)
        with suppress(UnsupportedModelError):
            config_with_heads(raw, family, replace(shape, num_attention_heads=heads, num_key_value_heads=grouped))
            counts.append(heads)
    return tuple(counts)
