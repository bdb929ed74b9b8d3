"""Model families as data: which tensors are cut, along which axis, by which unit.

A family lists only what is cut; every other tensor is copied. Biases that a checkpoint does not have are skipped.
`docs/adding-a-model-family.md` shows how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from amprune.errors import UnsupportedModelError


class Unit(str, Enum):
    """What a slice of a tensor belongs to."""

    QUERY_HEAD = "query_head"
    KEY_VALUE_HEAD = "key_value_head"
    NEURON = "neuron"


QUERY, KEY_VALUE, NEURON = Unit.QUERY_HEAD, Unit.KEY_VALUE_HEAD, Unit.NEURON


@dataclass(frozen=True)
class Cut:
    """One tensor of a decoder layer that shrinks when units are removed.

    `units` names the blocks along `axis` in their order: several for a fused projection, such as
    `(QUERY, KEY_VALUE, KEY_VALUE)` for a fused query-key-value projection.
    """

    tensor: str
    """Name within the layer, such as `self_attn.q_proj.weight`."""
    axis: int
    units: tuple[Unit, ...]
    one_row_per_head: bool = False
    """A head owns one index along the axis (a per-head norm) instead of head_dim of them."""


@dataclass(frozen=True)
class Equivalent:
    """Another stock architecture that computes the same function and accepts head counts that this one refuses."""

    model_type: str
    architecture: str
    absent: tuple[str, ...] = ()
    """Config keys that must be false or missing for the two to be the same."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config entries to write; the value `"1/sqrt(head_dim)"` is replaced by that number."""


def _key_value_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or int(config.num_attention_heads)


def _falcon_key_value_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Where a group of architectures keeps what pruning cuts; the names that are not given are Llama's."""

    model_types: tuple[str, ...]
    cuts: tuple[Cut, ...]
    layer_prefix: str = "model.layers.{layer}."
    """Prefix of a layer's tensors with `{layer}` for its index, as in `model.state_dict()`."""
    attention: tuple[str, ...] = ("self_attn.",)
    """Prefixes, within the layer, of every tensor of the attention module."""
    mlp: tuple[str, ...] = ("mlp.",)
    """Prefixes, within the layer, of every tensor of the MLP."""
    attention_output: str = "self_attn.o_proj"
    """The attention's output projection: its input is the concatenated heads (Eq. 4)."""
    mlp_output: str = "mlp.down_proj"
    """The MLP's last projection: its input is what Eq. 9 averages."""
    norm_after_output: bool = False
    """A norm stands between each output projection and the residual stream."""
    norm_after_output_if: tuple[str, bool] | None = None
    """A config switch that decides it, where it is set, and its value where there is such a norm."""
    neurons_key: str = "intermediate_size"
    """The config entry that holds the number of neurons."""
    heads_refused: str | None = None
    """Why heads of this family cannot be removed, or None when they can."""
    heads_refused_if: Mapping[str, str] = field(default_factory=dict)
    """Config switches that, when true, forbid removing heads, with the reason."""
    blocks_refused_if: Mapping[str, str] = field(default_factory=dict)
    """Config switches that, when true, forbid removing whole blocks, with the reason."""
    equivalents: tuple[Equivalent, ...] = ()
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """Names in checkpoints that may differ from those of `model.state_dict()`, stored to loaded."""
    key_value_heads: Callable[[Any], int] = _key_value_heads
    """Reads the number of key-value heads off a transformers config."""


def _rows(projection: str, *units: Unit) -> tuple[Cut, ...]:
    """Output features of a linear layer: rows of its weight, and its bias."""
    return Cut(f"{projection}.weight", 0, units), Cut(f"{projection}.bias", 0, units)


def _columns(projection: str, unit: Unit) -> tuple[Cut, ...]:
    """Input features of a linear layer: columns of its weight; the bias stays."""
    return (Cut(f"{projection}.weight", 1, (unit,)),)


_SEPARATE_QKV = (
    *_rows("self_attn.q_proj", QUERY),
    *_rows("self_attn.k_proj", KEY_VALUE),
    *_rows("self_attn.v_proj", KEY_VALUE),
)
_ATTENTION = (*_SEPARATE_QKV, *_columns("self_attn.o_proj", QUERY))
_UP_DOWN = (*_rows("mlp.up_proj", NEURON), *_columns("mlp.down_proj", NEURON))
_GATE_UP_DOWN = (*_rows("mlp.gate_proj", NEURON), *_UP_DOWN)
_FUSED_GATE_UP_DOWN = (*_rows("mlp.gate_up_proj", NEURON, NEURON), *_columns("mlp.down_proj", NEURON))

_WIDTH_FROM_HIDDEN_SIZE = (
    "stock transformers derives the head size as hidden_size / heads and ignores head_dim in config.json, "
    "so a checkpoint with fewer heads cannot be loaded"
)


FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily(
        model_types=("llama",),
        cuts=_ATTENTION + _GATE_UP_DOWN,
        # LlamaConfig refuses head counts that do not divide the hidden size; these two compute the same.
        equivalents=(
            Equivalent(
                "mistral", "MistralForCausalLM",
                absent=("attention_bias", "mlp_bias"), settings={"sliding_window": None},
            ),
            Equivalent(
                "granite", "GraniteForCausalLM",
                settings={
                    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
                    "attention_multiplier": "1/sqrt(head_dim)",
                },
            ),
        ),
    ),
    ModelFamily(
        model_types=(
            "mistral", "ministral", "qwen2", "qwen3", "gemma", "granite", "smollm3", "olmo", "cohere2", "seed_oss",
            "ernie4_5", "vaultgemma", "cwm",
        ),
        cuts=_ATTENTION + _GATE_UP_DOWN,
    ),
    ModelFamily(
        model_types=("gemma2", "gemma3_text", "exaone4"), cuts=_ATTENTION + _GATE_UP_DOWN, norm_after_output=True
    ),
    ModelFamily(
        model_types=("hyperclovax",),
        cuts=_ATTENTION + _GATE_UP_DOWN,
        norm_after_output=True,
        norm_after_output_if=("use_post_norm", True),
    ),
    ModelFamily(
        model_types=("cohere",),
        cuts=(
            *_ATTENTION,
            Cut("self_attn.q_norm.weight", 0, (QUERY,), one_row_per_head=True),
            Cut("self_attn.k_norm.weight", 0, (KEY_VALUE,), one_row_per_head=True),
            *_GATE_UP_DOWN,
        ),
    ),
    ModelFamily(model_types=("nemotron", "apertus", "arcee", "jais2"), cuts=_ATTENTION + _UP_DOWN),
    ModelFamily(
        model_types=("phi3",),
        cuts=(
            *_rows("self_attn.qkv_proj", QUERY, KEY_VALUE, KEY_VALUE),
            *_columns("self_attn.o_proj", QUERY),
            *_FUSED_GATE_UP_DOWN,
        ),
    ),
    ModelFamily(model_types=("glm",), cuts=_ATTENTION + _FUSED_GATE_UP_DOWN),
    ModelFamily(model_types=("glm4",), cuts=_ATTENTION + _FUSED_GATE_UP_DOWN, norm_after_output=True),
    ModelFamily(
        model_types=("starcoder2",),
        cuts=_ATTENTION + _rows("mlp.c_fc", NEURON) + _columns("mlp.c_proj", NEURON),
        mlp_output="mlp.c_proj",
    ),
    ModelFamily(
        model_types=("phi",),
        cuts=(
            *_SEPARATE_QKV,
            *_columns("self_attn.dense", QUERY),
            *_rows("mlp.fc1", NEURON),
            *_columns("mlp.fc2", NEURON),
        ),
        attention_output="self_attn.dense",
        mlp_output="mlp.fc2",
        heads_refused_if={"qk_layernorm": "with qk_layernorm its norms are hidden_size / heads wide"},
    ),
    ModelFamily(
        model_types=("olmo2", "olmo3"),
        cuts=_GATE_UP_DOWN,
        norm_after_output=True,
        heads_refused="its query and key norms run over all heads at once, so removing a head changes the heads that "
        "stay",
    ),
    ModelFamily(model_types=("stablelm",), cuts=_GATE_UP_DOWN, heads_refused=_WIDTH_FROM_HIDDEN_SIZE),
    ModelFamily(
        model_types=("opt",),
        cuts=_rows("fc1", NEURON) + _columns("fc2", NEURON),
        layer_prefix="model.decoder.layers.{layer}.",
        mlp=("fc1.", "fc2."),
        attention_output="self_attn.out_proj",
        mlp_output="fc2",
        # A norm after the sum: what the block gives is then no sum of what its projections give.
        norm_after_output_if=("do_layer_norm_before", False),
        neurons_key="ffn_dim",
        heads_refused=_WIDTH_FROM_HIDDEN_SIZE,
    ),
    ModelFamily(
        model_types=("gpt2",),
        # GPT-2's Conv1D stores its weight as (inputs, outputs).
        cuts=(
            Cut("mlp.c_fc.weight", 1, (NEURON,)),
            Cut("mlp.c_fc.bias", 0, (NEURON,)),
            Cut("mlp.c_proj.weight", 0, (NEURON,)),
        ),
        layer_prefix="transformer.h.{layer}.",
        attention=("attn.",),
        attention_output="attn.c_proj",
        mlp_output="mlp.c_proj",
        neurons_key="n_inner",
        heads_refused=_WIDTH_FROM_HIDDEN_SIZE,
        blocks_refused_if={
            "scale_attn_by_inverse_layer_idx": "with scale_attn_by_inverse_layer_idx a block divides its attention by "
            "its own index, so that every block behind a gap would compute something else"
        },
    ),
    ModelFamily(
        model_types=("gptj",),
        cuts=_rows("mlp.fc_in", NEURON) + _columns("mlp.fc_out", NEURON),
        layer_prefix="transformer.h.{layer}.",
        attention=("attn.",),
        attention_output="attn.out_proj",
        mlp_output="mlp.fc_out",
        neurons_key="n_inner",
        heads_refused=_WIDTH_FROM_HIDDEN_SIZE,
    ),
    ModelFamily(
        model_types=("gpt_neox",),
        cuts=_rows("mlp.dense_h_to_4h", NEURON) + _columns("mlp.dense_4h_to_h", NEURON),
        layer_prefix="gpt_neox.layers.{layer}.",
        attention=("attention.",),
        attention_output="attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        heads_refused=_WIDTH_FROM_HIDDEN_SIZE,
        stored_names={"embed_out.weight": "lm_head.weight"},
    ),
    ModelFamily(
        model_types=("falcon",),
        cuts=_rows("mlp.dense_h_to_4h", NEURON) + _columns("mlp.dense_4h_to_h", NEURON),
        layer_prefix="transformer.h.{layer}.",
        attention=("self_attention.",),
        attention_output="self_attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        neurons_key="ffn_hidden_size",
        heads_refused=_WIDTH_FROM_HIDDEN_SIZE,
        key_value_heads=_falcon_key_value_heads,
    ),
)  # fmt: skip

_FIXED_MLP_WIDTH = (
    "stock transformers fixes its MLP width at 4 * hidden_size and its head size at hidden_size / heads, whatever "
    "config.json says, so no smaller checkpoint of this architecture can be loaded"
)
REFUSED: Mapping[str, str] = {"bloom": _FIXED_MLP_WIDTH, "mpt": _FIXED_MLP_WIDTH}
"""Architectures that are known and cannot be pruned to a checkpoint that loads, with the reason."""

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def supported_model_types() -> tuple[str, ...]:
    """Lists every supported `model_type`, sorted."""
    return tuple(sorted(_BY_MODEL_TYPE))


def find_family(model_type: str) -> ModelFamily:
    """Returns the family of a config's `model_type`."""
    if model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    if model_type in REFUSED:
        raise UnsupportedModelError(f"cannot prune model type {model_type!r}: {REFUSED[model_type]}")
    raise UnsupportedModelError(
        f"unknown model type {model_type!r}; supported are: {', '.join(supported_model_types())}. "
        "Adding a family takes a few lines of data: see docs/adding-a-model-family.md"
    )


def has_norm_after_output(family: ModelFamily, config: Mapping[str, Any]) -> bool:
    """Tells whether output projections of this model reach the residual stream through a norm."""
    name, value = family.norm_after_output_if or ("", True)
    return bool(config[name]) is value if name in config else family.norm_after_output


def refusal_of_heads(family: ModelFamily, config: Mapping[str, Any]) -> str | None:
    """Says why heads of this model cannot be removed, or returns None when they can."""
    if family.heads_refused is not None:
        return family.heads_refused
    return next((reason for key, reason in family.heads_refused_if.items() if config.get(key)), None)


def refusal_of_blocks(family: ModelFamily, config: Mapping[str, Any]) -> str | None:
    """Says why whole blocks of this model cannot be removed, or returns None when they can."""
    return next((reason for key, reason in family.blocks_refused_if.items() if config.get(key)), None)
