"""The folder of an experiment and its `experiment.json`: alone in it, begun or gone on with, emptied of another."""

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from amprune.errors import EvaluationError
from amprune.evaluation.run import versions
from amprune.experiments.cells import EVALUATION, MODELS, SCORES, Bench
from amprune.experiments.recipes import Recipe
from amprune.experiments.settings import Settings
from amprune.records import Rule, go_on, read, write
from amprune.report.write import remove_report

logger = logging.getLogger(__name__)
FILE = "experiment.json"
FORMAT = "amprune experiment 1"
LOCK = ".experiment.lock"
_REMEDY = "it is damaged or no record of an experiment: move it away, or write to another folder"


@dataclass(frozen=True)
class CellResult:
    """What became of a cell; its figures are in `evaluation.json`, under the same name."""

    state: Literal["done", "n/a", "failed"]
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


@dataclass(frozen=True)
class ModelResults:
    """What is done of one model."""

    model: str
    """As it was asked for."""
    folder: Annotated[
        str, Rule("the name of a folder", lambda name: name not in ("", "..") and Path(name).name == name)
    ]
    """Of its figures, below that of the experiment."""
    scoring_seconds: dict[str, float] = field(default_factory=dict)
    """By criteria that one pass served, with commas."""
    cells: dict[str, CellResult] = field(default_factory=dict)

    def is_finished(self, cell: str) -> bool:
        """Tells whether a cell needs no further run: failed ones are tried again."""
        return cell in self.cells and self.cells[cell].state != "failed"


@dataclass(frozen=True)
class Results:
    """The content of `experiment.json`."""

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
        return {"format": FORMAT, **asdict(self)}

    def save(self, folder: Path) -> None:
        """Writes the file whole or not at all."""
        write(folder / FILE, self.to_dict(), error=EvaluationError)


def begin(folder: Path, recipe: Recipe, settings: Settings, benches: Sequence[Bench], *, overwrite: bool) -> Results:
    """Finds what an earlier run of the same request has finished, or begins anew where nothing is in the way."""
    request = {"settings": settings.to_dict(), "models": {bench.model: bench.fingerprint for bench in benches}}
    if (file := folder / FILE).is_file():
        before = read(Results, file, error=EvaluationError, remedy=_REMEDY, format=FORMAT)
        begun = go_on({"request": before.request, "done": []}, request)
        if begun.resumed and before.experiment == recipe.name:
            finished = sum(found.is_finished(cell) for found in before.models for cell in found.cells)
            if finished or before.failed:
                again = f", {len(before.failed)} failed ones are tried again" if before.failed else ""
                logger.info("going on with the experiment in %s: %d cells are finished%s", file, finished, again)
            return before
        if not overwrite:
            names = {name.removeprefix("settings.").removeprefix("models.") for name in begun.otherwise}
            what = f"with another {', '.join(sorted(names))}"
            raise EvaluationError(
                f"{folder} holds an experiment that was asked for "
                f"{what if before.experiment == recipe.name else f'for {before.experiment}'}; ask for the same again, "
                "choose another folder, or give --overwrite to remove it"
            )
        _remove(folder, before)
    elif there := [path.name for path in folder.iterdir() if path.name != LOCK]:
        raise EvaluationError(f"{folder} holds {there[0]} and no {FILE}; choose an empty folder or a new one")
    models = [ModelResults(bench.model, bench.folder.name) for bench in benches]
    new = Results(recipe.name, go_on(None, request).request, versions(), models)
    new.save(folder)
    return new


def _remove(folder: Path, results: Results) -> None:
    """Removes what an experiment has written, and nothing else; its record last."""
    for found in results.models:
        place = folder / found.folder
        for name in (SCORES, MODELS):
            if (place / name).is_dir():
                shutil.rmtree(place / name)
        (place / EVALUATION).unlink(missing_ok=True)
        with suppress(OSError):  # it stays where someone else has put something into it
            place.rmdir()
    remove_report(folder)
    (folder / FILE).unlink()
