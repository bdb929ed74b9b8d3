"""Settings of experiments as JSON files: those of the paper ship, others are a user's own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from amprune.errors import EvaluationError, guess
from amprune.experiments.recipes import RECIPES
from amprune.experiments.settings import TRAINING, Settings
from amprune.settings import Training

FORMAT = "amprune configuration 1"
_KEYS = ("format", "about", "model", "settings", "recovery", "experiments")
_OTHERS = ("recovery", "quick", "latency", "checkpoints", "preset_samples")
_SETTINGS = ("recover", *TRAINING, *(field.name for field in fields(Settings) if field.name not in _OTHERS))


@dataclass(frozen=True)
class Configuration:
    """Which model, and with which settings each experiment is run on it."""

    name: str
    model: str
    experiments: dict[str, dict[str, Any]]
    """By name: the settings of all, of which its own replace some; `recovery` holds how is trained."""

    def settings_of(self, experiment: str) -> dict[str, Any]:
        """Returns the settings of one experiment.

        Raises:
            EvaluationError: it has none of that name.
        """
        if experiment not in self.experiments:
            there = ", ".join(self.experiments)
            raise EvaluationError(
                f"the configuration {self.name} is not for {experiment}, only for {there}; give --model in its place"
            )
        return self.experiments[experiment]


def shipped() -> tuple[str, ...]:
    """Returns the names of the configurations that ship."""
    folder = files("amprune.experiments") / "configurations"
    return tuple(sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")))


def load_configuration(name: str) -> Configuration:
    """Reads a configuration that ships, by its name, or a JSON file.

    Raises:
        EvaluationError: there is none of that name, or the file is no configuration.
    """
    if name in shipped():
        text = (files("amprune.experiments") / "configurations" / f"{name}.json").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"no configuration {name!r}; {guess(name, shipped())}There are {', '.join(shipped())}, or give a JSON "
                "file of your own"
            ) from error
    return _read(name, text)


def _read(name: str, text: str) -> Configuration:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"{name} is no configuration: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise EvaluationError(f"{name} is no configuration: its format is {found!r}, expected {FORMAT!r}")
    _check_names(name, content, _KEYS)
    common = _object(name, "settings", content.get("settings", {}))
    training = _object(name, "recovery", content.get("recovery", {}))
    _check_names(f"recovery of {name}", training, [field.name for field in fields(Training)])
    experiments = _object(name, "experiments", content.get("experiments"))
    _check_names(f"experiments of {name}", experiments, list(RECIPES))
    found = {}
    for experiment, own in experiments.items():
        _check_names(f"{experiment} of {name}", {**common, **_object(name, experiment, own)}, _SETTINGS)
        found[experiment] = {**common, **own, "recovery": training}
    if not isinstance(content.get("model"), str):
        raise EvaluationError(f"{name}: model is {content.get('model')!r}, expected a folder or a hub id")
    return Configuration(name, content["model"], found)


def _object(name: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EvaluationError(f"{name}: {key} is {value!r}, expected an object")
    return value


def _check_names(where: str, content: dict[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise EvaluationError(f"{where} has an entry {key!r}; {guess(key, known)}Known are {', '.join(known)}")
