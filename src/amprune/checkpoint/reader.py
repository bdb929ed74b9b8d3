"""A Hugging Face folder as a lazy mapping: headers first, one tensor at a time."""

import hashlib
import json
import logging
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from amprune.architecture import Architecture, describe
from amprune.errors import CheckpointError, UnsupportedModelError
from amprune.shape import ModelShape

logger = logging.getLogger(__name__)

_SAFETENSORS_DTYPES = {
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


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors that the model takes from a folder, by their name in `model.state_dict()`.

    Getting one reads it alone, into memory of its own. Tensors that the architecture does not use are left out.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], architecture: Architecture, stored: Mapping[str, "StoredTensor"]
    ) -> None:
        self.folder = folder
        self.config = config
        self.architecture = architecture
        self._stored = stored

    @property
    def shape(self) -> ModelShape:
        """The sizes that config.json gives."""
        return self.architecture.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self._stored.values():
            if tensor.header.dtype is not None:
                counts[tensor.header.dtype] = counts.get(tensor.header.dtype, 0) + math.prod(tensor.header.shape)
        return max(counts, key=lambda dtype: counts[dtype])

    def header(self, name: str) -> TensorHeader:
        """Returns the shape and dtype of a tensor without reading it."""
        return self._stored[name].header

    @property
    def bytes(self) -> int:
        """Size of the tensors on disk."""
        headers = (tensor.header for tensor in self._stored.values())
        return sum(header.bytes for header in headers)

    def stored_name(self, name: str) -> str:
        """Returns a tensor's name in the file, which may lack the base model's prefix."""
        return self._stored[name].name

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._stored[name]
        with _opened(tensor.file) as file:
            return torch.clone(file.get_tensor(tensor.name), memory_format=torch.contiguous_format)

    def resolve(self, name: str) -> str:
        """Returns the tensor of the checkpoint that a name of the model stands for, itself or the one it is tied to."""
        if name in self._stored:
            return name
        partners = [source for target, source in self.architecture.tied.items() if target == name]
        partners += [target for target, source in self.architecture.tied.items() if source == name]
        return next(partner for partner in partners if partner in self._stored)

    def slabs(self, name: str, size: int) -> Iterator[torch.Tensor]:
        """Reads a tensor a few rows at a time."""
        tensor = self._stored[name]
        rows = tensor.header.shape[0]
        for start in range(0, rows, size):
            with _opened(tensor.file) as file:
                yield file.get_slice(tensor.name)[start : min(start + size, rows)]

    def rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Reads single rows of a tensor."""
        tensor = self._stored[name]
        with _opened(tensor.file) as file:
            part = file.get_slice(tensor.name)
            return torch.cat([part[index : index + 1] for index in indices])

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights; see `fingerprint`."""
        return fingerprint(self.rows, self.architecture)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file and its name there, which may lack the base model's prefix."""

    file: Path
    name: str
    header: TensorHeader


def read_checkpoint(folder: Path) -> Checkpoint:
    """Opens a folder, reading config.json and every shard's header, and matches the two.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or config and weights disagree.
        UnsupportedModelError: the architecture is not supported, or the weights are quantised.
    """
    config = read_json(folder / "config.json", hint=_what_else(folder))
    architecture = describe(config, where=str(folder))
    stored = {}
    for file, names in _weight_files(folder):
        found = _read_headers(file)
        if names is not None and (absent := sorted(set(names) - set(found))):
            raise CheckpointError(
                f"{file} lacks {len(absent)} tensors that the index places in it, such as {absent[0]}"
            )
        for name in names if names is not None else found:
            stored[name] = StoredTensor(file, name, found[name])
    return Checkpoint(folder, config, architecture, _matched(stored, architecture, folder))


def _matched(stored: Mapping[str, StoredTensor], architecture: Architecture, folder: Path) -> dict[str, StoredTensor]:
    """Pairs the model's tensors with the stored ones; those that the model does not take are left out."""
    prefixes, renamed = ("", f"{architecture.base_prefix}."), architecture.family.stored_names
    matched = {}
    for name, tensor in stored.items():
        loaded = renamed.get(name, name)
        full = next((prefix + loaded for prefix in prefixes if prefix + loaded in architecture.tensors), None)
        if full is None:
            logger.info("%s: tensor %s is not part of the architecture and is left out", folder, name)
            continue
        expected = architecture.tensors[full]
        if tensor.header.dtype is None:
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {name} is neither {_names(_SAFETENSORS_DTYPES.values())}; a quantised "
                "checkpoint cannot be pruned: prune the original checkpoint first and quantise the result"
            )
        if tensor.header.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {tensor.header.shape}, but config.json asks for {expected}; "
                "config and weights disagree"
            )
        matched[full] = tensor
    covered = set(matched)
    for target, source in architecture.tied.items():
        if covered & {target, source}:
            covered |= {target, source}
    if missing := sorted(set(architecture.tensors) - covered):
        raise CheckpointError(
            f"{folder}: the weights lack {len(missing)} of the {len(architecture.tensors)} tensors that config.json "
            f"asks for, such as {missing[0]}; an incomplete download, or a checkpoint of another architecture"
        )
    return matched


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " nor ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def read_json(file: Path, *, hint: str = "") -> dict[str, Any]:
    """Reads a JSON object, with an error that names the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing{hint}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def _what_else(folder: Path) -> str:
    """Says what a folder without config.json or weights is instead."""
    if (folder / "adapter_config.json").is_file():
        return "; the folder holds a PEFT adapter: merge it into its base model first"
    if files := sorted(folder.glob("*.gguf")):
        return f"; the folder holds a GGUF file: give {files[0]} itself as MODEL"
    return f"; {folder} is no transformers checkpoint"


def _weight_files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    """Lists the weight files that transformers would load, with the names an index places in each (None: all)."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [(folder / single, None)]
        if (folder / index).is_file():
            return _indexed(folder, folder / index)
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        f"pytorch_model.bin.index.json{_what_else(folder)}"
    )


def _indexed(folder: Path, index: Path) -> list[tuple[Path, list[str] | None]]:
    weight_map = read_json(index).get("weight_map")
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
        self.get_tensor = lambda name: torch.clone(tensors[name])


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        if file.suffix == ".safetensors":
            # By pread: pages of a mapped file would count as memory of this process for as long as they are cached.
            with safe_open(file, framework="pt", backend="pread") as shard:
                yield shard
        else:
            yield _PickledFile(_load_pickle(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); download the checkpoint again") from error


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    if file.suffix == ".safetensors":
        return dict(_safetensors_headers(file))
    known = _SAFETENSORS_DTYPES.values()
    return {
        name: TensorHeader(tuple(tensor.shape), tensor.dtype if tensor.dtype in known else None)
        for name, tensor in _load_pickle(file).items()
    }


def _safetensors_headers(file: Path) -> Iterator[tuple[str, TensorHeader]]:
    with _opened(file) as shard:
        for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = shard.get_slice(name)
            yield name, TensorHeader(tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype()))


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


def fingerprint(rows: Callable[[str, list[int]], torch.Tensor], architecture: Architecture) -> str:
    """Hashes the prunable tensors by their shapes and a sample of rows, rounded to bfloat16.

    `rows(name, indices)` reads rows of a tensor. Two checkpoints of the same weights agree whatever their sharding,
    one in float32 and one in bfloat16 too; a fine-tuned copy differs.
    """
    digest = hashlib.sha256()
    for name in architecture.cut_tensors():
        shape = architecture.tensors[name]
        sample = rows(name, sorted({0, shape[0] // 3, 2 * shape[0] // 3, shape[0] - 1}))
        values = sample.detach().to("cpu", torch.float32).to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name}{shape}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
