"""A model -> one GGUF file that llama.cpp runs. START HERE in this folder."""

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from amprune.errors import CheckpointError, ExportError, MissingDependencyError, UnsupportedModelError, required
from amprune.model.gguf_file import GgufFile, read_gguf, set_width
from amprune.model.llama_cpp import find_converter, find_quantiser
from amprune.model.reader import Checkpoint, read_checkpoint
from amprune.model.source import Source, open_source
from amprune.model.writer import check_file, staged_file
from amprune.records import read_object, resolved
from amprune.running import Progress, no_progress
from amprune.serve.gguf.check import TokenCheck, check_sizes, check_tokens
from amprune.serve.gguf.convert import KINDS, as_twin, convert, find_twin, quantise
from amprune.settings import ExportSettings, settle

logger = logging.getLogger(__name__)
_OWN = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class ExportedGguf:
    """A GGUF file, how it was made and what was proven of it."""

    file: GgufFile
    converter: str
    quantiser: str | None
    check: TokenCheck | None
    """None where llama.cpp was not there to run it, or not asked to."""

    @property
    def odd_rows(self) -> dict[int, int]:
        """Numbers of tensors by the length of their rows, where the type's blocks do not divide it."""
        block = KINDS[self.file.type].block if self.file.type in KINDS else 1
        rows = [tensor.row for tensor in self.file.tensors if tensor.matrix and tensor.row % block]
        return {row: rows.count(row) for row in sorted(set(rows))}

    def to_dict(self) -> dict[str, Any]:
        """Returns what `--json` prints."""
        return {
            "out": str(self.file.path), "type": self.file.type, "architecture": self.file.architecture,
            "parameters": self.file.parameters, "bytes": self.file.path.stat().st_size,
            "weight_bytes": self.file.weight_bytes,
            "tensors": {kind: {"count": count, "bytes": size} for kind, (count, size) in self.file.types.items()},
            "odd_rows": {str(row): count for row, count in self.odd_rows.items()},
            "converter": self.converter, "quantiser": self.quantiser,
            "check": asdict(self.check) if self.check else None,
        }  # fmt: skip


def export_gguf(
    model: str | Path,
    out: str | Path,
    settings: ExportSettings | None = None,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> ExportedGguf:
    """Writes a model as one GGUF file, by llama.cpp's own converter and quantiser, and lets llama.cpp prove it.

    The sizes in the header are held to the checkpoint's. Then llama.cpp generates 2 x 16 tokens greedily, with keys and
    values in float32, and transformers judges each in float32, streaming the checkpoint: f32 must choose the same,
    f16, bf16 and q8_0 nearly; of other types it is told how many agree.

    Args:
        model: a Hugging Face folder, a hub id, a `.gguf` file or an alias.
        out: the `.gguf` file to write; it appears whole or not at all.
        settings: what is written. The converter runs code that MODEL's tokenizer carries, with `trust_remote_code`;
            without it such a MODEL is refused.
        progress: told how far it is.
        options: of `ExportSettings`, such as `type="q4_k_m"`.

    Raises:
        MissingDependencyError: llama.cpp's converter, or the quantiser that the type needs, is not there.
        UnsupportedModelError: llama.cpp does not know the family, its tokenizer, or cannot hold the shape.
        ExportError: a program failed, or what it wrote is not the model.
        CheckpointError: MODEL cannot be read, or OUT not written.
    """
    asked = settle(ExportSettings, settings, options)
    place, directory = Path(out).expanduser(), None if asked.llama_cpp is None else Path(asked.llama_cpp)
    if asked.type not in ("auto", *KINDS):
        raise ExportError(f"unknown type {asked.type!r}; the types are auto, {', '.join(KINDS)}")
    if place.suffix.lower() != ".gguf":
        raise ExportError(f"OUT {place} does not end in .gguf, by which programs know such a file")
    required("export", "gguf")
    source = open_source(model, revision=asked.revision)
    check_file(place, overwrite=asked.overwrite, protected=source.protected)
    _check_source(source, trust_remote_code=asked.trust_remote_code)
    checkpoint = read_checkpoint(source.folder)
    own = _OWN.get(checkpoint.dtype, "f32")
    kind = own if asked.type == "auto" else asked.type
    twin, converter = find_twin(checkpoint), find_converter(directory)
    quantiser = None if KINDS[kind].converted else find_quantiser(directory)
    with staged_file(place, overwrite=asked.overwrite, protected=source.protected) as partial:
        _check_disk(partial.parent, checkpoint, (kind,) if quantiser is None else (kind, own))
        with progress(f"To {kind}", 1 + (quantiser is not None) + asked.check) as advance:
            first = partial if quantiser is None else partial.with_suffix(f".{own}")
            name, family = source.name.rpartition("/")[2], checkpoint.shape.model_type
            with as_twin(checkpoint, twin) as folder:
                convert(converter, folder, first, own if quantiser else kind, name=name, model_type=family)
            written = set_width(read_gguf(first), checkpoint.shape.intermediate_size)
            advance(1)
            if quantiser is not None:
                quantise(quantiser, first, partial, kind, threads=torch.get_num_threads())
                first.unlink()
                advance(1)
                written = read_gguf(partial)
            check_sizes(written, checkpoint)
            proof = None
            if asked.check:
                try:
                    proof = check_tokens(written, checkpoint, threads=torch.get_num_threads())
                except MissingDependencyError as error:
                    logger.warning("not run in llama.cpp: %s", error)
                advance(1)
    file = replace(written, path=resolved(place))
    return ExportedGguf(file, str(converter.path), None if quantiser is None else str(quantiser.path), proof)


def _check_source(source: Source, *, trust_remote_code: bool) -> None:
    settings = (source.folder / name for name in ("config.json", "tokenizer_config.json"))
    for file in (file for file in settings if file.is_file()):
        if "auto_map" in read_object(file) and not trust_remote_code:
            raise UnsupportedModelError(
                f"{file} names code of the model's own (auto_map), which llama.cpp's converter would run; read it, and "
                "give --trust-remote-code if you trust it"
            )


def _check_disk(folder: Path, checkpoint: Checkpoint, kinds: tuple[str, ...]) -> None:
    needed = sum(KINDS[kind].bytes for kind in kinds) * checkpoint.shape.parameters
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CheckpointError(
            f"{folder} needs about {needed / 1e9:.2f} GB for {' and '.join(kinds)}, but only {free / 1e9:.2f} GB are "
            "free on that disk; free some space, or choose another place"
        )
