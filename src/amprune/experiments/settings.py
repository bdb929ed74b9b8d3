"""Everything that decides an experiment's figures, beside the models."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from amprune.errors import EvaluationError, PlanError
from amprune.experiments.recipes import BEST, Cell, Choices, Recipe, check_method
from amprune.model.latency import LatencySettings
from amprune.recovery.training import check_training
from amprune.settings import TASKS, EvaluationSettings, ExperimentSettings, PathLike, Training

_QUICK: Mapping[str, Any] = {"samples": 20, "limit": 40, "windows": 8, "training_samples": 64, "energy_seconds": 2.0}
_QUICK_TRAINING: Mapping[str, Any] = {"gradient_accumulation": 4}
_QUICK_LATENCY: Mapping[str, Any] = {"new_tokens": 32, "warmup": 2, "runs": 5}
_OF_THE_RUN = ("config", "quick", "keep", "overwrite")
_CASES = ("latency_batch", "prompt_tokens", "mode", "new_tokens", "warmup", "runs")
TRAINING = ("epochs", "max_steps", "gradient_accumulation")
"""Fields of `Training` that may be given one by one."""


@dataclass(frozen=True)
class Settings:
    """What an experiment was asked for."""

    ratios: tuple[float, ...]
    methods: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()
    """NAME=PATH each."""
    calibration: str = "alpaca"
    samples: int = 50
    preset_samples: int | None = None
    """The most that `best` draws of its own set; None: as many as the preset says."""
    seed: int = 0
    """Of the calibration draw, the random order and the training."""
    data_dir: str | None = None
    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS
    limit: int | None = None
    windows: int | None = None
    sequence_length: int = EvaluationSettings.sequence_length
    recovery: Training | None = None
    data: str = "alpaca"
    training_samples: int | None = None
    latency: tuple[LatencySettings, ...] = (LatencySettings(),)
    energy_seconds: float = 10.0
    device: str | None = None
    dtype: str = "auto"
    quick: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns what `experiment.json` keeps, with a hash of every file that data are read from."""
        found = asdict(self)
        places = (Path(place).expanduser() for place in (self.calibration, self.data, *self.texts))
        digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in places if file.is_file()}
        return {**found, "sha256": digests}


def given_of(asked: ExperimentSettings, recipe: Recipe, latency: Sequence[LatencySettings] | None) -> dict[str, Any]:
    """Returns the options that were given, by the names of `make_settings`, with paths that hold from anywhere."""
    given = {name: value for name, value in vars(asked).items() if name not in _OF_THE_RUN and value is not None}
    cases = {name: given.pop(name) for name in _CASES if name in given}
    if latency is not None:
        given["latency"] = tuple(latency)
    elif cases:
        given["latency"] = latency_cases(
            recipe, quick=asked.quick, batches=cases.pop("latency_batch", None),
            prompts=cases.pop("prompt_tokens", None), modes=cases.pop("mode", None), **cases,
        )  # fmt: skip
    for name in ("calibration", "data"):
        if name in given:
            given[name] = str(given[name])
    if "data_dir" in given:
        given["data_dir"] = _absolute(given["data_dir"])
    if "texts" in given:
        given["texts"] = [_absolute(text) for text in given["texts"]]
    return given


def _absolute(place: PathLike) -> str:
    return str(Path(place).expanduser().resolve())


def make_settings(recipe: Recipe, given: Mapping[str, Any], *, configured: Mapping[str, Any], quick: bool) -> Settings:
    """Puts settings together: what is given counts before what --quick shrinks, that before a configuration.

    Args:
        recipe: whose defaults count last.
        given: fields of `Settings`, and `recover`, `epochs`, `max_steps`, `gradient_accumulation`; None is not given.
        configured: the same of a configuration, and `recovery`, fields of `Training`.
        quick: fewer questions, windows, samples and runs.

    Raises:
        EvaluationError: a value makes no sense, or is none of the experiment's.
        ScoresError: a method is unknown.
        PlanError: a ratio is none.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    merged = {"ratios": recipe.ratios, "methods": recipe.methods, **configured, **(_QUICK if quick else {}), **chosen}
    own = {name: merged.pop(name) for name in TRAINING if name in merged}
    training = {**merged.pop("recovery", {}), **(_QUICK_TRAINING if quick else {}), **own}
    recover = merged.pop("recover", recipe.trains)
    if BEST in merged["methods"]:  # a configuration speaks of the set that all others share
        merged["preset_samples"] = chosen.get("samples", _QUICK["samples"] if quick else None)
    settings = Settings(**{name: _frozen(value) for name, value in merged.items()}, quick=quick)
    if "latency" not in merged:
        settings = replace(settings, latency=latency_cases(recipe, quick=quick))
    if recover:
        settings = replace(settings, recovery=_recovery(recipe, training, settings))
    _check(recipe, settings)
    return _relevant(recipe, settings)


def _relevant(recipe: Recipe, settings: Settings) -> Settings:
    """Leaves out what decides none of the experiment's figures: another value of it is no other request."""
    unused = {
        "texts": "perplexity" not in recipe.measure,
        "windows": "perplexity" not in recipe.measure,
        "sequence_length": "perplexity" not in recipe.measure,
        "tasks": "zero_shot" not in recipe.measure,
        "limit": "zero_shot" not in recipe.measure,
        "latency": "latency" not in recipe.measure,
        "energy_seconds": "energy" not in recipe.measure,
        "data": settings.recovery is None,
        "training_samples": settings.recovery is None,
    }
    plain = Settings(settings.ratios, settings.methods)
    return replace(settings, **{name: getattr(plain, name) for name, out in unused.items() if out})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def latency_cases(
    recipe: Recipe,
    *,
    quick: bool,
    batches: Sequence[int] | None = None,
    prompts: Sequence[int] | None = None,
    modes: Sequence[str] | None = None,
    **others: int | None,
) -> tuple[LatencySettings, ...]:
    """Returns the cases that an experiment times; of speedup, two batch sizes, eager and compiled.

    Args:
        recipe: whose cases are taken where none are given.
        quick: fewer tokens and runs.
        batches: batch sizes.
        prompts: prompt lengths.
        modes: eager, compile.
        others: further fields of `LatencySettings`; None is not given.
    """
    many = recipe.name == "speedup"
    given = {name: value for name, value in others.items() if value is not None}
    common: dict[str, Any] = {**(_QUICK_LATENCY if quick else {}), **given}
    return tuple(
        LatencySettings(batch_size=batch, prompt_tokens=prompt, mode=mode, **common)  # type: ignore[arg-type]
        for mode in modes or (("eager", "compile") if many else ("eager",))
        for batch in batches or ((1, 8) if many else (1,))
        for prompt in prompts or (LatencySettings().prompt_tokens,)
    )


def _recovery(recipe: Recipe, training: Mapping[str, Any], settings: Settings) -> Training:
    found = Training(**{"epochs": recipe.epochs, "seed": settings.seed, **training})
    check_training(found)
    if recipe.name == "epochs" and (found.max_steps is not None or not float(found.epochs).is_integer()):
        raise EvaluationError(
            "the experiment epochs measures after every epoch; give whole --epochs and no --max-steps"
        )
    return found


def _check(recipe: Recipe, settings: Settings) -> None:
    for name in settings.methods:
        check_method(name)
    alone, trained = len(recipe.methods) == 1, settings.recovery is not None
    refused = {
        f"{recipe.name} is about amp alone; --method belongs to table1, figure1 and speedup": (
            alone and settings.methods != recipe.methods
        ),
        f"{recipe.name} has no row for a --checkpoint; table1 has": settings.checkpoints and not recipe.checkpoints,
        "speedup measures time, which training does not change; leave out --recover": (
            trained and recipe.name == "speedup"
        ),
        "the experiment epochs trains; leave out --no-recover": not trained and recipe.name == "epochs",
        "no ratio or no method is given; give one or more, or leave the option out": (
            not settings.ratios or not (settings.methods or settings.checkpoints)
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise EvaluationError(message)
    for ratio in settings.ratios:
        if not 0 < ratio < 1:
            raise PlanError(f"the ratio is {ratio}, expected a share of all parameters between 0 and 1, such as 0.2")
    for name in ("samples", "limit", "windows", "training_samples"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise EvaluationError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")


def make_cells(recipe: Recipe, settings: Settings) -> tuple[Cell, ...]:
    """Returns the models of an experiment, the dense one first.

    Raises:
        EvaluationError: two of them have the same name.
    """
    training = settings.recovery
    epochs = int(training.epochs) if training is not None else 0
    choices = Choices(settings.ratios, settings.methods, settings.checkpoints, training is not None, epochs)
    cells = tuple(recipe.cells(choices))
    names = [cell.name for cell in cells]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"two models of the experiment are called {twice[0]!r}; give each ratio and name once")
    return cells
