"""A Hugging Face folder as a lazy mapping: headers first, one tensor at a time."""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

from amprune.errors import CheckpointError, UnsupportedModelError
from amprune.model.architecture import Architecture, describe, make_config
from amprune.model.files import (
    SAFETENSORS_DTYPES,
    StoredTensor,
    TensorHeader,
    opened,
    stored_tensors,
    what_else,
)
from amprune.model.quantization import refuse_quantized
from amprune.model.shape import ModelShape
from amprune.model.source import Source, open_source
from amprune.records import read_object
from amprune.settings import PathLike

logger = logging.getLogger(__name__)
_WRAPPER = re.compile(r"(_orig_mod\.|module\.)+")
_HEADS = ("score", "classifier", "classification_head", "qa_outputs", "v_head", "regression_head", "reward_head")


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors that the model takes from a folder, by their name in `model.state_dict()`.

    Getting one reads it alone, into memory of its own. Tensors that the architecture does not use are left out.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        architecture: Architecture,
        stored: Mapping[str, "StoredTensor"],
        computed: Mapping[str, Callable[[], torch.Tensor]] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self.config = config
        self.architecture = architecture
        self._stored = stored
        self._computed = computed
        """What is computed on reading instead of being read as it is stored."""
        self._seen = self._states()

    @property
    def shape(self) -> ModelShape:
        """The sizes that config.json gives."""
        return self.architecture.shape

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model was made for, where the config says."""
        config = make_config(self.config, where=str(self.folder))
        return getattr(config, "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self._stored.values():
            if tensor.header.dtype is not None:
                counts[tensor.header.dtype] = counts.get(tensor.header.dtype, 0) + math.prod(tensor.header.shape)
        return max(counts, key=lambda dtype: counts[dtype])

    def computed_in(self, dtype: str) -> torch.dtype:
        """Returns the dtype of a name; auto is that of most parameters."""
        found: torch.dtype = self.dtype if dtype == "auto" else getattr(torch, dtype)
        return found

    def check_unchanged(self) -> None:
        """Refuses files that were written to or replaced since they were opened: what was read is of no one model."""
        if changed := sorted(file for file, state in self._states().items() if self._seen[file] != state):
            raise CheckpointError(f"{changed[0]} has changed while it was read; nothing was kept, run again")

    def _states(self) -> dict[Path, tuple[int, ...]]:
        files = {self.folder / "config.json", *(tensor.file for tensor in self._stored.values())}
        states = {file: file.stat() if file.exists() else None for file in files}
        return {file: (one.st_size, one.st_mtime_ns, one.st_ino) if one else () for file, one in states.items()}

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

    def replaced(self, computed: Mapping[str, Callable[[], torch.Tensor]]) -> "Checkpoint":
        """Returns the checkpoint with other values of some tensors, computed each time that one is read."""
        return Checkpoint(self.folder, self.config, self.architecture, self._stored, computed)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._computed:
            return self._computed[name]()
        tensor = self._stored[name]
        with opened(tensor.file) as file:
            return cast(torch.Tensor, file.get_tensor(tensor.name))

    def resolve(self, name: str) -> str:
        """Returns the tensor of the checkpoint that a name of the model stands for, itself or the one it is tied to."""
        if name in self._stored or name in self._computed:
            return name
        partners = [source for target, source in self.architecture.tied.items() if target == name]
        partners += [target for target, source in self.architecture.tied.items() if source == name]
        return next(partner for partner in partners if partner in self._stored)

    def slabs(self, name: str, size: int) -> Iterator[torch.Tensor]:
        """Reads a tensor a few rows at a time."""
        tensor = self._stored[name]
        rows = tensor.header.shape[0]
        for start in range(0, rows, size):
            with opened(tensor.file, backend="mmap") as file:
                yield file.get_slice(tensor.name)[start : min(start + size, rows)]

    def rows(self, name: str, indices: list[int]) -> torch.Tensor:
        """Reads single rows of a tensor."""
        tensor = self._stored[name]
        with opened(tensor.file, backend="mmap") as file:
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


def open_model(model: PathLike, *, revision: str | None = None, dtype: str = "auto") -> tuple[Source, Checkpoint]:
    """Finds MODEL, see `open_source`, and opens its folder, see `read_checkpoint`."""
    source = open_source(model, revision=revision, dtype=dtype)
    return source, read_checkpoint(source.folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Opens a folder, reading config.json and every shard's header, and matches the two."""
    config = read_object(folder / "config.json", hint=what_else(folder))
    refuse_quantized(folder, config)
    architecture = describe(config, where=str(folder))
    stored = stored_tensors(folder)
    found = Checkpoint(folder, config, architecture, _matched(stored, config, architecture, folder))
    return _untied(found, stored) if architecture.tied else found


def _untied(found: Checkpoint, stored: Mapping[str, StoredTensor]) -> Checkpoint:
    """Returns the checkpoint as transformers loads it: weights that config.json ties and the files do not are apart."""
    pairs = [(one, other) for one, other in found.architecture.tied.items() if one in found and other in found]
    if not pairs or all(identical(found[one], found[other]) for one, other in pairs):
        return found
    logger.info(
        "%s: config.json ties %s and %s, but the files hold two different ones; they are kept apart, as transformers "
        "does", found.folder, *pairs[0]
    )  # fmt: skip
    config = {**found.config, "tie_word_embeddings": False}
    architecture = describe(config, where=str(found.folder))
    return Checkpoint(found.folder, config, architecture, _matched(stored, config, architecture, found.folder))


def _matched(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any], architecture: Architecture, folder: Path
) -> dict[str, StoredTensor]:
    """Pairs the model's tensors with the stored ones; those that the model does not take are left out."""
    prefixes, renamed = ("", f"{architecture.base_prefix}."), architecture.family.stored_names
    matched, left = {}, []
    for name, tensor in stored.items():
        loaded = name if name in architecture.tensors else renamed.get(name, name)
        full = next((prefix + loaded for prefix in prefixes if prefix + loaded in architecture.tensors), None)
        if full is None:
            _check_left_out(tensor, architecture)
            _check_class(tensor, config)
            left.append(name)
            continue
        expected = architecture.tensors[full]
        if tensor.header.dtype is None:
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {name} is neither {_names(SAFETENSORS_DTYPES.values())}; a quantised "
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
    if left and not matched and (wrapper := _WRAPPER.match(left[0])):
        raise CheckpointError(
            f"{folder}: the names of its tensors begin with {wrapper[0]!r}, which a wrapper of the model left there "
            "(torch.compile, DistributedDataParallel); load them, take that away and save the model again"
        )
    if left:
        logger.info("%s: not part of the architecture and left out: %s", folder, _listed(left))
    _check_packed(left, folder)
    if missing := sorted(set(architecture.tensors) - covered):
        raise CheckpointError(
            f"{folder}: the weights lack {len(missing)} of the {len(architecture.tensors)} tensors that config.json "
            f"asks for, such as {missing[0]}; an incomplete download, or a checkpoint of another architecture"
        )
    return matched


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more tensors" if names[most:] else "")


def _check_packed(left: Sequence[str], folder: Path) -> None:
    """Tells of weights that are quantised although config.json does not say so."""
    if packed := next((name for name in left if name.endswith((".qweight", ".qzeros", ".weight_packed"))), None):
        raise UnsupportedModelError(
            f"{folder}: holds {packed}: the weights are quantised (as GPTQ, AWQ or compressed-tensors store them), and "
            "pruning needs those of full precision. Prune the original checkpoint first and quantise the result"
        )


def _check_class(tensor: StoredTensor, config: Mapping[str, Any]) -> None:
    """Refuses to drop the head of a model that is no language model: a reward, a class, a value."""
    named = config.get("architectures")
    classes = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if tensor.name.split(".")[0] in _HEADS and classes and not any("CausalLM" in name for name in classes):
        raise UnsupportedModelError(
            f"{tensor.file}: the model is a {classes[0]}, whose {tensor.name} would be lost; amprune prunes causal "
            "language models: save it as one (AutoModelForCausalLM), or prune the model that it was made from"
        )


def _check_left_out(tensor: StoredTensor, architecture: Architecture) -> None:
    """Refuses to drop a layer that config.json does not count."""
    before, after = architecture.family.layer_prefix.split("{layer}")
    short = before.removeprefix(f"{architecture.base_prefix}.")
    found = re.fullmatch(rf"(?:{re.escape(before)}|{re.escape(short)})(\d+){re.escape(after)}(.+)", tensor.name)
    if found and any(cut.tensor == found.group(2) for cut in architecture.family.cuts):
        layers = architecture.shape.num_layers
        if int(found.group(1)) >= layers:
            raise CheckpointError(
                f"{tensor.file}: holds tensor {tensor.name}, but config.json counts {layers} layers; config and "
                "weights disagree"
            )


def identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compares two tensors bit by bit, since as numbers what is none equals nothing, not even itself."""
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def digest(tensor: torch.Tensor) -> str:
    """Hashes the bytes of a tensor."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Hashes every tensor, one at a time, so that the largest alone is in memory."""
    return {name: digest(checkpoint[name]) for name in checkpoint}


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " nor ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


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
