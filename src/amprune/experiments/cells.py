"""One cell: its scores, its model on disk while it is measured, its figures."""

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amprune.cut.refit.record import RECORD
from amprune.errors import AmpruneError, EvaluationError, ScoresError, reason
from amprune.evaluation.identity import content_hash
from amprune.evaluation.records import Evaluation
from amprune.evaluation.run import evaluate
from amprune.experiments.recipes import Cell
from amprune.experiments.settings import Settings
from amprune.model.reader import open_model
from amprune.model.writer import RECORDS
from amprune.pipeline import apply_plan, prune
from amprune.plan.artefact import PruningPlan
from amprune.plan.make import make_plan
from amprune.records import read_object, replaced
from amprune.recovery.run import recover
from amprune.running import Progress, out_of_memory, release_memory
from amprune.scoring.catalogue import CRITERIA, Criterion
from amprune.scoring.run import score_criteria
from amprune.scoring.scores import ImportanceScores
from amprune.settings import PRESETS, Measurement, RecoverySettings, ScoreSettings, with_preset
from amprune.text.calibration import draw
from amprune.text.records import read_records

EVALUATION, SCORES, MODELS = "evaluation.json", "scores", "models"
"""In the folder of each model."""
_MEASURED_ON = (
    "data_dir", "texts", "sequence_length", "windows", "tasks", "limit", "latency", "energy_seconds", "device", "dtype"
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One model of an experiment and where its files lie."""

    model: str
    parameters: int
    fingerprint: str
    """Both of the dense model."""
    folder: Path
    settings: Settings
    measure: tuple[Measurement, ...]
    progress: Progress

    def scores(self, criterion: str) -> Path:
        """Returns the score file of a criterion."""
        return self.folder / SCORES / f"{criterion}.safetensors"

    def pruned(self, cell: Cell) -> Path:
        """Returns where a cell's pruned model lies; cells that differ in training alone share it."""
        parts = (cell.preset or cell.criterion, cell.order, cell.only or "both", f"{cell.ratio:.6g}")
        return self.folder / MODELS / "-".join(map(str, parts))

    def trained(self, cell: Cell) -> Path:
        """Returns where the trained model of a cell lies, at the end of its training."""
        pruned = self.pruned(cell)
        return pruned.with_name(f"{pruned.name}-trained")

    def place(self, cell: Cell) -> Path:
        """Returns where the model of a cell lies that is pruned here."""
        if not cell.trained:
            return self.pruned(cell)
        end = self.trained(cell)
        return end if cell.epoch is None else end.with_name(f"{end.name}.epoch-{cell.epoch}")


def failure(error: Exception) -> AmpruneError:
    """Returns what a cell failed of; a fault of the program is raised, else the experiment goes on."""
    if isinstance(error, AmpruneError):
        return error
    if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
        release_memory()
        return EvaluationError(f"memory ran out ({reason(error)}); use a smaller --dtype or another --device")
    raise error


def slug(name: str) -> str:
    """Returns a name as a folder can have it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def score_cells(bench: Bench, cells: Sequence[Cell]) -> tuple[dict[str, AmpruneError], dict[str, float]]:
    """Scores what has no score file yet, one pass for all criteria that need the same.

    Returns the criteria that failed and why, and the seconds of each pass by its criteria, with commas.
    """
    names = dict.fromkeys(cell.criterion for cell in cells if cell.criterion is not None)
    missing = [CRITERIA[name] for name in names if not _is_scored(bench.scores(name))]
    failed: dict[str, AmpruneError] = {}
    seconds: dict[str, float] = {}
    for needs in dict.fromkeys(one.needs for one in missing):
        criteria = [one for one in missing if one.needs is needs]
        start = time.perf_counter()
        try:
            found = _score(bench, criteria)
        except Exception as error:
            failed |= dict.fromkeys((one.name for one in criteria), failure(error))
            continue
        for name, scores in found.items():
            with replaced(bench.scores(name), error=ScoresError) as partial:  # a later run takes it for finished
                scores.save(partial)
        seconds[",".join(one.name for one in criteria)] = round(time.perf_counter() - start, 1)
    return failed, seconds


def _score(bench: Bench, criteria: Sequence[Criterion]) -> dict[str, ImportanceScores]:
    settings = bench.settings
    shared = {name: getattr(settings, name) for name in ("calibration", "samples", "seed", "device", "dtype")}
    asked = with_preset(ScoreSettings(preset="paper", **shared))
    _, dense = open_model(bench.model, dtype=settings.dtype)
    samples = draw(dense, asked) if any(one.calibrated for one in criteria) else None
    return score_criteria(dense, criteria, samples, asked, seed=settings.seed, progress=bench.progress)


def _is_scored(file: Path) -> bool:
    try:
        ImportanceScores.load(file)
    except ScoresError:
        return False
    return True


def make_model(bench: Bench, cell: Cell) -> None:
    """Prunes the model of a cell, and trains it where the cell says so, unless an interrupted run has."""
    if not cell.is_pruned or bench.place(cell).is_dir():
        return
    settings, pruned = bench.settings, bench.pruned(cell)
    if cell.preset is not None and not pruned.is_dir():
        _prune_whole(bench, cell, cell.preset)
    elif not pruned.is_dir():
        apply_plan(bench.model, plan_cell(bench, cell), pruned, dtype=settings.dtype, progress=bench.progress)
    if cell.trained:
        end = bench.trained(cell)
        recovery = RecoverySettings(
            **vars(settings.recovery), data=settings.data, samples=settings.training_samples, device=settings.device,
            dtype=settings.dtype, keep_epochs=cell.epoch is not None,  # type: ignore[arg-type]
            resume=end.with_name(f"{end.name}.training").is_dir(),
            overwrite=True,  # of an interrupted run, which ended before all epochs were written
        )  # fmt: skip
        recover(pruned, end, recovery, progress=bench.progress)


def _prune_whole(bench: Bench, cell: Cell, preset: str) -> None:
    """Prunes by a preset, which draws from its own calibration set, no more than the experiment allows.

    The ratio is met exactly, as by the criteria beside it: methods are compared under one budget.
    """
    settings, own = bench.settings, PRESETS[preset].pruning
    samples, tokens = None, None
    if settings.preset_samples is not None:
        samples, tokens = min(settings.preset_samples, len(read_records(own.calibration)[1])), own.tokens
    prune(
        bench.model, bench.pruned(cell), ratio=cell.ratio, preset=preset, neuron_multiple=1, samples=samples,
        tokens=tokens, seed=settings.seed, device=settings.device, dtype=settings.dtype, progress=bench.progress,
    )  # fmt: skip


def own_calibration(bench: Bench, cell: Cell) -> dict[str, Any] | None:
    """Returns what the pruned model of a preset says of the set that it was made with; None where it says nothing."""
    file = bench.pruned(cell) / RECORDS / RECORD
    return read_object(file).get("calibration") if cell.preset is not None and file.is_file() else None


def plan_cell(bench: Bench, cell: Cell) -> PruningPlan:
    """Chooses what the pruned model of a cell keeps; a PlanError says that the model has no such cell."""
    scores = ImportanceScores.load(bench.scores(str(cell.criterion)))
    return make_plan(scores, ratio=cell.ratio, order=cell.order, only=cell.only, seed=bench.settings.seed)


def measure_cells(bench: Bench, cells: Sequence[Cell]) -> Evaluation:
    """Measures models, the first being the baseline, into the evaluation of the bench; goes on where it was cut off."""
    file = bench.folder / EVALUATION
    _forget_others(file, {cell.name: bench.place(cell) for cell in cells if cell.is_pruned})
    models = []
    for cell in cells:
        place = str(bench.place(cell)) if cell.is_pruned else bench.model
        models.append(f"{cell.name}={place}" if cell.checkpoint is None else cell.checkpoint)
    settings = {name: getattr(bench.settings, name) for name in _MEASURED_ON}
    return evaluate(
        models, file, measure=bench.measure, start_token="first", progress=bench.progress, **settings
    )  # the paper's procedure


def _forget_others(file: Path, places: Mapping[str, Path]) -> None:
    """Removes figures of an earlier model under a name; training on some devices gives other weights every time."""
    if not file.is_file():
        return
    evaluation = Evaluation.load(file)
    known = {name: entry.sha256 for name, entry in evaluation.models.items() if name in places}
    if other := [name for name, digest in known.items() if content_hash(places[name]) != digest]:
        evaluation.models = {name: entry for name, entry in evaluation.models.items() if name not in other}
        evaluation.records = {key: record for key, record in evaluation.records.items() if record.model not in other}
        evaluation.unfinished = None
        evaluation.save(file)


def remove_models(bench: Bench, cell: Cell, *, needed: Sequence[Cell]) -> None:
    """Removes the models of a cell that none of the needed ones is made of."""
    if not cell.is_pruned:
        return
    kept = {place for other in needed if other.is_pruned for place in _places(bench, other)}
    for place in _places(bench, cell):
        if place not in kept and place.is_dir():
            shutil.rmtree(place)
    models = bench.folder / MODELS
    if models.is_dir() and not any(models.iterdir()):
        models.rmdir()


def _places(bench: Bench, cell: Cell) -> tuple[Path, ...]:
    """Returns the folders that a cell is made in: its pruned model, its training, its trained model."""
    if not cell.trained:
        return (bench.pruned(cell),)
    end = bench.trained(cell)
    epochs = sorted(end.parent.glob(f"{end.name}.epoch-*")) if cell.epoch is not None else ()
    return (bench.pruned(cell), end, end.with_name(f"{end.name}.training"), *epochs)
