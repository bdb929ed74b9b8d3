"""`experiment.json`: what was asked for, and what became of every cell."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from amprune.errors import EvaluationError
from amprune.model.writer import write_json

FILE = "experiment.json"
FORMAT = "amprune experiment 1"
State = Literal["done", "n/a", "failed"]


@dataclass(frozen=True)
class CellResult:
    """What became of a cell; its figures are in `evaluation.json`, under the same name."""

    state: State
    """`n/a`: the model has no such cell, as where heads alone cannot give the ratio."""
    reason: str | None = None
    """Of `n/a` and `failed`."""
    ratio: float | None = None
    """Share of the parameters that the model lacks."""
    making_seconds: float | None = None
    """Slicing, verifying and training, of a preset scoring and refitting, too; as far as another cell or an interrupted
    run had left it to do."""
    measuring_seconds: float | None = None
    """Of models that are measured together, the time for all."""
    calibration: dict[str, Any] | None = None
    """Of a preset: its own set, with its samples, tokens and hash."""
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Perplexities and accuracies by the titles of the table's columns: `value` and `standard_error`."""


@dataclass
class ModelResults:
    """What is done of one model."""

    model: str
    """As it was asked for."""
    folder: str
    """Of its figures, below that of the experiment."""
    scoring_seconds: dict[str, float] = field(default_factory=dict)
    """By criteria that one pass served, with commas."""
    cells: dict[str, CellResult] = field(default_factory=dict)

    def is_finished(self, cell: str) -> bool:
        """Tells whether a cell needs no further run: failed ones are tried again."""
        return cell in self.cells and self.cells[cell].state != "failed"


@dataclass
class Results:
    """The content of `experiment.json`."""

    path: Path
    experiment: str
    request: dict[str, Any]
    versions: dict[str, str]
    """Of the packages when the experiment began."""
    models: list[ModelResults]

    @property
    def failed(self) -> tuple[tuple[str, str, str], ...]:
        """Returns model, cell and reason of everything that failed."""
        return tuple(
            (found.model, name, cell.reason or "")
            for found in self.models
            for name, cell in found.cells.items()
            if cell.state == "failed"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "format": FORMAT,
            "experiment": self.experiment,
            "request": self.request,
            "versions": self.versions,
            "models": [asdict(found) for found in self.models],
        }

    def save(self) -> None:
        """Writes the file whole or not at all.

        Raises:
            EvaluationError: the disk refuses.
        """
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(partial, self.to_dict())
            partial.replace(self.path)
        except OSError as error:
            raise EvaluationError(f"cannot write {self.path}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Reads a file.

        Raises:
            EvaluationError: it is none of an experiment, or damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, expected {FORMAT!r}")
            models = [_model(entry) for entry in content["models"]]
            return cls(path, content["experiment"], content["request"], content["versions"], models)
        except OSError as error:
            raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{path} is damaged or no record of an experiment ({type(error).__name__}: {error}); move it away, or "
                "write to another folder"
            ) from error


def _model(entry: Mapping[str, Any]) -> ModelResults:
    cells = {name: CellResult(**cell) for name, cell in entry["cells"].items()}
    if any(cell.state not in get_args(State) for cell in cells.values()):
        raise ValueError("a cell has an unknown state")
    if Path(entry["folder"]).name != entry["folder"] or entry["folder"] == "..":
        raise ValueError(f"{entry['folder']!r} is no folder of it")
    return ModelResults(**{**entry, "cells": cells})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yields what another request asked for otherwise, as `ratios`, `recovery.epochs`."""
    for name in dict.fromkeys([*before, *now]):
        theirs, ours = before.get(name), now.get(name)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            yield from (
                entry if name in ("settings", "models") else f"{name}.{entry}" for entry in changes(theirs, ours)
            )
        elif theirs != ours:
            yield name
