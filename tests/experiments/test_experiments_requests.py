"""What an experiment may be asked for, and what is refused before anything is written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny_evaluation import text_file
from tiny_experiments import dense_model, invoke, left, settings, states

from amprune.errors import AmpruneError, CheckpointError, EvaluationError, PlanError, ScoresError
from amprune.experiments.recipes import RECIPES
from amprune.experiments.results import FORMAT
from amprune.experiments.run import experiment
from amprune.experiments.settings import Settings, load_configuration, make_settings
from amprune.settings import Training, with_preset


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def dense(place: Path) -> Path:
    return dense_model(place / "dense")


# What is refused, before anything is written


@pytest.fixture
def nothing_written(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("tabel1", {}, EvaluationError, "did you mean table1"),
        ("table1", {"methods": ["tailor"]}, ScoresError, "did you mean taylor"),
        ("figure1", {"methods": ["amp", "bets"]}, ScoresError, "did you mean best.*The methods are best, amp, amp-l2"),
        ("table1", {"config": "llama2-7b"}, EvaluationError, "did you mean llama-2-7b"),
        ("table2", {"config": "phi-2"}, EvaluationError, "only for table1"),
        ("table1", {"ratios": [1.2]}, PlanError, "between 0 and 1"),
        ("table1", {"ratios": [0.2, 0.2]}, EvaluationError, "called 'best 20 %'"),
        ("table1", {"tasks": ["winogrande"], "data_dir": "/no/where"}, EvaluationError, "winogrande"),
        ("table1", {"texts": ["/no/text.txt"]}, EvaluationError, "cannot read"),
        ("table1", {"samples": 5000}, AmpruneError, "160 samples, 5000 were asked for"),
        ("table1", {"recover": True, "data": "/no/data.jsonl"}, AmpruneError, "data"),
        ("table1", {"sequence_length": 4096}, EvaluationError, "positions"),
        ("speedup", {"recover": True}, EvaluationError, "leave out --recover"),
        ("epochs", {"recover": False}, EvaluationError, "leave out --no-recover"),
        ("epochs", {"max_steps": 3}, EvaluationError, "no --max-steps"),
        ("table2", {"methods": ["flap"]}, EvaluationError, "--method belongs to table1, figure1 and speedup"),
        ("figure1", {"limit": 0}, EvaluationError, "--limit is 0"),
        ("figure1", {"windows": -1}, EvaluationError, "--windows is -1"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    name: str, changes: dict[str, Any], error: type[Exception], message: str, dense: Path, place: Path,
    nothing_written: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        experiment(name, dense, nothing_written, **settings(place, **changes))


def test_a_model_is_needed_and_is_never_written_into(dense: Path, place: Path, nothing_written: Path) -> None:
    with pytest.raises(EvaluationError, match="no model is given"):
        experiment("table1", (), nothing_written, **settings(place))
    with pytest.raises(CheckpointError):
        experiment("table1", "no-such-model", nothing_written, **settings(place))
    before = left(dense)
    for out in (dense, dense / "out"):
        with pytest.raises(EvaluationError, match="cannot be written into the model"):
            experiment("table1", dense, out, **settings(place))
    assert left(dense) == before


def test_the_command_line_says_what_is_wrong(dense: Path, place: Path, nothing_written: Path) -> None:
    code, _, errors = invoke("tabl1", "--model", dense, "-o", nothing_written)
    assert (code, "did you mean table1?" in errors) == (1, True)
    code, _, errors = invoke("table1", "--model", dense, "-o", nothing_written, "--ratio", "20%")
    assert (code, "expected shares such as 0.2" in errors) == (1, True)
    code, _, errors = invoke("speedup", "--model", dense, "-o", nothing_written, "--latency-batch", "one")
    assert (code, "expected whole numbers" in errors) == (1, True)


def test_another_request_is_refused_unless_it_may_overwrite(dense: Path, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    experiment("table1", dense, out, **settings(place, methods=["amp"]))
    notes = [out / "notes.txt", out / "figures" / "mine.png", out / "dense" / "mine.txt"]
    for note in notes:
        note.write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for name, changes, words in (
        ("table1", {"methods": ["amp"], "ratios": [0.3]}, "another ratios"),
        ("table1", {"methods": ["amp"], "samples": 4}, "another samples"),
        ("table3", {}, "for table1"),
    ):
        with pytest.raises(EvaluationError, match=words):
            experiment(name, dense, out, **settings(place, **changes))
    text_file(tmp_path / "text.txt", 7)
    with pytest.raises(EvaluationError, match="sha256"):
        experiment("table1", dense, out, **settings(tmp_path, methods=["amp"]))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    files = experiment("table1", dense, out, overwrite=True, **settings(place, methods=["random"]))
    assert states(files) == {"dense": "done", "random 20 %": "done"}
    assert left(out / "dense" / "scores") == {"random.safetensors"}
    assert [note.read_text() for note in notes] == ["mine"] * 3


def test_a_folder_of_something_else_is_left_alone(dense: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(EvaluationError, match=r"holds precious\.txt and no experiment\.json"):
        experiment("table1", dense, tmp_path, overwrite=True, **settings(place))
    assert left(tmp_path) == {"precious.txt"}
    model = {"model": "m", "folder": "../precious", "scoring_seconds": {}, "cells": {}}
    outside = {"format": FORMAT, "experiment": "table1", "request": {}, "versions": {}, "models": [model]}
    for text in ("{}", "nonsense", json.dumps(outside)):
        (tmp_path / "experiment.json").write_text(text)
        with pytest.raises(EvaluationError, match="damaged"):
            experiment("table1", dense, tmp_path, overwrite=True, **settings(place))
        assert (tmp_path / "experiment.json").read_text() == text


def test_one_run_at_a_time(dense: Path, place: Path, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".experiment.lock"),
        pytest.raises(EvaluationError, match="is being written by another run"),
    ):
        experiment("table1", dense, tmp_path, **settings(place))


def test_a_changed_model_is_another_request(place: Path, tmp_path: Path) -> None:
    model = dense_model(tmp_path / "model")
    experiment("table1", model, tmp_path / "out", **settings(place, methods=["random"]))
    shutil.rmtree(model)
    dense_model(model, rms_norm_eps=1e-3, intermediate_size=96)
    with pytest.raises(EvaluationError, match="was asked for with another"):
        experiment("table1", model, tmp_path / "out", **settings(place, methods=["random"]))


# Settings: what is given counts before --quick, that before a configuration, that before the recipe's own


def made(name: str, *, quick: bool = False, config: str | None = None, **given: Any) -> Settings:
    configured = load_configuration(config).settings_of(name) if config else {}
    return make_settings(RECIPES[name], given, configured=configured, quick=quick)


def test_defaults_are_those_of_the_recipe() -> None:
    table1, figure1, epochs = made("table1"), made("figure1"), made("epochs")
    assert table1.ratios == (0.2,)
    assert table1.recovery is None
    assert table1.methods[:3] == ("best", "amp", "amp-l2")
    assert figure1.methods == made("figure1", quick=True).methods == ("best", "amp")
    assert made("table2").methods == made("table3").methods == ("amp",)
    assert "reversed" not in table1.methods
    assert (table1.samples, table1.limit, table1.windows, table1.calibration) == (50, None, None, "alpaca")
    assert figure1.ratios == (0.0901, 0.2102, 0.3003, 0.4002, 0.5106)
    assert figure1.recovery == with_preset(Training(preset="paper"))
    assert epochs.recovery == with_preset(Training(preset="paper", epochs=4.0))
    assert made("figure1", recover=False).recovery is None
    assert {(case.mode, case.batch_size) for case in made("speedup").latency} == {
        ("eager", 1), ("eager", 8), ("compile", 1), ("compile", 8)
    }  # fmt: skip


def test_quick_gives_way_to_what_is_given() -> None:
    quick, mixed = made("table1", quick=True), made("table1", quick=True, limit=100, recover=True)
    assert (quick.limit, quick.windows, quick.quick) == (40, 8, True)
    assert (mixed.limit, mixed.windows) == (100, 8)
    assert mixed.training_samples == 64
    assert mixed.recovery is not None
    assert mixed.recovery.gradient_accumulation == 4
    given = made("figure1", quick=True, config="llama-2-7b", gradient_accumulation=2)
    assert given.recovery is not None
    assert given.recovery.gradient_accumulation == 2
    small = made("figure1", quick=True, config="llama-2-7b")
    assert small.recovery is not None
    assert small.recovery.gradient_accumulation == 4


def test_best_draws_as_its_preset_says_unless_bounded() -> None:
    """A configuration, such as the paper's, speaks of the set that all others share."""
    assert made("table1").preset_samples is None
    assert made("table1", quick=True).preset_samples == 20
    assert made("table1", quick=True, samples=7).preset_samples == 7
    assert made("table1", config="llama-2-7b", methods=["best", "amp"]).preset_samples is None
    assert made("table1", samples=7, methods=["amp"]).preset_samples is None


def test_what_decides_no_figure_is_no_part_of_the_request() -> None:
    assert made("table1", energy_seconds=3.0, data="x") == made("table1")
    assert made("table1", limit=3) != made("table1")
    assert made("speedup", limit=3, texts=["a"]) == made("speedup")


def test_options_of_the_command_line_reach_the_experiment(place: Path, dense: Path, tmp_path: Path) -> None:
    code, output, errors = invoke(
        "speedup", "--model", dense, "-o", tmp_path / "out", "--quick", "--ratio", "0.1,0.2", "--ratio", "0.3",
        "--method", "random", "--latency-batch", "2", "--new-tokens", 3, "--warmup", 0, "--runs", 1, "--mode", "eager",
        "--device", "cpu", "--keep", "--json",
    )  # fmt: skip
    assert code == 0, errors
    asked = json.loads(output)["request"]["settings"]
    assert asked["ratios"] == [0.1, 0.2, 0.3]
    assert asked["methods"] == ["random"]
    assert [(case["batch_size"], case["new_tokens"], case["runs"]) for case in asked["latency"]] == [(2, 3, 1)]
    assert "A quick run" in (tmp_path / "out" / "report.md").read_text()
    assert len(left(tmp_path / "out" / "dense" / "models")) == 3
