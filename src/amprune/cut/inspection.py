"""What a model is made of and what can be removed from it, read from config.json and headers alone."""

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from amprune.model.architecture import Architecture, describe
from amprune.model.backends import ShapeWarning, shape_warnings
from amprune.model.reader import read_checkpoint
from amprune.model.shape import ModelShape
from amprune.model.source import open_source
from amprune.model.writer import sidecars
from amprune.plan.budget import largest_ratio, removable_blocks
from amprune.plan.heads import head_choices
from amprune.records import read_object
from amprune.settings import PlanOptions


@dataclass(frozen=True)
class HeadMode:
    """One way of removing heads, and how far it goes."""

    mode: str
    """groups, within or none (neurons alone)."""
    unit: str
    units_per_layer: int
    removable: tuple[int, ...]
    """Numbers of units that can be removed from every layer."""
    largest_ratio: float


@dataclass(frozen=True)
class Inspection:
    """What `amprune inspect` shows."""

    model: str
    architecture: str
    shape: ModelShape
    parameters_by_part: dict[str, int]
    dtype: str | None
    bytes: int | None
    tied_embeddings: bool
    modes: tuple[HeadMode, ...]
    smallest_step: float
    """Pruning ratio of one neuron in every layer."""
    removable_blocks: int
    """Decoder blocks that can go as a whole, without those that are protected by default."""
    shape_warnings: tuple[ShapeWarning, ...]
    """What backends handle badly of the sizes; empty where all is well."""
    carried: tuple[str, ...]
    """Files beside the weights that an output has, too; empty of a hub id, of which the config alone is fetched."""
    left_out: tuple[str, ...]
    """Files that it lacks, beside weights, card and records."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {**asdict(self), "shape": self.shape.to_dict()}


def inspect(model: str | os.PathLike[str], *, revision: str | None = None) -> Inspection:
    """Describes a model without loading its weights; of a hub id only config.json is fetched.

    Raises:
        UnsupportedModelError: the architecture cannot be pruned; says why.
        CheckpointError: nothing is there, or it is damaged.
    """
    source = open_source(model, revision=revision, config_only=True)
    has_weights = any(source.folder.glob("*.safetensors*")) or any(source.folder.glob("pytorch_model*.bin*"))
    checkpoint = read_checkpoint(source.folder) if has_weights else None
    config = checkpoint.config if checkpoint else read_object(source.folder / "config.json")
    architecture = checkpoint.architecture if checkpoint else describe(config, where=str(model))
    shape = architecture.shape
    carried, left_out = map(tuple, sidecars(source.folder) if checkpoint else ((), ()))
    dtypes = {str(checkpoint.header(name).dtype).removeprefix("torch.") for name in checkpoint} if checkpoint else ()
    return Inspection(
        model=str(model),
        architecture=(config.get("architectures") or [shape.model_type])[0],
        shape=shape,
        parameters_by_part=_parts(architecture),
        dtype=", ".join(sorted(dtypes)) or None,
        bytes=checkpoint.bytes if checkpoint else None,
        tied_embeddings=bool(architecture.tied),
        modes=tuple(_modes(shape)),
        removable_blocks=removable_blocks(shape, PlanOptions()),
        shape_warnings=shape_warnings(shape),
        carried=carried,
        left_out=left_out,
        smallest_step=shape.neuron_parameters * shape.num_layers / shape.parameters,
    )


def _parts(architecture: Architecture) -> dict[str, int]:
    parts = {"embeddings": 0, "attention": 0, "mlp": 0, "norms and others": 0, "language-model head": 0}
    prefixes = [architecture.family.layer_prefix.format(layer=layer) for layer in range(architecture.shape.num_layers)]
    attention = tuple(prefix + part for prefix in prefixes for part in architecture.family.attention)
    mlp = tuple(prefix + part for prefix in prefixes for part in architecture.family.mlp)
    for name, size in architecture.tensors.items():
        if name in architecture.tied or name in architecture.buffers:
            continue
        if name.startswith(attention):
            part = "attention"
        elif name.startswith(mlp):
            part = "mlp"
        elif name.startswith(("lm_head", "embed_out")):
            part = "language-model head"
        else:
            part = "embeddings" if len(size) == 2 else "norms and others"
        parts[part] += math.prod(size)
    return {part: count for part, count in parts.items() if count}


def _modes(shape: ModelShape) -> list[HeadMode]:
    if shape.heads_refused is not None:
        return [_mode("none", "neurons alone", shape, PlanOptions(only="neurons"))]
    if shape.group_size == 1:
        return [_mode("groups", "head", shape, PlanOptions(heads_mode="groups"))]
    modes = []
    if shape.num_key_value_heads > 1:
        unit = f"key-value head with its {shape.group_size} query heads"
        modes.append(_mode("groups", unit, shape, PlanOptions(heads_mode="groups")))
    unit = "query head in every group"
    return [*modes, _mode("within", unit, shape, PlanOptions(heads_mode="within"))]


def _mode(name: str, unit: str, shape: ModelShape, options: PlanOptions) -> HeadMode:
    choices = head_choices(shape, options)
    units = 0 if name == "none" else choices.units
    return HeadMode(name, unit, units, choices.removable, largest_ratio(shape, options))
