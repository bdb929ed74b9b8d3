"""What is finished is kept: experiments that are interrupted, killed or repeated, and cells that fail."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_experiments import (
    TRAINING,
    count,
    dense_model,
    failing,
    figures,
    invoke,
    left,
    options,
    settings,
    states,
)

from amprune.errors import CheckpointError, EvaluationError, ReconstructionError, ScoresError
from amprune.evaluation.records import Evaluation
from amprune.experiments import cells
from amprune.experiments.run import ExperimentFiles, experiment
from amprune.report.numbers import MISSING
from amprune.scoring.catalogue import Criterion


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def dense(place: Path) -> Path:
    return dense_model(place / "dense")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count(monkeypatch)


# Going on

ARGUMENTS: dict[str, Any] = {"methods": ["random", "amp"]}
RANDOM, AMP = "apply_plan random-amp-both-0.2", "apply_plan amp-amp-both-0.2"


@pytest.fixture(scope="module")
def undisturbed(dense: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentFiles:
    return experiment("table1", dense, tmp_path_factory.mktemp("out") / "out", **settings(place, **ARGUMENTS))


def test_a_second_run_gives_identical_numbers(
    undisturbed: ExperimentFiles, dense: Path, place: Path, tmp_path: Path
) -> None:
    files = experiment("table1", dense, tmp_path / "other", **settings(place, **ARGUMENTS))
    assert figures(files) == figures(undisturbed)
    before, after = (
        {key: (record.value, record.items) for key, record in Evaluation.load(file).records.items()}
        for file in (found.record.parent / "dense" / "evaluation.json" for found in (undisturbed, files))
    )
    assert before == after
    scores = [f"dense/scores/{name}.safetensors" for name in ARGUMENTS["methods"]]
    assert all((tmp_path / "other" / s).read_bytes() == (undisturbed.record.parent / s).read_bytes() for s in scores)


def test_a_finished_one_is_drawn_again_and_nothing_is_measured(
    undisturbed: ExperimentFiles, dense: Path, place: Path, calls: list[str]
) -> None:
    before = undisturbed.record.read_bytes()
    (undisturbed.record.parent / "report.md").unlink()
    files = experiment("table1", dense, undisturbed.record.parent, **settings(place, **ARGUMENTS))
    assert calls == []
    assert files.report.markdown.is_file()
    assert undisturbed.record.read_bytes() == before


@pytest.mark.parametrize("at", ["apply_plan", "evaluate"])
def test_it_goes_on_after_ctrl_c(
    at: str, undisturbed: ExperimentFiles, dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    calls: list[str],
) -> None:  # fmt: skip
    own = getattr(cells, at)

    def stop(first: Any, second: Any, *arguments: Any, **options: Any) -> Any:
        if "random" in f"{first} {arguments}":
            raise KeyboardInterrupt
        return own(first, second, *arguments, **options)

    out = tmp_path / "out"
    command = ["table1", "--model", dense, "-o", out, "--method", ",".join(ARGUMENTS["methods"]), *options(place)]
    with monkeypatch.context() as patch:
        patch.setattr(cells, at, stop)
        code, _, errors = invoke(*command)
    assert code == 130
    assert f"what was finished is in {out / 'experiment.json'}, the same command goes on from there" in errors
    done = json.loads((out / "experiment.json").read_text())["models"][0]["cells"]
    assert list(done) == ["dense"]
    calls.clear()
    code, _, errors = invoke(*command)
    assert code == 0, errors
    made = [RANDOM] if at == "apply_plan" else []  # else it was on disk
    assert calls == [*made, "evaluate random 20 %", AMP, "evaluate amp 20 %"]
    again = experiment("table1", dense, out, **settings(place, **ARGUMENTS))
    assert figures(again) == figures(undisturbed)
    assert left(out / "dense") == {"evaluation.json", "scores"}


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_experiments import settings
from amprune.experiments import cells
from amprune.experiments.run import experiment
own = cells.evaluate
def slow(models, output, **options):
    if "random" in models[0]:
        print("random", flush=True)
        time.sleep(60)
    return own(models, output, **options)
cells.evaluate = slow
experiment("table1", sys.argv[3], sys.argv[4], **settings(Path(sys.argv[2]), methods=["random", "amp"]))
"""


def test_it_goes_on_after_kill_9(
    undisturbed: ExperimentFiles, dense: Path, place: Path, tmp_path: Path, calls: list[str]
) -> None:
    out, here = tmp_path / "out", Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, here, place, dense, out], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "random\n"
        with pytest.raises(EvaluationError, match="is being written by another run"):
            experiment("table1", dense, out, **settings(place, **ARGUMENTS))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    files = experiment("table1", dense, out, **settings(place, **ARGUMENTS))
    assert calls == ["evaluate random 20 %", AMP, "evaluate amp 20 %"], "the random model was on disk"
    assert figures(files) == figures(undisturbed)
    assert left(out) == {"experiment.json", "report.md", "report.html", "figures", "dense"}


def test_training_goes_on_at_its_last_epoch(
    dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    given = settings(place, ratios=[0.2], **{**TRAINING, "epochs": 2})
    evaluate = cells.evaluate

    def stop(models: list[str], *arguments: Any, **options: Any) -> Any:
        if "2 epochs" in models[0]:
            raise KeyboardInterrupt
        return evaluate(models, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            experiment("epochs", dense, tmp_path / "out", **given)
    calls.clear()
    experiment("epochs", dense, tmp_path / "out", **given)
    assert calls == ["evaluate 2 epochs 20 %"]
    assert left(tmp_path / "out" / "dense") == {"evaluation.json", "scores"}


# Cells that fail or cannot be


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CheckpointError("the disk is full"), "the disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory ran out"),
    ],
)
def test_a_failed_cell_is_told_and_tried_again(
    error: BaseException, reason: str, dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    calls: list[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    command = ["table1", "--model", dense, "-o", out, "--method", "random,amp", *options(place)]
    with monkeypatch.context() as patch:
        patch.setattr(cells, "apply_plan", failing("random", error))
        code, output, errors = invoke(*command)
    assert code == 1
    assert "failed cells: 1; the same command tries them again" in errors
    assert re.search(rf"random 20 %: .*{reason}", errors)
    assert "amp 20 %" in output
    cell = json.loads((out / "experiment.json").read_text())["models"][0]["cells"]["random 20 %"]
    assert cell["state"] == "failed"
    assert reason in cell["reason"]
    text = (out / "report.md").read_text()
    assert f"| random | {MISSING} | failed |" in text
    assert "random 20 %: failed; " in text
    assert left(out / "dense") == {"evaluation.json", "scores"}
    calls.clear()
    code, output, errors = invoke(*command, "--json")
    assert (code, calls) == (0, [RANDOM, "evaluate random 20 %"])
    found = json.loads(output)
    assert list(found["models"][0]["cells"]) == ["dense", "random 20 %", "amp 20 %"]
    assert {cell["state"] for cell in found["models"][0]["cells"].values()} == {"done"}


def test_best_fails_is_tried_again_and_goes_on(
    dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    given = settings(place, methods=["best"])
    with monkeypatch.context() as patch:
        patch.setattr(cells, "prune", Mock(side_effect=ReconstructionError("too little memory")))
        files = experiment("table1", dense, tmp_path / "out", **given)
    assert files.failed == ((str(dense), "best 20 %", "too little memory"),)
    with monkeypatch.context() as patch:
        patch.setattr(cells, "evaluate", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            experiment("table1", dense, tmp_path / "out", **given)
    calls.clear()
    files = experiment("table1", dense, tmp_path / "out", **given)
    assert calls == ["evaluate best 20 %"], "the pruned model was on disk"
    assert states(files) == {"dense": "done", "best 20 %": "done"}
    assert (files.results.models[0].cells["best 20 %"].calibration or {})["name"] == "mixed"
    assert left(tmp_path / "out" / "dense") == {"evaluation.json"}
    before = files.record.read_bytes()
    experiment("table1", dense, tmp_path / "out", **given)
    assert calls == ["evaluate best 20 %"]
    assert files.record.read_bytes() == before


def test_a_criterion_that_fails_fails_its_cells_alone(
    dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cells.score_criteria

    def fail(model: Any, criteria: list[Criterion], *arguments: Any, **options: Any) -> Any:
        if "taylor" in {one.name for one in criteria}:
            raise ScoresError("gradients need 9 GB, 1 GB is free")
        return own(model, criteria, *arguments, **options)

    monkeypatch.setattr(cells, "score_criteria", fail)
    files = experiment("table1", dense, tmp_path / "out", **settings(place, methods=["taylor", "random"]))
    assert states(files) == {"dense": "done", "taylor 20 %": "failed", "random 20 %": "done"}
    assert files.failed == ((str(dense), "taylor 20 %", "gradients need 9 GB, 1 GB is free"),)


def test_a_fault_of_the_program_is_no_failed_cell(
    dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "apply_plan", failing("amp", ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        experiment("table1", dense, tmp_path / "out", **settings(place, methods=["amp"]))


def test_heads_alone_may_not_give_the_ratio(place: Path, tmp_path: Path, calls: list[str]) -> None:
    model = dense_model(tmp_path / "wide", intermediate_size=320)
    given = settings(place)
    files = experiment("table3", model, tmp_path / "out", **given)
    assert states(files)["heads only 30 %"] == "n/a"
    assert set(states(files).values()) == {"done", "n/a"}
    assert files.failed == ()
    text = files.report.markdown.read_text()
    assert f"| heads only | {MISSING} | n/a |" in text
    assert re.search(r"heads only 30 %: not possible with this model; .*ratio", text)
    calls.clear()
    experiment("table3", model, tmp_path / "out", **given)
    assert calls == []


def test_all_are_timed_again_when_a_failed_one_joins(
    dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    given = settings(place, ratios=[0.2])
    with monkeypatch.context() as patch:
        patch.setattr(cells, "apply_plan", failing("depth", CheckpointError("full")))
        files = experiment("speedup", dense, tmp_path / "out", **given)
        assert states(files) == {"dense": "done", "amp 20 %": "done", "depth 20 %": "failed"}
        calls.clear()
        assert "models" not in left(tmp_path / "out" / "dense")
        experiment("speedup", dense, tmp_path / "out", **given)
        assert calls == [], "as long as it fails, nothing is timed again"
    files = experiment("speedup", dense, tmp_path / "out", **given)
    assert calls[-1] == "evaluate dense,depth 20 %,amp 20 %"
    assert set(states(files).values()) == {"done"}
    records = Evaluation.load(tmp_path / "out" / "dense" / "evaluation.json").records.values()
    sessions = {record.items_hash for record in records if (record.measurement, record.metric) == ("latency", "decode")}
    assert len(sessions) == 1
