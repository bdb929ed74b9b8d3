"""What tests of experiments run on: tiny models with a tokenizer, a short text, settings that take no time."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks  # noqa: F401
import pytest
from tiny_evaluation import text_file
from tiny_models import find, make_model
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from amprune.cli.options import app
from amprune.experiments import cells
from amprune.experiments.run import ExperimentFiles
from amprune.model.latency import LatencySettings

TRAINING: dict[str, Any] = {
    "data": "builtin", "training_samples": 12, "gradient_accumulation": 4, "epochs": 1.0,
}  # fmt: skip


def dense_model(folder: Path, identifier: str = "llama-mha", **entries: Any) -> Path:
    """Saves a variant of eight layers, so that blocks can be removed, with as many positions as texts have tokens."""
    tiny = find(identifier)
    sizes = {"num_hidden_layers": 8, "max_position_embeddings": 512}
    model = make_model(replace(tiny, entries={**tiny.entries, **sizes, **entries}))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    """Returns arguments of `experiment` that take no time: a text of its own, no tasks, few samples and runs."""
    text = place / "text.txt"
    if not text.is_file():
        text_file(text, 6)
    return {
        "texts": [text],
        "tasks": (),
        "sequence_length": 32,
        "calibration": "builtin",
        "samples": 3,
        "latency": [LatencySettings(new_tokens=3, warmup=0, runs=2)],
        "energy_seconds": 0.05,
        "device": "cpu",
        **changes,
    }


def states(files: ExperimentFiles) -> dict[str, str]:
    """Returns what became of each cell."""
    return {name: cell.state for found in files.results.models for name, cell in found.cells.items()}


def figures(files: ExperimentFiles) -> dict[str, Any]:
    """Returns the figures of each cell."""
    return {name: cell.figures for found in files.results.models for name, cell in found.cells.items()}


def left(folder: Path) -> set[str]:
    """Returns the names in a folder."""
    return {path.name for path in folder.iterdir()}


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Runs the command; returns its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, ["experiment", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def options(place: Path) -> list[object]:
    """Returns `settings` as options of the command."""
    settings(place)
    return [
        "--text", place / "text.txt", "--tasks", "", "--sequence-length", 32, "--calibration", "builtin",
        "--samples", 3, "--device", "cpu",
    ]  # fmt: skip


def failing(word: str, error: BaseException) -> Callable[..., Any]:
    """Returns an `apply_plan` that fails for folders with a word in their name."""
    own = cells.apply_plan

    def fail(model: Any, plan: Any, out: Path, **options: Any) -> Any:
        if word in out.name:
            raise error
        return own(model, plan, out, **options)

    return fail


def count(patch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that tells what is scored, made, trained and measured from now on, in order."""
    found: list[str] = []

    def counted(name: str, word: Callable[..., str]) -> None:
        own = getattr(cells, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found.append(f"{name} {word(*arguments)}")
            return own(*arguments, **options)

        patch.setattr(cells, name, call)

    counted("score_criteria", lambda _, criteria, *__: ",".join(one.name for one in criteria))
    counted("apply_plan", lambda model, plan, out: out.name)
    counted("prune", lambda model, out: out.name)
    counted("recover", lambda model, out, *_: out.name)
    counted("evaluate", lambda models, output: ",".join(re.sub("=.*", "", model) for model in models))
    return found
