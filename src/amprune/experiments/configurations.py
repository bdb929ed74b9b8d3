"""Settings of experiments as JSON files: those of the paper ship, others are a user's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from amprune.errors import EvaluationError, guess
from amprune.experiments.recipes import RECIPES
from amprune.experiments.settings import TRAINING, Settings
from amprune.records import Rule, parse, read_object
from amprune.settings import Training

FORMAT = "amprune configuration 1"
_SHIPPED = Path(__file__).with_name("configurations")
_OTHERS = ("recovery", "quick", "latency", "checkpoints", "preset_samples")
_SETTINGS = ("recover", *TRAINING, *(one.name for one in fields(Settings) if one.name not in _OTHERS))
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
    found = parse(Configuration, content, where=str(name), error=EvaluationError, remedy=_REMEDY, format=FORMAT)
    _check_names(f"recovery of {name}", found.recovery, [one.name for one in fields(Training)])
    _check_names(f"experiments of {name}", found.experiments, list(RECIPES))
    for experiment, own in found.experiments.items():
        _check_names(f"{experiment} of {name}", {**found.settings, **own}, _SETTINGS)
    return found


def _check_names(where: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise EvaluationError(f"{where} has an entry {key!r}; {guess(key, known)}Known are {', '.join(known)}")
