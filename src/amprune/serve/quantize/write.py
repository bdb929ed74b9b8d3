"""A checkpoint with packed weights, written shard by shard."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from amprune.model.files import TensorHeader
from amprune.model.reader import Checkpoint
from amprune.model.writer import copy_sidecars, write_shards
from amprune.records import write
from amprune.running import Progress, no_progress
from amprune.serve.quantize.schemes import Scheme

Parts = Mapping[str, tuple[str, ...]]
"""The names that each weight's packed tensors have in the file."""


def write_quantized(
    base: Checkpoint,
    folder: Path,
    scheme: Scheme,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    skipped: list[str],
    group_size: int | None,
    max_shard_size: str = "5GB",
    progress: Progress = no_progress,
) -> Parts:
    """Writes weights, config.json and sidecar files, holding one shard and one weight in memory at a time.

    Args:
        base: what is quantised.
        folder: a staged folder.
        scheme: how.
        shapes: the weights that are packed, with their shapes.
        skipped: the modules that are not quantised, for config.json.
        group_size: inputs that share a scale.
        max_shard_size: such as 200MB or 5GB.
        progress: told how far it is.

    Raises:
        CheckpointError: too little space on the disk.
    """
    empty = {name: torch.empty(base.header(name).shape, dtype=base.header(name).dtype, device="meta") for name in base}
    packed = {name: scheme.pack(name, empty[name], group_size) for name in shapes}
    names = {name: _name(base, name) for name in base if name not in shapes}
    owners = {part: name for name, parts in packed.items() for part in parts} | {new: old for old, new in names.items()}
    planned = {names[old]: tensor for old, tensor in empty.items() if old in names}
    planned |= {part: tensor for parts in packed.values() for part, tensor in parts.items()}
    headers = {part: TensorHeader(tuple(tensor.shape), tensor.dtype) for part, tensor in sorted(planned.items())}

    @lru_cache(maxsize=1)
    def tensors(name: str) -> dict[str, torch.Tensor]:
        return scheme.pack(name, base[name], group_size) if name in shapes else {names[name]: base[name]}

    copy_sidecars(base.folder, folder)
    settings = scheme.config(skipped, base.dtype)
    write(folder / "config.json", {**base.config, "quantization_config": settings})
    with progress("Quantising", sum(header.bytes for header in headers.values())) as advance:
        write_shards(
            folder,
            headers,
            lambda part: tensors(owners[part])[part].contiguous(),
            max_shard_size=max_shard_size,
            metadata=scheme.metadata({names.get(name, name): tensor for name, tensor in empty.items()}, shapes),
            advance=advance,
        )
    return {name: tuple(parts) for name, parts in packed.items()}


def _name(base: Checkpoint, name: str) -> str:
    """Returns the whole name that a tensor has in the model, but for those that the family stores under another."""
    stored = base.stored_name(name)
    return stored if stored in base.architecture.family.stored_names else name
