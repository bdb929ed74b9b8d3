"""Everything that decides an experiment's figures, beside the models; and settings that ship, as JSON files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from amprune.errors import EvaluationError, PlanError, ScoresError, guess
from amprune.experiments.recipes import BEST, DENSE, RECIPES, Cell, Recipe
from amprune.model.latency import LatencySettings
from amprune.records import Rule, parse, read_object, resolved
from amprune.recovery.training import check_training
from amprune.scoring.catalogue import CRITERIA
from amprune.settings import TASKS, EvaluationSettings, ExperimentSettings, Training, with_preset

_QUICK: Mapping[str, Any] = {"samples": 20, "limit": 40, "windows": 8, "training_samples": 64, "energy_seconds": 2.0}
_QUICK_TRAINING: Mapping[str, Any] = {"gradient_accumulation": 4}
_QUICK_LATENCY: Mapping[str, Any] = {"new_tokens": 32, "warmup": 2, "runs": 5}
_OF_THE_RUN = ("config", "quick", "keep", "overwrite")
_CASES = ("latency_batch", "prompt_tokens", "mode", "new_tokens", "warmup", "runs")
_TRAINING = ("epochs", "max_steps", "gradient_accumulation")
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
        places = (Path(place).expanduser() for place in (self.calibration, self.data, *self.texts))
        digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in places if file.is_file()}
        return {**asdict(self), "sha256": digests}


_UNUSED_WITHOUT: Mapping[str, tuple[str, ...]] = {
    "perplexity": ("texts", "windows", "sequence_length"),
    "zero_shot": ("tasks", "limit"),
    "latency": ("latency",),
    "energy": ("energy_seconds",),
}


def given_of(asked: ExperimentSettings, latency: Sequence[LatencySettings] | None) -> dict[str, Any]:
    """Returns the options that were given, with paths that hold from anywhere."""
    given = {name: value for name, value in vars(asked).items() if name not in _OF_THE_RUN and value is not None}
    if latency is not None:
        given["latency"] = tuple(latency)
    given |= {name: str(given[name]) for name in ("calibration", "data") if name in given}
    if "data_dir" in given:
        given["data_dir"] = str(resolved(Path(given["data_dir"]).expanduser()))
    if "texts" in given:
        given["texts"] = [str(resolved(Path(text).expanduser())) for text in given["texts"]]
    return given


def make_settings(recipe: Recipe, given: Mapping[str, Any], *, configured: Mapping[str, Any], quick: bool) -> Settings:
    """Puts settings together: what is given counts before what --quick shrinks, that before a configuration.

    `given` holds options of the experiment, `configured` the same of a configuration and, under `recovery`, fields of
    `Training`; the defaults of the recipe count last.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    merged = {"ratios": recipe.ratios, "methods": recipe.methods, **configured, **(_QUICK if quick else {}), **chosen}
    training = {**merged.pop("recovery", {}), **(_QUICK_TRAINING if quick else {})}
    training |= {name: merged.pop(name) for name in _TRAINING if name in merged}
    cases = {**(_QUICK_LATENCY if quick else {}), **{name: merged.pop(name) for name in _CASES if name in merged}}
    recover = merged.pop("recover", recipe.trains)
    if BEST in merged["methods"]:  # a configuration speaks of the set that all others share
        merged["preset_samples"] = chosen.get("samples", _QUICK["samples"] if quick else None)
    values: dict[str, Any] = {"latency": _latency_cases(recipe, **cases), **merged}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    settings = Settings(**values, quick=quick)
    if recover:
        found = with_preset(Training(**{"preset": "paper", "epochs": recipe.epochs, "seed": settings.seed, **training}))
        check_training(found)
        if recipe.name == "epochs" and (found.max_steps is not None or not float(found.epochs or 0).is_integer()):
            raise EvaluationError(
                "the experiment epochs measures after every epoch; give whole --epochs and no --max-steps"
            )
        settings = replace(settings, recovery=found)
    _check(recipe, settings)
    # What decides none of the experiment's figures is left out: another value of it is no other request.
    unused = [name for kind, names in _UNUSED_WITHOUT.items() if kind not in recipe.measure for name in names]
    unused += ["data", "training_samples"] if settings.recovery is None else []
    plain = Settings(settings.ratios, settings.methods)
    return replace(settings, **{name: getattr(plain, name) for name in unused})


def _latency_cases(
    recipe: Recipe, *, latency_batch: Sequence[int] = (), prompt_tokens: Sequence[int] = (), mode: Sequence[str] = (),
    **common: int,
) -> tuple[LatencySettings, ...]:  # fmt: skip
    """Returns the cases that an experiment times; where none are given, `speedup` has two batch sizes and two modes."""
    many = recipe.name == "speedup"
    return tuple(
        LatencySettings(batch_size=batch, prompt_tokens=prompt, mode=one, **common)  # type: ignore[arg-type]
        for one in mode or (("eager", "compile") if many else ("eager",))
        for batch in latency_batch or ((1, 8) if many else (1,))
        for prompt in prompt_tokens or (LatencySettings().prompt_tokens,)
    )


def _check(recipe: Recipe, settings: Settings) -> None:
    known = (BEST, *CRITERIA)
    for name in settings.methods:
        if name not in known:
            raise ScoresError(f"unknown method {name!r}; {guess(name, known)}The methods are {', '.join(known)}")
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
    """Returns the models of an experiment, the dense one first."""
    cells = (Cell(DENSE, DENSE), *recipe.cells(settings))
    names = [cell.name for cell in cells]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"two models of the experiment are called {twice[0]!r}; give each ratio and name once")
    return cells


# Configurations: settings as JSON files. Those of the paper ship, others are a user's own.

_FORMAT = "amprune configuration 1"
_SHIPPED = Path(__file__).with_name("configurations")
_OTHERS = ("recovery", "quick", "latency", "checkpoints", "preset_samples")
_SETTINGS = ("recover", *_TRAINING, *(one.name for one in fields(Settings) if one.name not in _OTHERS))
_REMEDY = "see the configurations that ship"


@dataclass(frozen=True)
class Configuration:
    """Which model, and with which settings each experiment is run on it."""

    model: Annotated[str, Rule("a folder or a hub id")]
    experiments: Mapping[str, Mapping[str, Any]]
    """By name, what replaces some of `settings`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Training`."""
    name: str = ""
    about: str = ""

    def settings_of(self, experiment: str) -> dict[str, Any]:
        """Returns the settings of one experiment; `recovery` holds how is trained."""
        if experiment not in self.experiments:
            there = ", ".join(self.experiments)
            raise EvaluationError(
                f"the configuration {self.name} is not for {experiment}, only for {there}; give --model in its place"
            )
        return {**self.settings, **self.experiments[experiment], "recovery": self.recovery}


def shipped() -> tuple[str, ...]:
    """Returns the names of the configurations that ship."""
    return tuple(sorted(file.stem for file in _SHIPPED.glob("*.json")))


def load_configuration(name: str) -> Configuration:
    """Reads a configuration that ships, by its name, or a JSON file."""
    file = _SHIPPED / f"{name}.json" if name in shipped() else Path(name).expanduser()
    if not file.is_file():
        raise EvaluationError(
            f"no configuration {name!r}; {guess(name, shipped())}There are {', '.join(shipped())}, or give a JSON file "
            "of your own"
        )
    content = read_object(file, error=EvaluationError, hint=f"; {_REMEDY}")
    _check_names(name, content, ("format", *(one.name for one in fields(Configuration) if one.name != "name")))
    content["name"] = str(name)
    found = parse(Configuration, content, where=str(name), error=EvaluationError, remedy=_REMEDY, format=_FORMAT)
    _check_names(f"recovery of {name}", found.recovery, [one.name for one in fields(Training)])
    _check_names(f"experiments of {name}", found.experiments, list(RECIPES))
    for experiment, own in found.experiments.items():
        _check_names(f"{experiment} of {name}", {**found.settings, **own}, _SETTINGS)
    return found


def _check_names(where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise EvaluationError(f"{where} has an entry {key!r}; {guess(key, known)}Known are {', '.join(known)}")
