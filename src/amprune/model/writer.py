"""Shards, index and sidecar files of an output."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from amprune.errors import CheckpointError
from amprune.model.files import TensorHeader
from amprune.records import umask, write
from amprune.running import release_memory

RECORDS = "amprune"
"""Subfolder of an output that holds how it was made: plan, scores, verification."""
_REPLACED = ("config.json", "README.md", "params.json")
"""Files that speak of the dense model; engines read params.json, Mistral's own config, in place of config.json."""
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz",
}  # fmt: skip
_WEIGHT_INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: str | int) -> int:
    """Returns the bytes of a size such as 200MB or 5GB; a number is one of bytes."""
    text = f"{size}B" if isinstance(size, int) else str(size)
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]?B)\s*", text, flags=re.IGNORECASE)
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if found < 1:
        raise CheckpointError(f"max_shard_size is {size!r}, expected a size above 0 such as 200MB or 5GB")
    return found


def write_shards(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    get: Callable[[str], torch.Tensor],
    *,
    max_shard_size: str | int = "5GB",
    metadata: Mapping[str, str] = MappingProxyType({}),
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Writes tensors as safetensors shards plus index, holding one shard in memory at a time; returns the file names.

    `headers` gives the final shapes, from which the shards are planned before the first byte is read; `get` reads and
    slices one tensor; every file gets the `metadata`; `advance` is told the bytes written.
    """
    sizes = {name: header.bytes for name, header in headers.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size),
    )
    total = sum(sizes.values())
    if (free := shutil.disk_usage(folder).free) < total:
        raise CheckpointError(
            f"{folder} needs {total / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on that disk"
        )
    for file, names in split.filename_to_tensors.items():
        save_file({name: get(name) for name in names}, folder / file, metadata={"format": "pt", **metadata})
        (folder / file).chmod(0o666 & ~umask())
        release_memory()
        advance(sum(sizes[name] for name in names))
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write(folder / "model.safetensors.index.json", index)
    return list(split.filename_to_tensors)


def copy_sidecars(source: Path, target: Path) -> list[str]:
    """Copies every file that is neither weights, model card, record nor a description of the dense sizes.

    Returns their relative names.
    """
    copied = []
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        if not file.is_file() or any(part.startswith(".") for part in relative.parts) or relative.parts[0] == RECORDS:
            continue
        if file.suffix in WEIGHT_SUFFIXES or _WEIGHT_INDEX.search(file.name):
            continue
        if str(relative) in _REPLACED or relative.parts[0] == "original":
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / relative)
        copied.append(str(relative))
    return copied
