"""The files of a Hugging Face folder: which hold weights, what their headers say, how to open one."""

import json
import math
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from amprune.errors import CheckpointError
from amprune.records import MOST, parse_yaml, read_object

WEIGHT_INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorHeader:
    """What a weight file says of a tensor before its data is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for a type that no model computes in: masks of old checkpoints, quantised weights."""

    @property
    def bytes(self) -> int:
        """Size on disk; 0 for a tensor of another type."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file and its name there, which may lack the base model's prefix."""

    file: Path
    name: str
    header: TensorHeader


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Reads the header of every weight file that transformers would load.

    As there, an index says which files are read; what they hold counts, whatever it says of single tensors.
    """
    stored: dict[str, StoredTensor] = {}
    for file, placed in weight_files(folder):
        for name, header in _read_headers(file).items():
            if name not in stored or name in (placed or ()):
                stored[name] = StoredTensor(file, name, header)
    return stored


def stored_bytes(folder: Path) -> int:
    """Returns the size of all tensors of a folder."""
    return sum(tensor.header.bytes for tensor in stored_tensors(folder).values())


def read_front_matter(card: Path) -> dict[str, Any]:
    """Reads the YAML front matter of a model card; empty where there is none that can be read."""
    text = card.read_bytes().decode(errors="replace") if card.is_file() and card.stat().st_size <= MOST else ""
    match = re.match(r"---\n(.*?)\n---\s*\n", text, flags=re.DOTALL)
    try:
        content = parse_yaml(match.group(1)) if match else None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def what_else(folder: Path) -> str:
    """Says what a folder without config.json or weights is instead."""
    if not folder.is_dir():
        return "; there is no such folder"
    if files := sorted(folder.glob("*.gguf")):
        return f"; the folder holds a GGUF file: give {files[0]} itself as MODEL"
    if lost := [path for path in sorted(folder.iterdir()) if path.is_symlink() and not path.exists()]:
        return f"; {lost[0]} is a link to nowhere: copy the files that the links lead to as well (`cp -rL`)"
    return f"; {folder} is no transformers checkpoint"


def check_no_adapter(folder: Path) -> None:
    """Refuses a PEFT adapter, beside weights too: with PEFT at hand, transformers loads its base instead of them."""
    if not (file := folder / "adapter_config.json").is_file():
        return
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a model and {file.name}, for which transformers loads the adapter's base model instead "
            "of these weights; move the adapter's files out of the folder if it is merged, else merge it first"
        )
    raise CheckpointError(
        f"{folder} holds a PEFT adapter alone; merge it into its base model first: "
        "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
    )


def module_folders(folder: Path) -> set[str]:
    """Returns the folders of an embedding model's further modules."""
    file = folder / "modules.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return {Path(str(entry["path"])).parts[0] for entry in content if entry["path"]}
    except (OSError, ValueError, RecursionError, TypeError, KeyError, IndexError):
        return set()


def check_no_pointer(file: Path) -> None:
    """Refuses what git leaves in the place of a large file that was not fetched."""
    with file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder"
            )


def check_ends(folder: Path) -> None:
    """Refuses a folder with devices or pipes, which loaders would read for ever."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a device or a pipe, expected a file; a checkpoint has none")


def weight_files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    """Lists the weight files that transformers would load, with the names an index places in each (None: all)."""
    check_ends(folder)
    for single, index in (
        ("model.safetensors", WEIGHT_INDEX),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [(folder / single, None)]
        if (folder / index).is_file():
            return _indexed(folder, folder / index)
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, {WEIGHT_INDEX}, pytorch_model.bin or "
        f"pytorch_model.bin.index.json{what_else(folder)}"
    )


def _indexed(folder: Path, index: Path) -> list[tuple[Path, list[str] | None]]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        by_file.setdefault(file, []).append(name)
    for file in by_file:
        if Path(file).name != file:
            raise CheckpointError(f"{index} names the file {file!r}, which is no file of this folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{index} names the file {file}, which is missing; download the checkpoint again")
    return [(folder / file, names) for file, names in sorted(by_file.items())]


class _PickledFile:
    """A `.bin` file with the two ways of reading that safetensors has."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.get_slice = tensors.__getitem__
        self.get_tensor = lambda name: torch.clone(tensors[name], memory_format=torch.contiguous_format)


@contextmanager
def opened(file: Path, *, backend: str = "pread") -> Iterator[Any]:
    """Opens a weight file for whole tensors; the backend mmap serves slices, for which pread reads the whole tensor."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", backend=backend) as shard:
                yield shard
        else:
            yield _PickledFile(_load_pickle(file))
    except (OSError, SafetensorError) as error:
        check_no_pointer(file)
        raise CheckpointError(f"{file} is truncated or damaged ({error}); download the checkpoint again") from error


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    if file.suffix == ".safetensors":
        return dict(_safetensors_headers(file))
    known = SAFETENSORS_DTYPES.values()
    return {
        name: TensorHeader(tuple(tensor.shape), tensor.dtype if tensor.dtype in known else None)
        for name, tensor in _load_pickle(file).items()
    }


def _safetensors_headers(file: Path) -> Iterator[tuple[str, TensorHeader]]:
    with opened(file) as shard:
        for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = shard.get_slice(name)
            yield name, TensorHeader(tuple(part.get_shape()), SAFETENSORS_DTYPES.get(part.get_dtype()))


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    return _unpickled(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _unpickled(file: Path, _changed: int) -> dict[str, torch.Tensor]:
    """Loads a `.bin` file with `weights_only`, memory-mapped where its format allows."""
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files written before torch 1.6 cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises many types
        check_no_pointer(file)
        raise CheckpointError(
            f"{file} cannot be loaded as plain weights ({_pickle_problem(error)}); it is damaged, or a pickle that "
            "holds more than tensors, which is refused because loading it could run code. Download it again, or use "
            "the model's safetensors files"
        ) from error
    tensors = isinstance(content, dict) and all(isinstance(value, torch.Tensor) for value in content.values())
    if not tensors or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} does not hold a mapping from names to tensors")
    return cast(dict[str, torch.Tensor], content)


def _pickle_problem(error: Exception) -> str:
    """Returns the gist of what torch says; its advice to load the pickle with code and all is not passed on."""
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it refers to {refused[1]}"
    if isinstance(error, pickle.UnpicklingError) or not str(error).strip():
        return "no valid pickle"
    return str(error).strip().splitlines()[0]
