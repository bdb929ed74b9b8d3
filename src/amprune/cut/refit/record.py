"""The content of `amprune/reconstruction.json`: what was refitted, on what, and how well."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amprune.errors import ReconstructionError
from amprune.model.files import read_json
from amprune.model.writer import RECORDS

RECORD = "reconstruction.json"
"""In the records of an output."""
FORMAT = 1


@dataclass(frozen=True)
class ProjectionErrors:
    """How well one output projection gives what it should: squared errors as shares of its target's square."""

    before: float
    after: float
    held_out_before: float
    held_out_after: float
    strength: float | None
    """Of the ridge; None where the projection stayed as it was."""
    tokens: int
    """That the fit saw."""


@dataclass(frozen=True)
class LayerErrors:
    """One layer of the record."""

    attention: ProjectionErrors
    mlp: ProjectionErrors
    drift: float
    """How far the layer's hidden states are from the dense model's: squared error as a share of their square."""


@dataclass(frozen=True)
class ReconstructionRecord:
    """What an output says of its refit."""

    calibration: str
    """What the calibration set is called."""
    rows: int
    row_tokens: int
    held_out_rows: int
    layers: tuple[LayerErrors, ...]
    sha256: Mapping[str, str]
    """Hashes of the refitted tensors, by their dense names."""

    @property
    def projections(self) -> tuple[ProjectionErrors, ...]:
        """Returns all of them, both of each layer."""
        return tuple(errors for layer in self.layers for errors in (layer.attention, layer.mlp))


def read_record(folder: Path) -> ReconstructionRecord | None:
    """Reads the record that an output carries; None where nothing was refitted.

    Raises:
        CheckpointError: it is no JSON.
        ReconstructionError: it is damaged.
    """
    path = folder / RECORDS / RECORD
    if not path.is_file():
        return None
    content, where = read_json(path), str(path)
    if content.get("format") != FORMAT:
        raise ReconstructionError(
            f"{where}: format is {content.get('format')!r}, expected {FORMAT}; reconstruct the model again"
        )
    sizes = {name: _count(content, name, where) for name in ("rows", "row_tokens", "held_out_rows")}
    hashes, layers = _field(content, "sha256", dict, where), _field(content, "layers", list, where)
    for name in hashes:
        _field(hashes, name, str, where)
    return ReconstructionRecord(
        calibration=_field(_field(content, "calibration", dict, where), "name", str, where),
        layers=tuple(_layer(layer, f"{where}: layer {index}") for index, layer in enumerate(layers)),
        sha256=hashes,
        **sizes,
    )


def recorded_hashes(folder: Path) -> dict[str, str]:
    """Returns the hashes of an output's refitted tensors, by their dense names; none where nothing was refitted.

    Raises:
        CheckpointError: the record is no JSON.
        ReconstructionError: the record is damaged.
    """
    record = read_record(folder)
    return {} if record is None else dict(record.sha256)


def _layer(content: Any, where: str) -> LayerErrors:
    return LayerErrors(
        attention=_projection(content, "attention", where),
        mlp=_projection(content, "mlp", where),
        drift=_number(content, "drift", where),
    )


def _projection(layer: Any, name: str, where: str) -> ProjectionErrors:
    content, where = _field(layer, name, dict, where), f"{where}, {name}"
    unchanged = content.get("strength", 0) is None
    return ProjectionErrors(
        before=_number(content, "before", where),
        after=_number(content, "after", where),
        held_out_before=_number(content, "held_out_before", where),
        held_out_after=_number(content, "held_out_after", where),
        strength=None if unchanged else _number(content, "strength", where),
        tokens=_count(content, "tokens", where),
    )


def _field(content: Any, name: str, kind: type, where: str) -> Any:
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise _damaged(name, value, where)
    return value


def _count(content: Any, name: str, where: str) -> int:
    value: int = _field(content, name, int, where)
    if isinstance(value, bool) or value < 0:
        raise _damaged(name, value, where)
    return value


def _number(content: Any, name: str, where: str) -> float:
    value = content.get(name) if isinstance(content, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _damaged(name, value, where)
    return float(value)


def _damaged(name: str, value: object, where: str) -> ReconstructionError:
    return ReconstructionError(f"{where}: {name} is {str(value)[:60]}; the record is damaged: reconstruct it again")
