"""Every cell of an experiment once, in order; finished ones are kept. START HERE in this folder."""

import os
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
from amprune.experiments.settings import make_cells, make_settings
from amprune.experiments.tables import figures_of
from amprune.model.latency import LatencySettings
from amprune.report.write import ReportFiles, write_contents
from amprune.running import Progress, no_progress

PathLike = str | os.PathLike[str]


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
    *,
    config: PathLike | None = None,
    ratios: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
    checkpoints: Sequence[str] | None = None,
    calibration: PathLike | None = None,
    samples: int | None = None,
    seed: int | None = None,
    data_dir: PathLike | None = None,
    texts: Sequence[PathLike] | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    windows: int | None = None,
    sequence_length: int | None = None,
    recover: bool | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    gradient_accumulation: int | None = None,
    data: PathLike | None = None,
    training_samples: int | None = None,
    latency: Sequence[LatencySettings] | None = None,
    energy_seconds: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quick: bool = False,
    keep: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ExperimentFiles:
    """Runs one of the paper's experiments on models, and draws its tables and figures.

    Each criterion scores a model once; `best` is made by `prune`. A pruned model is removed when it is measured. What
    is finished is kept: the same call goes on where it was interrupted, and tries again what failed. None takes the
    default: of `quick`, of the configuration, of the experiment, in this order.

    Args:
        name: table1, table2, table3, figure1, speedup, epochs or cost.
        models: a Hugging Face folder, a `.gguf` file, an alias or a hub id each; in place of the configuration's.
        output: the folder to write.
        config: settings that ship, such as llama-2-7b, or a JSON file.
        ratios: shares of all parameters to remove.
        methods: of table1, figure1 and speedup; `best`, the preset, or any of `amprune.scoring.catalogue.CRITERIA`.
        checkpoints: of table1: NAME=PATH of models that other tools made, a row each.
        calibration: `alpaca`, `mixed`, `builtin` or a file, the same for all methods but `best`, which has its own.
        samples: of it; where given, the most that `best` draws of its own, too.
        seed: of the draw, the random order and the training.
        data_dir: holds `wikitext2/` and `tasks/`; None fetches from the hub.
        texts: files to take perplexity on instead of WikiText-2.
        tasks: of lm-evaluation-harness; an empty sequence for none.
        limit: only the first this many items of each task.
        windows: only the first this many windows.
        sequence_length: tokens a window of perplexity.
        recover: train every pruned model, all the same way.
        epochs: of the training.
        max_steps: of the training, in place of epochs.
        gradient_accumulation: forward passes an optimizer step.
        data: to train on: `alpaca`, `builtin` or a file.
        training_samples: of it; None for all.
        latency: cases to time.
        energy_seconds: how long each of five blocks of generating is, whose energy is measured.
        device: cpu, cuda, cuda:1; the default is cuda where there is one.
        dtype: of every computation; auto is that of the checkpoint.
        quick: few samples, questions, windows and runs; the result says so.
        keep: leave the pruned models on disk.
        overwrite: remove what another request of an experiment has written into `output`.
        progress: told how far it is.

    Raises:
        AmpruneError: the request makes no sense. A cell that fails raises nothing: it is recorded, and the rest goes
            on; see `ExperimentFiles.failed`.
    """
    given: dict[str, Any] = {
        "ratios": ratios, "methods": methods, "checkpoints": checkpoints, "calibration": _text(calibration),
        "samples": samples, "seed": seed, "data_dir": _absolute(data_dir), "tasks": tasks, "limit": limit,
        "texts": None if texts is None else [_absolute(text) for text in texts],
        "windows": windows, "sequence_length": sequence_length, "recover": recover, "epochs": epochs,
        "max_steps": max_steps, "gradient_accumulation": gradient_accumulation, "data": _text(data),
        "training_samples": training_samples, "latency": latency, "energy_seconds": energy_seconds, "device": device,
        "dtype": dtype,
    }  # fmt: skip
    recipe = find_recipe(name)
    configuration = None if config is None else load_configuration(str(config))
    settings = make_settings(
        recipe, given, configured=configuration.settings_of(name) if configuration else {}, quick=quick
    )
    cells, folder = make_cells(recipe, settings), Path(output).expanduser()
    benches = open_benches(models_of(models, configuration), folder, recipe, settings, progress=progress)
    with alone_in(folder):
        results = begin(folder, recipe, settings, benches, overwrite=overwrite)
        for bench, found in zip(benches, results.models, strict=True):
            _run_model(bench, cells, found, results, together=recipe.together, keep=keep)
        contents = experiment_contents(recipe, settings, cells, results)
        return ExperimentFiles(results.path, write_contents(folder, contents), results)


def _text(value: PathLike | None) -> str | None:
    return None if value is None else str(value)


def _absolute(place: PathLike | None) -> str | None:
    return None if place is None else str(Path(place).expanduser().resolve())


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
