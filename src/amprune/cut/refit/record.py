"""The content of `amprune/reconstruction.json`: what was refitted, on what, and how well."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from amprune.errors import ReconstructionError
from amprune.model.writer import RECORDS
from amprune.records import Figure, Whole, read

RECORD = "reconstruction.json"
"""In the records of an output."""
FORMAT = 1


@dataclass(frozen=True)
class ProjectionErrors:
    """How well one output projection gives what it should: squared errors as shares of its target's square."""

    before: Figure
    after: Figure
    held_out_before: Figure
    held_out_after: Figure
    strength: Figure | None
    """Of the ridge; None where the projection stayed as it was."""
    tokens: Whole
    """That the fit saw."""


@dataclass(frozen=True)
class LayerErrors:
    """One layer of the record."""

    attention: ProjectionErrors
    mlp: ProjectionErrors
    drift: Figure
    """How far the layer's hidden states are from the dense model's: squared error as a share of their square."""


class Text(TypedDict):
    """What the record says of the calibration set; it holds more, which nothing depends on."""

    name: str


@dataclass(frozen=True)
class ReconstructionRecord:
    """What an output says of its refit."""

    text: Text = field(metadata={"entry": "calibration"})
    rows: Whole
    row_tokens: Whole
    held_out_rows: Whole
    layers: tuple[LayerErrors, ...]
    sha256: Mapping[str, str]
    """Hashes of the refitted tensors, by their dense names."""

    @property
    def calibration(self) -> str:
        """What the calibration set is called."""
        return self.text["name"]

    @property
    def projections(self) -> tuple[ProjectionErrors, ...]:
        """Returns all of them, both of each layer."""
        return tuple(errors for layer in self.layers for errors in (layer.attention, layer.mlp))


def read_record(folder: Path) -> ReconstructionRecord | None:
    """Reads the record that an output carries; None where nothing was refitted."""
    path = folder / RECORDS / RECORD
    remedy = "the record is damaged: reconstruct the model again"
    if not path.is_file():
        return None
    return read(ReconstructionRecord, path, error=ReconstructionError, remedy=remedy, format=FORMAT)


def recorded_hashes(folder: Path) -> dict[str, str]:
    """Returns the hashes of an output's refitted tensors, by their dense names; none where nothing was refitted."""
    record = read_record(folder)
    return {} if record is None else dict(record.sha256)
