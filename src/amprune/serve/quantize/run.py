"""MODEL -> OUT: checked, packed, written, compared, in order. START HERE in this folder."""

import math
import shutil
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from amprune import __version__
from amprune.cut.refit.record import RECORD as RECONSTRUCTION
from amprune.model.files import TensorHeader, weight_files
from amprune.model.quantization import RECORD, Quantization, require_library
from amprune.model.reader import Checkpoint, read_checkpoint
from amprune.model.recovered import LOG
from amprune.model.recovered import RECORD as RECOVERY
from amprune.model.source import open_source
from amprune.model.writer import RECORDS, check_output, copy_sidecars, parse_size, staged_folder, write_shards
from amprune.prove.card import write_card
from amprune.records import write
from amprune.running import Progress, no_progress
from amprune.serve.quantize.check import Parts, check_quantized
from amprune.serve.quantize.schemes import Layers, find_layers, find_scheme
from amprune.settings import PathLike, QuantizeSettings, settle

_CARRIED = ("plan.json", "scores.safetensors", RECONSTRUCTION, RECOVERY, LOG)
"""Records that tell how the source was made; what was verified and measured of it holds for the source alone."""


@dataclass(frozen=True)
class QuantizedModel:
    """What `quantize` returns."""

    folder: Path
    record: Quantization
    """The content of `amprune/quantization.json`."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {"out": str(self.folder), **self.record.to_dict()}


def quantize(
    model: PathLike,
    out: PathLike,
    settings: QuantizeSettings | None = None,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> QuantizedModel:
    """Quantises the linear layers of a model, without calibration, and proves that stock transformers runs the result.

    Embeddings and the language-model head stay as they are. Packing holds one shard and one weight in memory at a time;
    at the end the quantised model is loaded whole.

    Args:
        model: a Hugging Face folder, a `.gguf` file (dequantised first), an alias or a hub id.
        out: the folder to write; it appears whole or not at all.
        settings: the type, and how OUT is written.
        progress: told how far it is.
        options: of `QuantizeSettings`, such as `type="int4"`.

    Raises:
        QuantizationError: the type or the group size does not fit the model, or the result is not what it should be.
        MissingDependencyError: the library of the type is not installed.
        UnsupportedModelError: the architecture is not supported, or the model is quantised already.
        CheckpointError: the model cannot be read, or OUT not written.
    """
    asked = settle(QuantizeSettings, settings, options)
    scheme = find_scheme(asked.type)
    require_library(scheme.library, f"type {asked.type}")
    source, folder = open_source(model, revision=asked.revision, dtype=asked.dtype), Path(out).expanduser()
    check_output(folder, overwrite=asked.overwrite, protected=source.protected)
    parse_size(asked.max_shard_size)
    base = read_checkpoint(source.folder)
    layers = find_layers(base, scheme, asked.group_size)
    with staged_folder(folder, overwrite=asked.overwrite, protected=source.protected) as partial:
        parts = _write(base, partial, layers, asked.max_shard_size, progress)
        found = check_quantized(base, partial, parts, scheme, device=asked.device, progress=progress)
        libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
        record = Quantization(
            quantized_from=source.name, type=scheme.type, numbers=scheme.numbers, group_size=layers.group_size,
            library=scheme.library, quantized=sum(map(math.prod, layers.shapes.values())),
            parameters=base.shape.parameters, bytes_before=_bytes(base.folder), bytes_after=_bytes(partial), **found,
            versions={"amprune": __version__, **libraries, scheme.library: version(scheme.library)},
        )  # fmt: skip
        for name in _CARRIED:
            if (source.folder / RECORDS / name).is_file():
                shutil.copyfile(source.folder / RECORDS / name, partial / RECORDS / name)
        write(partial / RECORDS / RECORD, record.to_dict())
        write_card(partial, source=source)
    return QuantizedModel(folder, record)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file, _ in weight_files(folder))


def _write(base: Checkpoint, folder: Path, layers: Layers, max_shard_size: str, progress: Progress) -> Parts:
    """Writes weights, config.json and sidecar files, holding one shard and one weight in memory at a time."""
    scheme, shapes, group_size = layers.scheme, layers.shapes, layers.group_size
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
    settings = scheme.config(layers.skipped, base.dtype)
    write(folder / "config.json", {**base.config, "quantization_config": settings})
    metadata = scheme.metadata({names.get(name, name): tensor for name, tensor in empty.items()}, shapes)
    with progress("Quantising", sum(header.bytes for header in headers.values())) as advance:
        write_shards(
            folder, headers, lambda part: tensors(owners[part])[part].contiguous(), max_shard_size=max_shard_size,
            metadata=metadata, advance=advance,
        )  # fmt: skip
    return {name: tuple(parts) for name, parts in packed.items()}


def _name(base: Checkpoint, name: str) -> str:
    """Returns the whole name that a tensor has in the model, but for those that the family stores under another."""
    stored = base.stored_name(name)
    return stored if stored in base.architecture.family.stored_names else name
