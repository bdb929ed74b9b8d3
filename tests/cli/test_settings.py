"""Options stand once: recipes, presets and Python's keywords are made of the same fields."""

import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import amprune.settings
from amprune.errors import PlanError, RecipeError
from amprune.settings import (
    PRESETS,
    EvaluationSettings,
    ExperimentSettings,
    PruneSettings,
    RecoverySettings,
    RunSettings,
    ScoreSettings,
    part,
    read_recipe,
    settle,
    with_preset,
    write_recipe,
)

ROOT = Path(__file__).parents[2]
KINDS = [kind for name, kind in vars(amprune.settings).items() if name.endswith("Settings") and name[0] != "_"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_option_says_what_it_is_for_in_a_sentence(kind: type) -> None:
    for one in fields(kind):
        assert one.metadata["help"].endswith("."), one.name


@pytest.mark.parametrize(
    "settings",
    [
        PruneSettings(ratio=0.2, tokens=4096, neuron_multiple="hardware", only="heads", max_shard_size="1GB"),
        RecoverySettings(data="builtin", learning_rate=1e-4, max_steps=3, teacher="smollm2-135m", full=True),
        EvaluationSettings(measure=("latency",), latency_batch=(1, 8), texts=("a.txt", "b,c.txt"), tasks=()),
        RunSettings(ratio=0.3, recover=True, training_samples=5, samples=8, measure=("perplexity",), limit=4),
        ExperimentSettings(ratios=(0.1, 0.2), methods=("amp", "best"), quick=True),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_a_recipe_is_read_as_it_was_written(settings: Any, tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.yaml", "any", settings)
    assert read_recipe(type(settings), tmp_path / "recipe.yaml") == settings
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert "overwrite" not in text
    assert text.startswith("# The same again: amprune any --recipe")


def test_what_only_python_can_give_is_noted_in_a_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.yaml", "prune", PruneSettings(calibration=object(), ratio=0.2))
    assert read_recipe(PruneSettings, tmp_path / "recipe.yaml") == PruneSettings(ratio=0.2)
    assert "# calibration was given in Python, as object" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        (EvaluationSettings, "latency_batch: 8", "latency_batch is 8, expected a list"),
        (EvaluationSettings, "latency_batch: [1, b]", 'latency_batch: entry 1 is "b", expected a whole number'),
        (EvaluationSettings, "measure: [latencies]", 'measure: entry 0 is "latencies", expected "perplexity" or'),
        (PruneSettings, "neuron_multiple: wide", 'neuron_multiple is "wide", expected a whole number or "hardware" or'),
        (PruneSettings, "calibration: 3", "calibration is 3, expected text or a list of texts"),
        (RecoverySettings, "learning_rate: .inf", "learning_rate is Infinity, expected a number"),
        (RecoverySettings, "resume: true", "unknown option 'resume'"),
        (RunSettings, "trainig_samples: 3", "did you mean training_samples?"),
    ],
)
def test_values_of_another_type_are_refused(kind: type, text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(kind, tmp_path / "recipe.yaml")
    assert problem in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))


def test_python_s_keywords_are_checked() -> None:
    assert settle(PruneSettings, PruneSettings(ratio=0.1, seed=3), {"ratio": 0.2}) == PruneSettings(ratio=0.2, seed=3)
    with pytest.raises(TypeError, match="no option 'ration'; did you mean ratio"):
        settle(PruneSettings, None, {"ration": 0.2})
    with pytest.raises(TypeError, match="ScoreSettings, expected PruneSettings"):
        settle(PruneSettings, ScoreSettings(), {})  # type: ignore[arg-type]


def test_a_preset_settles_what_was_not_given() -> None:
    best = with_preset(PruneSettings(ratio=0.2))
    assert {name: getattr(best, name) for name in vars(PRESETS["best"].pruning)} == vars(PRESETS["best"].pruning)
    trained = with_preset(RecoverySettings())
    settled = vars(PRESETS["best"].training)
    assert {name: getattr(trained, name) for name in settled} == settled
    assert with_preset(RecoverySettings(preset="paper")).data == "alpaca"
    by_hand = with_preset(RecoverySettings(gradient_accumulation=3))
    assert (by_hand.gradient_accumulation, by_hand.batch_tokens) == (3, None)
    paper = with_preset(PruneSettings(ratio=0.2, preset="paper", tokens=100, reconstruct=True))
    assert (paper.samples, paper.tokens, paper.reconstruct, paper.allocate) == (None, 100, True, False)
    with pytest.raises(PlanError, match="unknown preset 'papper'; did you mean paper"):
        with_preset(PruneSettings(preset="papper"))


def test_run_takes_every_option_of_its_stages() -> None:
    names = {one.name for one in fields(RunSettings)}
    renamed = {
        "samples",
        "max_length",
        "batch_size",
        "tokens",
        "batch_tokens",
    }  # of the calibration; those of other stages have a prefix
    for kind in (PruneSettings, RecoverySettings, EvaluationSettings):
        assert {one.name for one in fields(kind)} <= names | renamed | {"resume"}
    assert {"training_samples", "training_max_length", "evaluation_batch_size", "samples", "max_length"} <= names
    asked = RunSettings(ratio=0.2, seed=7)
    assert part(PruneSettings, asked) == replace(PruneSettings(ratio=0.2), seed=7)


@pytest.mark.process
def test_a_new_option_takes_two_edits(tmp_path: Path) -> None:
    """Those of docs/options.md, made in a copy: the option is there everywhere, and does what it says."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    shutil.copytree(ROOT / "src" / "amprune", tmp_path / "amprune", ignore=shutil.ignore_patterns("__pycache__"))
    files = page[page.index("```diff") :].split("--- a/src/")[1:]
    assert len(files) == 2
    for text in files:
        file = tmp_path / text.splitlines()[0]
        lines = [line for line in text.split("```")[0].splitlines()[2:] if not line.startswith("@@")]
        before, after = ("\n".join(line[1:] for line in lines if line[0] in (" ", sign)) for sign in "-+")
        content = file.read_text(encoding="utf-8")
        assert content.count(before) == 1
        file.write_text(content.replace(before, after), encoding="utf-8")
    found = subprocess.run([sys.executable, "-c", TRIED], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["(0,", "2)", "(2,", "3)"]


TRIED = """
from typer.testing import CliRunner
from amprune.cli.options import app
from amprune.plan.make import _keep
from amprune.settings import PlanOptions, PruneSettings, RunSettings
for command in ("plan", "prune", "run"):
    assert "--last-of-equals" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output, command
PruneSettings(last_of_equals=True), RunSettings(last_of_equals=True)
scores = [1.0, 0.0, 2.0, 1.0]
print(_keep(scores, 2, PlanOptions(), None), _keep(scores, 2, PlanOptions(last_of_equals=True), None))
"""
