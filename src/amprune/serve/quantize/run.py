"""MODEL -> OUT: checked, packed, written, compared, in order. START HERE in this folder."""

import math
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from amprune import __version__
from amprune.cut.refit.record import RECORD as RECONSTRUCTION
from amprune.model.files import weight_files
from amprune.model.quantization import Quantization
from amprune.model.quantized import RECORD, require_library
from amprune.model.reader import Checkpoint, read_checkpoint
from amprune.model.recovered import LOG
from amprune.model.recovered import RECORD as RECOVERY
from amprune.model.source import open_source
from amprune.model.staging import check_output, staged_folder
from amprune.model.writer import RECORDS, parse_size
from amprune.prove.card import write_quantized_card
from amprune.records import write
from amprune.running import Progress, no_progress
from amprune.serve.quantize.check import Findings, check_quantized
from amprune.serve.quantize.schemes import Scheme, find_scheme, settle_group_size, split_layers
from amprune.serve.quantize.write import write_quantized
from amprune.settings import QuantizeSettings, settle

PathLike = str | os.PathLike[str]
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
    type, max_shard_size, overwrite = asked.type, asked.max_shard_size, asked.overwrite
    scheme = find_scheme(type)
    require_library(scheme.library, f"type {type}")
    source, folder = open_source(model, revision=asked.revision, dtype=asked.dtype), Path(out).expanduser()
    check_output(folder, overwrite=overwrite, protected=source.protected)
    parse_size(max_shard_size)
    base = read_checkpoint(source.folder)
    shapes, skipped = split_layers(base)
    group = settle_group_size(asked.group_size, shapes, scheme)
    with staged_folder(folder, overwrite=overwrite, protected=source.protected) as partial:
        parts = write_quantized(
            base, partial, scheme, shapes,
            skipped=skipped, group_size=group, max_shard_size=max_shard_size, progress=progress,
        )  # fmt: skip
        found = check_quantized(base, partial, parts, scheme, device=asked.device, progress=progress)
        quantized = sum(map(math.prod, shapes.values()))
        record = _record(source.name, base, partial, scheme, found, quantized=quantized, group_size=group)
        for name in _CARRIED:
            if (source.folder / RECORDS / name).is_file():
                shutil.copyfile(source.folder / RECORDS / name, partial / RECORDS / name)
        write(partial / RECORDS / RECORD, record.to_dict())
        write_quantized_card(partial, record, source=source)
    return QuantizedModel(folder, record)


def _record(
    source: str, base: Checkpoint, folder: Path, scheme: Scheme, found: Findings, *, quantized: int,
    group_size: int | None,
) -> Quantization:  # fmt: skip
    return Quantization(
        quantized_from=source,
        type=scheme.type,
        numbers=scheme.numbers,
        group_size=group_size,
        library=scheme.library,
        quantized=quantized,
        parameters=base.shape.parameters,
        bytes_before=_bytes(base.folder),
        bytes_after=_bytes(folder),
        **vars(found),
        versions={
            "amprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            scheme.library: version(scheme.library),
        },
    )  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file, _ in weight_files(folder))
