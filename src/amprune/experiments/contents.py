"""From the results of an experiment to what is shown: a section for each model, and how it was measured."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from amprune.evaluation.identity import names_of
from amprune.evaluation.records import Evaluation
from amprune.experiments import sections, timing
from amprune.experiments.cells import EVALUATION
from amprune.experiments.recipes import BEST, DENSE, Cell, Recipe
from amprune.experiments.results import ModelResults, Results
from amprune.experiments.settings import Settings
from amprune.experiments.tables import Shown
from amprune.report.drawing import colours_of
from amprune.report.page import Block, Contents, Section

_SECTIONS: Mapping[str, Callable[[Shown], list[Section]]] = {
    "table1": sections.table1,
    "table2": sections.table2,
    "table3": sections.table3,
    "figure1": sections.figure1,
    "speedup": timing.speedup,
    "epochs": sections.epochs,
    "cost": timing.cost,
}


def experiment_contents(
    recipe: Recipe, settings: Settings, cells: tuple[Cell, ...], results: Results, folder: Path
) -> Contents:
    """Puts the report of an experiment together, from its results and the evaluations in its folder."""
    several = len(results.models) > 1
    parts: list[Section] = []
    colours: dict[str, str] = {}
    devices: dict[str, None] = {}
    for found in results.models:
        file = folder / found.folder / EVALUATION
        evaluation = Evaluation.load(file) if file.is_file() else Evaluation()
        devices |= dict.fromkeys(record.device for record in evaluation.records.values())
        # Names of figures have letters, digits and hyphens alone.
        prefix = re.sub(r"[^\w-]+", "-", found.folder.lower()) + "-" if several else ""
        shown = Shown(recipe, settings, cells, found, evaluation, prefix)
        first, *others = _SECTIONS[recipe.name](shown)
        parts.append(replace(first, title=_name(found), blocks=(*first.blocks, *_missing(shown))))
        parts += [replace(part, title=f"{part.title}, {_name(found)}") if several else part for part in others]
        if recipe.together:
            colours |= colours_of(evaluation.models, DENSE)
    lines = [
        _amount(recipe, settings),
        _calibration(settings),
        _training(recipe, settings),
        *([f"Measured on {'; '.join(devices)}, dtype {settings.dtype}."] if devices else []),
        f"Versions: {', '.join(f'{name} {number}' for name, number in results.versions.items())}.",
        *map(_time, results.models),
    ]
    return Contents(
        title=f"{recipe.title}: {', '.join(map(_name, results.models))}",
        lead=recipe.about + (" A quick run: little was measured, as is said at the end." if settings.quick else ""),
        summaries={},
        sections=(*parts, Section("How it was measured", (tuple(lines),))),
        colours=colours,
        drawn_from="experiment.json and evaluation.json",
    )


def _name(found: ModelResults) -> str:
    return names_of([found.model])[0]


def _missing(shown: Shown) -> tuple[Block, ...]:
    """Says why cells have no figures."""
    words = {"n/a": "not possible with this model", "failed": "failed"}
    results = [(cell.name, shown.result(cell)) for cell in shown.cells]
    lines = [f"{name}: {words[r.state]}; {r.reason}" for name, r in results if r is not None and r.state in words]
    return ("Without figures:", tuple(lines)) if lines else ()


def _amount(recipe: Recipe, settings: Settings) -> str:
    parts = []
    if "perplexity" in recipe.measure:
        windows = "all windows" if settings.windows is None else f"the first {settings.windows} windows"
        text = ", ".join(map(_file_name, settings.texts)) or "WikiText-2 (test)"
        parts.append(f"perplexity on {windows} of {settings.sequence_length:,} tokens of {text}")
    if "zero_shot" in recipe.measure and settings.tasks:
        limit = "all questions" if settings.limit is None else f"the first {settings.limit} questions"
        parts.append(f"{limit} of each of {', '.join(settings.tasks)}, by acc_norm but for winogrande (acc)")
    if "latency" in recipe.measure:
        parts.append(f"times over {settings.latency[0].runs} runs, the models in turn")
    quick = "A quick run, whose errors are large: " if settings.quick else "Measured: "
    return f"{quick}{'; '.join(parts)}."


def _calibration(settings: Settings) -> str:
    """Says on what was scored, but for presets, of which their table says it."""
    if not set(settings.methods) - {BEST}:
        return f"The draw of the calibration samples and the training have the seed {settings.seed}."
    others = f" but {BEST}" if BEST in settings.methods else ""
    return (
        f"Scored once by each criterion on {settings.samples} samples of {_file_name(settings.calibration)}, seed "
        f"{settings.seed}, the same for all methods{others}; the random order and the training have the same seed."
    )


def _file_name(source: str) -> str:
    """Leaves out where a file lies: a report is passed on."""
    return source.replace("\\", "/").rpartition("/")[2]


def _training(recipe: Recipe, settings: Settings) -> str:
    recovery = settings.recovery
    if recovery is None:
        return "No model was trained after pruning."
    epochs = f"{recovery.epochs:g} epoch{'' if recovery.epochs == 1 else 's'}"
    amount = epochs if recovery.max_steps is None else f"{recovery.max_steps} steps"
    samples = "all samples" if settings.training_samples is None else f"{settings.training_samples} samples"
    which = "Models that are called trained were" if recipe.trains else "Every pruned model was"
    how = "full fine-tuning" if recovery.full else f"LoRA of rank {recovery.lora_rank}"
    others = "; models of other tools were left as they are" if settings.checkpoints else ""
    return (
        f"{which} trained the same way: {how}, {amount} on {samples} of {_file_name(settings.data)}, "
        f"learning rate {recovery.learning_rate:g}, {recovery.batch_size} x {recovery.gradient_accumulation} samples a "
        f"step, {recovery.max_length} tokens{others}."
    )


def _time(found: ModelResults) -> str:
    cells = found.cells.values()
    making = sum(cell.making_seconds or 0.0 for cell in cells)
    measuring = sum(cell.measuring_seconds or 0.0 for cell in cells)
    return (
        f"{_name(found)}: {_minutes(sum(found.scoring_seconds.values()))} for scores, {_minutes(making)} for making "
        f"models, {_minutes(measuring)} for measuring."
    )


def _minutes(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
