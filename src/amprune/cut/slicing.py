"""A plan and a family give, for every tensor, the indices that stay; and the config of the output."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights

from amprune.errors import PlanError
from amprune.model.architecture import (
    Architecture,
    config_of_blocks,
    config_with_heads,
    describe,
    make_config,
    unit_width,
    unwrapped,
)
from amprune.model.families import Cut, Unit
from amprune.model.files import TensorHeader
from amprune.model.reader import Checkpoint, fingerprint
from amprune.model.shape import ModelShape
from amprune.model.writer import copy_sidecars, write_shards
from amprune.plan.artefact import LayerPlan, PruningPlan, check_plan
from amprune.records import write
from amprune.running import Progress, no_progress


def check_plan_fits(plan: PruningPlan, shape: ModelShape, weights_fingerprint: str, *, where: str) -> None:
    """Refuses a plan that was made for another model: other sizes, or other weights."""
    if differences := plan.shape_before.differences(shape):
        raise PlanError(
            f"the plan is for another model than {where} (plan != model): {', '.join(differences)}; "
            "score this model and plan again"
        )
    if plan.fingerprint is not None and plan.fingerprint != weights_fingerprint:
        raise PlanError(
            f"the plan is for other weights than those of {where}, of the same shape (fingerprint "
            f"{plan.fingerprint[:12]} != {weights_fingerprint[:12]}); score this model and plan again"
        )
    check_plan(plan)


def kept_indices(cut: Cut, layer: LayerPlan, shape: ModelShape) -> torch.Tensor:
    """Returns the indices that stay along the cut's axis, ascending, for a layer of the dense `shape`."""
    units = {
        Unit.QUERY_HEAD: (layer.query_heads, shape.num_attention_heads),
        Unit.KEY_VALUE_HEAD: (layer.key_value_heads, shape.num_key_value_heads),
        Unit.NEURON: (layer.neurons, shape.intermediate_size),
    }
    blocks, offset = [], 0
    for unit in cut.units:
        kept, count = units[unit]
        width = unit_width(cut, unit, shape.head_dim)
        starts = torch.tensor(kept)[:, None] * width + torch.arange(width)
        blocks.append(offset + starts.flatten())
        offset += count * width
    return torch.cat(blocks)


Changes = dict[str, tuple[Cut, torch.Tensor]]
"""Tensors that shrink, with their cut and the indices that stay."""


def cuts_by_tensor(architecture: Architecture, plan: PruningPlan) -> Changes:
    """Maps each tensor that shrinks to its cut and the indices that stay; others, and removed blocks, are absent."""
    changes = {}
    for index, layer in enumerate(plan.layers):
        if layer is None:
            continue
        for cut, name in architecture.layer_tensors(index).items():
            kept = kept_indices(cut, layer, plan.shape_before)
            if len(kept) < architecture.tensors[name][cut.axis]:
                changes[name] = (cut, kept)
    return changes


def kept_tensors(architecture: Architecture, plan: PruningPlan, names: Iterable[str]) -> dict[str, str]:
    """Maps the tensors of the output to those of the dense model: blocks behind a gap move up to close it."""
    prefix = architecture.family.layer_prefix
    places = {prefix.format(layer=old): prefix.format(layer=new) for new, old in enumerate(plan.kept_layers)}
    dense = [prefix.format(layer=layer) for layer in range(len(plan.layers))]
    kept = {}
    for name in names:
        own = next((block for block in dense if name.startswith(block)), None)
        if own is None:
            kept[name] = name
        elif own in places:
            kept[places[own] + name.removeprefix(own)] = name
    return kept


def output_config(raw: Mapping[str, Any], architecture: Architecture, plan: PruningPlan) -> dict[str, Any]:
    """Returns the config.json of the output: the source's, with the new sizes under the family's own names."""
    config, before, after = dict(raw), plan.shape_before, plan.shape_after
    if after.num_attention_heads != before.num_attention_heads:
        config = config_with_heads(raw, architecture.family, after)
    if after.num_layers != before.num_layers:
        config |= config_of_blocks(raw, plan.kept_layers)
    if after.num_layers == before.num_layers or after.intermediate_size != before.intermediate_size:
        config[architecture.family.neurons_key] = after.intermediate_size
    return config


def write_pruned(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    folder: Path,
    *,
    replaced: Mapping[str, torch.Tensor] = MappingProxyType({}),
    max_shard_size: str = "5GB",
    progress: Progress = no_progress,
) -> None:
    """Slices a checkpoint into a folder: config, shards, index and sidecar files, one shard in memory at a time.

    `replaced` take the place of tensors of the dense model, by their names there, in these tensors' dtypes and in the
    shapes of the output.
    """
    changes = cuts_by_tensor(checkpoint.architecture, plan)
    kept = kept_tensors(checkpoint.architecture, plan, checkpoint)
    headers = {new: _sliced_header(checkpoint.header(old), changes.get(old)) for new, old in kept.items()}
    config = output_config(checkpoint.config, checkpoint.architecture, plan)
    _check_against_meta(headers, describe(config, where="the output's config.json"))
    write(folder / "config.json", config)
    copy_sidecars(checkpoint.folder, folder)
    stored = {_stored_name(checkpoint, old, new): new for new, old in kept.items()}
    with progress("Writing", sum(header.bytes for header in headers.values())) as advance:
        write_shards(
            folder,
            {name: headers[new] for name, new in stored.items()},
            lambda name: _written(checkpoint, kept[stored[name]], changes, replaced),
            max_shard_size=max_shard_size,
            advance=advance,
        )


def _stored_name(checkpoint: Checkpoint, old: str, new: str) -> str:
    """Returns the name in the output's files; where the source leaves out the base model's prefix, so does this."""
    stored = checkpoint.stored_name(old)
    return stored if old == new else new[len(old) - len(stored) :]


def _written(checkpoint: Checkpoint, name: str, changes: Changes, replaced: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name in replaced:
        return replaced[name].to(checkpoint.header(name).dtype)
    return sliced_tensor(checkpoint, name, changes=changes)


def sliced_tensor(checkpoint: Checkpoint, name: str, *, changes: Changes) -> torch.Tensor:
    """Reads a tensor of the dense model, without what goes by `changes`."""
    if name not in changes:
        return checkpoint[name]
    cut, kept = changes[name]
    return checkpoint[name].index_select(cut.axis, kept)


def _sliced_header(header: TensorHeader, change: tuple[Cut, torch.Tensor] | None) -> TensorHeader:
    if change is None:
        return header
    cut, kept = change
    shape = list(header.shape)
    shape[cut.axis] = len(kept)
    return TensorHeader(tuple(shape), header.dtype)


def _check_against_meta(headers: Mapping[str, TensorHeader], output: Architecture) -> None:
    """Holds planned shapes to those of the output's architecture, before anything is written."""
    for name, header in headers.items():
        expected = output.tensors.get(name)
        if expected != header.shape:
            raise PlanError(
                f"tensor {name} would be written with shape {header.shape}, but the output's config asks for "
                f"{expected}; the family entry forgets a cut: see docs/adding-a-model-family.md"
            )


def prune_model(model: "transformers.PreTrainedModel", plan: PruningPlan) -> "transformers.PreTrainedModel":
    """Prunes a model in memory and returns a new one; `model` is left as it was.

    Raises:
        PlanError: the plan is for another model, or asks for bias compensation or a refit.
        UnsupportedModelError: the architecture is not supported.
    """
    if plan.compensated or plan.refitted:
        what = "bias compensation" if plan.compensated else "a refit"
        raise PlanError(
            f"the plan asks for {what}, which needs a checkpoint on disk; use apply_plan, or make "
            f"{'compensated' if plan.compensated else 'refitted'} false in the plan"
        )
    model = unwrapped(model)
    raw = model.config.to_dict()
    architecture = describe(raw, where=type(model).__name__)
    state = model.state_dict()
    own = fingerprint(lambda name, rows: state[name][rows], architecture)
    check_plan_fits(plan, architecture.shape, own, where=f"this {type(model).__name__}")
    changes = cuts_by_tensor(architecture, plan)
    config = make_config(output_config(raw, architecture, plan), where="the output's config")
    with init_empty_weights(include_buffers=False):
        pruned: Any = transformers.AutoModelForCausalLM.from_config(config)
    for name, (cut, kept) in changes.items():
        state[name] = state[name].index_select(cut.axis, kept.to(state[name].device))
    renamed = kept_tensors(architecture, plan, state)
    owned = {new: state[old] if old in changes else state[old].clone() for new, old in renamed.items()}
    pruned.load_state_dict(owned, assign=True)
    pruned.tie_weights()
    pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.to(model.device).train(model.training)
    return cast("transformers.PreTrainedModel", pruned)


def masks(plan: PruningPlan, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each output projection's module name and the (features,) mask, one where an input feature stays."""
    family, shape = architecture.family, plan.shape_before
    for index, layer in enumerate(plan.layers):
        if layer is None:
            continue
        prefix = family.layer_prefix.format(layer=index)
        for module, unit, count in (
            (family.attention_output, Unit.QUERY_HEAD, shape.num_attention_heads * shape.head_dim),
            (family.mlp_output, Unit.NEURON, shape.intermediate_size),
        ):
            mask = torch.zeros(count)
            mask[kept_indices(Cut(module, 0, (unit,)), layer, shape)] = 1
            yield prefix + module, mask
