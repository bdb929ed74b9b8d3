"""Every cell of an experiment once, in order; finished ones are kept. START HERE in this folder."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amprune.errors import AmpruneError, PlanError, UnsupportedModelError
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
from amprune.experiments.configurations import load_configuration
from amprune.experiments.contents import experiment_contents
from amprune.experiments.folder import alone_in, begin
from amprune.experiments.opening import models_of, open_benches
from amprune.experiments.recipes import Cell, find_recipe
from amprune.experiments.results import CellResult, ModelResults, Results
from amprune.experiments.settings import given_of, make_cells, make_settings
from amprune.experiments.tables import figures_of
from amprune.model.latency import LatencySettings
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
        models: a Hugging Face folder, a `.gguf` file, an alias or a hub id each; in place of the configuration's.
        output: the folder to write.
        settings: what else is asked for. `samples`, where given, are the most that `best` draws of its own set, too.
        latency: cases to time, in the place of the settings'.
        progress: told how far it is.
        options: of `ExperimentSettings`, such as `ratios=(0.1, 0.2)` or `quick=True`.

    Raises:
        AmpruneError: the request makes no sense. A cell that fails raises nothing: it is recorded, and the rest goes
            on; see `ExperimentFiles.failed`.
    """
    asked, recipe = settle(ExperimentSettings, settings, options), find_recipe(name)
    configuration = None if asked.config is None else load_configuration(asked.config)
    chosen = make_settings(
        recipe, given_of(asked, recipe, latency), quick=asked.quick,
        configured=configuration.settings_of(name) if configuration else {},
    )  # fmt: skip
    cells, folder = make_cells(recipe, chosen), Path(output).expanduser()
    benches = open_benches(models_of(models, configuration), folder, recipe, chosen, progress=progress)
    with alone_in(folder):
        results = begin(folder, recipe, chosen, benches, overwrite=asked.overwrite)
        for bench, found in zip(benches, results.models, strict=True):
            _run_model(bench, cells, found, results, together=recipe.together, keep=asked.keep)
        contents = experiment_contents(recipe, chosen, cells, results)
        return ExperimentFiles(results.path, write_contents(folder, contents), results)


def _run_model(
    bench: Bench, cells: Sequence[Cell], found: ModelResults, results: Results, *, together: bool, keep: bool
) -> None:
    """Runs the cells of one model that are not finished."""
    todo = [cell for cell in cells if not found.is_finished(cell.name)]
    if not todo:
        return
    unscored, seconds = score_cells(bench, todo)
    found.scoring_seconds |= seconds

    def settle(cell: Cell, result: CellResult, needed: Sequence[Cell]) -> None:
        if not keep:  # before it counts as finished, else a run that is killed in between would leave them for good
            remove_models(bench, cell, needed=needed)
        found.cells[cell.name] = result
        found.cells = {other.name: found.cells[other.name] for other in cells if other.name in found.cells}
        results.save()

    if together:
        done = [cell for cell in cells if cell.name in found.cells and found.cells[cell.name].state == "done"]
        _run_together(bench, todo, done, unscored, settle)
    else:
        _run_alone(bench, todo, unscored, settle)


_Settle = Callable[[Cell, CellResult, Sequence[Cell]], None]
"""Keeps what became of a cell, and removes its models but for those that others need."""


def _run_alone(bench: Bench, todo: Sequence[Cell], unscored: dict[str, AmpruneError], settle: _Settle) -> None:
    """Makes and measures one cell after the other."""
    for index, cell in enumerate(todo):
        result = _made(bench, cell, unscored)
        result = _measured(bench, [cell], [result])[0] if result.state == "done" else result
        settle(cell, result, todo[index + 1 :])


def _run_together(
    bench: Bench, todo: Sequence[Cell], done: Sequence[Cell], unscored: dict[str, AmpruneError], settle: _Settle
) -> None:
    """Makes all cells, then measures all in turn.

    Timings compare only where they were taken in turn: where a cell that had failed can be made now, those that are
    done are made and measured again.
    """
    ready: list[tuple[Cell, CellResult]] = []
    for cell in (*todo, *done):
        if cell in done and not ready:
            return
        result = _made(bench, cell, unscored)
        if result.state == "done":
            ready.append((cell, result))
        else:
            settle(cell, result, [other for other in (*todo, *done) if other != cell])
    ready.sort(key=lambda pair: pair[0].is_pruned)  # the baseline first
    cells = [cell for cell, _ in ready]
    for index, (cell, result) in enumerate(zip(cells, _measured(bench, cells, [r for _, r in ready]), strict=True)):
        settle(cell, result, cells[index + 1 :])


def _made(bench: Bench, cell: Cell, unscored: dict[str, AmpruneError]) -> CellResult:
    """Makes the model of a cell; `done` stands for made here."""
    start = time.perf_counter()
    if (error := unscored.get(cell.criterion or "")) is not None:
        return CellResult("n/a" if isinstance(error, UnsupportedModelError) else "failed", str(error))
    try:
        if cell.criterion is not None:
            plan_cell(bench, cell)
    except PlanError as error:
        return CellResult("n/a", str(error))
    try:
        make_model(bench, cell)
        calibration = own_calibration(bench, cell)
    except Exception as error:
        if (known := failure(error)) is None:
            raise
        impossible = cell.preset is not None and isinstance(known, PlanError | UnsupportedModelError)
        return CellResult("n/a" if impossible else "failed", str(known))
    seconds = round(time.perf_counter() - start, 1) if cell.is_pruned else None
    return CellResult("done", making_seconds=seconds, calibration=calibration)


def _measured(bench: Bench, cells: Sequence[Cell], made: Sequence[CellResult]) -> list[CellResult]:
    """Measures made cells, each with all others."""
    start = time.perf_counter()
    try:
        evaluation = measure_cells(bench, cells)
    except Exception as error:
        if (known := failure(error)) is None:
            raise
        return [CellResult("failed", str(known)) for _ in cells]
    seconds = round(time.perf_counter() - start, 1)
    return [
        replace(
            result,
            ratio=1 - evaluation.models[cell.name].parameters / bench.parameters,
            measuring_seconds=seconds,
            figures=figures_of(evaluation, cell),
        )
        for cell, result in zip(cells, made, strict=True)
    ]
