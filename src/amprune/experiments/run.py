"""Every cell of an experiment once, in order; finished ones are kept. START HERE in this folder."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from amprune.errors import AmpruneError, EvaluationError, PlanError, UnsupportedModelError
from amprune.experiments.cells import (
    Bench,
    failure,
    make_model,
    measure_cells,
    own_calibration,
    plan_cell,
    remove_models,
    score_cells,
)
from amprune.experiments.contents import experiment_contents
from amprune.experiments.opening import open_benches
from amprune.experiments.recipes import Cell, find_recipe
from amprune.experiments.results import FILE, LOCK, CellResult, ModelResults, Results, begin
from amprune.experiments.settings import given_of, load_configuration, make_cells, make_settings
from amprune.experiments.tables import figures_of
from amprune.model.latency import LatencySettings
from amprune.records import alone
from amprune.report.write import ReportFiles, write_contents
from amprune.running import Progress, no_progress
from amprune.settings import ExperimentSettings, PathLike, settle


@dataclass(frozen=True)
class ExperimentFiles:
    """What an experiment wrote."""

    record: Path
    """`experiment.json`."""
    report: ReportFiles
    results: Results

    @property
    def failed(self) -> tuple[tuple[str, str, str], ...]:
        """Returns model, cell and reason of everything that failed; the same call tries it again."""
        return self.results.failed


def experiment(
    name: str,
    models: PathLike | Sequence[PathLike] = (),
    output: PathLike = "experiment",
    settings: ExperimentSettings | None = None,
    *,
    latency: Sequence[LatencySettings] | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> ExperimentFiles:
    """Runs one of the paper's experiments on models, and draws its tables and figures.

    Each criterion scores a model once; `best` is made by `prune`. A pruned model is removed when it is measured. What
    is finished is kept: the same call goes on where it was interrupted, and tries again what failed. None takes the
    default: of `quick`, of the configuration, of the experiment, in this order.

    Args:
        name: table1, table2, table3, figure1, speedup, epochs or cost.
        models: a Hugging Face folder, a `.gguf` file, an alias or a hub id each; instead of the configuration's.
        output: the folder to write.
        settings: what else is asked for. `samples`, where given, are the most that `best` draws of its own set, too.
        latency: cases to time, instead of the settings'.
        progress: told how far it is.
        options: of `ExperimentSettings`, such as `ratios=(0.1, 0.2)` or `quick=True`.

    Raises:
        AmpruneError: the request makes no sense. A cell that fails raises nothing: it is recorded, and the rest goes
            on; see `ExperimentFiles.failed`.
    """
    asked, recipe = settle(ExperimentSettings, settings, options), find_recipe(name)
    configuration = None if asked.config is None else load_configuration(asked.config)
    configured = {} if configuration is None else configuration.settings_of(name)
    chosen = make_settings(recipe, given_of(asked, latency), quick=asked.quick, configured=configured)
    cells, folder = make_cells(recipe, chosen), Path(output).expanduser()
    given = [models] if isinstance(models, str | os.PathLike) else models
    named = [str(model) for model in given] or ([configuration.model] if configuration is not None else [])
    benches = open_benches(named, folder, recipe, chosen, progress=progress)
    with alone(folder / LOCK, str(folder), error=EvaluationError):
        results = begin(folder, recipe, chosen, benches, overwrite=asked.overwrite)
        save = partial(results.save, folder)
        for bench, found in zip(benches, results.models, strict=True):
            _run_model(bench, cells, found, save, together=recipe.together, keep=asked.keep)
        contents = experiment_contents(recipe, chosen, cells, results, folder)
        return ExperimentFiles(folder / FILE, write_contents(folder, contents), results)


def _run_model(
    bench: Bench, cells: Sequence[Cell], found: ModelResults, save: Callable[[], None], *, together: bool, keep: bool
) -> None:
    """Runs the cells of one model that are not finished.

    Timings compare only where they were taken in turn: of cells that are measured together, where one that had failed
    can be made now, those that are done are made and measured again.
    """
    todo = [cell for cell in cells if not found.is_finished(cell.name)]
    if not todo:
        return
    unscored, seconds = score_cells(bench, todo)
    found.scoring_seconds.update(seconds)
    done = [cell for cell in cells if cell not in todo and found.cells[cell.name].state == "done"] if together else []
    pending = [*todo, *done]

    def settle(cell: Cell, result: CellResult) -> None:
        pending.remove(cell)
        if not keep:  # before it counts as finished, else a run that is killed in between would leave them for good
            remove_models(bench, cell, needed=pending)
        results = {**found.cells, cell.name: result}
        found.cells.clear()
        found.cells.update({other.name: results[other.name] for other in cells if other.name in results})
        save()

    for group in [list(pending)] if together else [[cell] for cell in todo]:
        ready: dict[Cell, CellResult] = {}
        for cell in group:
            if cell in done and not ready:
                return
            if (result := _made(bench, cell, unscored)).state == "done":
                ready[cell] = result
            else:
                settle(cell, result)
        baseline_first = sorted(ready, key=lambda cell: cell.is_pruned)
        for cell, result in _measured(bench, {cell: ready[cell] for cell in baseline_first}).items():
            settle(cell, result)


def _made(bench: Bench, cell: Cell, unscored: dict[str, AmpruneError]) -> CellResult:
    """Makes the model of a cell; `done` stands for made here."""
    start = time.perf_counter()
    if (error := unscored.get(cell.criterion or "")) is not None:
        return CellResult("n/a" if isinstance(error, UnsupportedModelError) else "failed", str(error))
    try:
        if cell.criterion is not None:
            plan_cell(bench, cell)
    except PlanError as problem:
        return CellResult("n/a", str(problem))
    try:
        make_model(bench, cell)
        calibration = own_calibration(bench, cell)
    except Exception as problem:
        known = failure(problem)
        impossible = cell.preset is not None and isinstance(known, PlanError | UnsupportedModelError)
        return CellResult("n/a" if impossible else "failed", str(known))
    seconds = round(time.perf_counter() - start, 1) if cell.is_pruned else None
    return CellResult("done", making_seconds=seconds, calibration=calibration)


def _measured(bench: Bench, made: dict[Cell, CellResult]) -> dict[Cell, CellResult]:
    """Measures made cells, each with all others."""
    if not made:
        return {}
    start = time.perf_counter()
    try:
        evaluation = measure_cells(bench, list(made))
    except Exception as error:
        return dict.fromkeys(made, CellResult("failed", str(failure(error))))
    seconds = round(time.perf_counter() - start, 1)
    return {
        cell: replace(
            result, ratio=1 - evaluation.models[cell.name].parameters / bench.parameters, measuring_seconds=seconds,
            figures=figures_of(evaluation, cell),
        )
        for cell, result in made.items()
    }  # fmt: skip
