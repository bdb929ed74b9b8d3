"""What an experiment was asked for -> models and data, opened before anything is begun."""

from collections.abc import Sequence
from pathlib import Path

from amprune.errors import CalibrationError, EvaluationError, required
from amprune.evaluation.data import load_text, load_wikitext
from amprune.evaluation.identity import names_of
from amprune.evaluation.perplexity import check_windows
from amprune.evaluation.zero_shot import open_tasks
from amprune.experiments.cells import Bench, slug
from amprune.experiments.recipes import Recipe
from amprune.experiments.settings import Settings
from amprune.model.latency import check_positions
from amprune.model.reader import read_checkpoint
from amprune.model.source import open_source
from amprune.records import resolved
from amprune.running import Progress
from amprune.scoring.catalogue import CRITERIA
from amprune.settings import MEASURED_BY
from amprune.text.records import read_records


def open_benches(
    models: Sequence[str], folder: Path, recipe: Recipe, settings: Settings, *, progress: Progress
) -> tuple[Bench, ...]:
    """Opens every model and all data, so that nothing is begun for a request that cannot be met."""
    if not models:
        raise EvaluationError("no model is given; give --model one or more times, or a --config")
    folders = [slug(name) for name in names_of(models)]
    if twice := [name for name in folders if folders.count(name) > 1]:
        raise EvaluationError(f"two models would be kept in {folder / twice[0]}; run the experiment for each alone")
    if settings.checkpoints and len(models) > 1:
        raise EvaluationError("a --checkpoint is compared with one --model; run the experiment for each model alone")
    measure = tuple(m for m in recipe.measure if m != "zero_shot" or settings.tasks)
    if not measure:
        raise EvaluationError("there is nothing to measure; give one task or more")
    required(f"the experiment {recipe.name}", *(library for kind in measure for library in MEASURED_BY.get(kind, ())))
    _check_data(settings, measure)
    benches = []
    for model, name in zip(models, folders, strict=True):
        source = open_source(model, dtype=settings.dtype)
        for place in (resolved(path) for path in source.protected):
            if resolved(folder) == place or place in resolved(folder).parents:
                raise EvaluationError(f"the experiment cannot be written into the model {place}; choose another folder")
        dense = read_checkpoint(source.folder)
        if "perplexity" in measure:
            check_windows(dense.positions, settings.sequence_length, settings.windows)
        for case in settings.latency if {"latency", "energy"} & set(measure) else ():
            case.check()
            check_positions(model, dense.positions, case)
        size, mark = dense.shape.parameters, dense.fingerprint
        benches.append(Bench(model, size, mark, folder / name, settings, measure, progress))
    return tuple(benches)


def _check_data(settings: Settings, measure: Sequence[str]) -> None:
    folder = None if settings.data_dir is None else Path(settings.data_dir)
    for checkpoint in settings.checkpoints:
        open_source(checkpoint.split("=", 1)[-1])
    if "zero_shot" in measure:
        open_tasks(settings.tasks, data_dir=folder)
    if "perplexity" in measure and not settings.texts:
        load_wikitext("test", data_dir=folder)
    for text in settings.texts:
        load_text(Path(text))
    if any(name in CRITERIA and CRITERIA[name].calibrated for name in settings.methods):
        _check_samples(settings.calibration, settings.samples, "calibration", "samples")
    if settings.recovery is not None:
        _check_samples(settings.data, settings.training_samples or 1, "data", "training-samples")


def _check_samples(source: str, wanted: int, option: str, counted: str) -> None:
    name, records = read_records(source, option=f"--{option}")
    if len(records) < wanted:
        raise CalibrationError(
            f"{name} holds {len(records)} samples, {wanted} were asked for; give a larger set or a smaller --{counted}"
        )
