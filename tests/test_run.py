"""The whole way in one call, and where it goes on after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import find, make_model, save_model
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

import amprune.pipeline
import amprune.recovery.run
import amprune.report.write
from amprune import CheckpointError, PlanError, RecoveryError, prune, run
from amprune.evaluation.records import Evaluation

ARGUMENTS: dict[str, Any] = {
    "ratio": 0.2,
    "calibration": "builtin",
    "samples": 4,
    "recover": True,
    "max_steps": 2,
    "gradient_accumulation": 1,
    "training_max_length": 128,
    "lora_rank": 2,
    "logging_steps": 1,
    "data": "builtin",
    "training_samples": 100,
    "evaluate": True,
    "measure": ["latency"],
    "new_tokens": 4,
    "warmup": 1,
    "runs": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(find("llama-gqa"), tmp_path_factory.mktemp("run") / "dense")
    make_tokenizer().save_pretrained(folder)
    return folder


def left(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_it_prunes_recovers_measures_and_reports(dense: Path, tmp_path: Path) -> None:
    files = run(dense, tmp_path / "out", distil=True, **ARGUMENTS)
    assert left(tmp_path) == {"out"}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    records = tmp_path / "out" / "amprune"
    assert json.loads((records / "recovery.json").read_text())["teacher"] == str(dense)
    evaluation = Evaluation.load(records / "evaluation.json")
    assert list(evaluation.models) == ["dense", "out, not recovered", "out"]
    assert all(evaluation.of(name, "latency") for name in evaluation.models)
    assert files.html == records / "report.html"
    assert files.card == tmp_path / "out" / "README.md"


@pytest.mark.parametrize("stage", ["recover", "evaluate", "write_report"])
def test_it_goes_on_at_the_stage_that_was_running(
    stage: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    modules = {
        "recover": amprune.recovery.run,
        "evaluate": amprune.evaluation.run,
        "write_report": amprune.report.write,
    }
    with monkeypatch.context() as patch:
        patch.setattr(modules[stage], stage, stop)
        with pytest.raises(KeyboardInterrupt):
            run(dense, tmp_path / "out", **ARGUMENTS)
    assert "out.run.json" in left(tmp_path)
    for name, module in {**modules, "prune": amprune.pipeline}.items():
        own = getattr(module, name)

        def counted(*arguments: Any, own: Any = own, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return own(*arguments, **options)

        monkeypatch.setattr(module, name, counted)
    run(dense, tmp_path / "out", **ARGUMENTS)
    assert calls == {"recover": ["recover", "evaluate", "write_report"]}.get(stage, ["evaluate", "write_report"])
    assert left(tmp_path) == {"out"}


def test_another_request_does_not_go_on(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**ARGUMENTS, "recover": False, "evaluate": False}
    with monkeypatch.context() as patch:
        patch.setattr(amprune.report.write, "write_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(dense, tmp_path / "out", **arguments)
    with pytest.raises(CheckpointError, match=r"asked for with another prune.ratio; ask for the same again"):
        run(dense, tmp_path / "out", **{**arguments, "ratio": 0.3})
    run(dense, tmp_path / "out", **{**arguments, "ratio": 0.3}, overwrite=True)
    assert left(tmp_path) == {"out"}


def test_a_mended_option_of_the_training_takes_over_what_was_pruned(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**ARGUMENTS, "evaluate": False}
    with pytest.raises(RecoveryError, match="loss is nan"):
        run(dense, tmp_path / "out", **{**arguments, "learning_rate": 1e30, "max_steps": 3})
    assert "out.pruned" in left(tmp_path)
    monkeypatch.setattr(amprune.pipeline, "prune", lambda *_, **__: pytest.fail("pruned again"))
    run(dense, tmp_path / "out", **{**arguments, "max_steps": 3})
    assert left(tmp_path) == {"out"}


def test_a_run_that_fails_before_anything_is_done_leaves_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="ratio"):
        run(dense, tmp_path / "a" / "out", **{**ARGUMENTS, "ratio": 0.99})
    assert left(tmp_path) == set()


def test_another_model_in_the_place_of_what_was_pruned_is_noticed(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**ARGUMENTS, "evaluate": False}
    with monkeypatch.context() as patch:
        patch.setattr(amprune.recovery.run, "recover", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(dense, tmp_path / "out", **arguments)
    other = make_model(find("llama-gqa"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    prune(tmp_path / "other", tmp_path / "out.pruned", ratio=0.2, calibration="builtin", samples=4, overwrite=True)
    with pytest.raises(PlanError, match="the plan is for other weights than those of"):
        run(dense, tmp_path / "out", **arguments)


def test_an_out_that_exists_is_left_alone(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        run(dense, tmp_path / "out", **ARGUMENTS)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(dense, tmp_path / "out", **ARGUMENTS, overwrite=True)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    assert left(tmp_path) == {"out"}


def test_it_never_writes_into_the_source(dense: Path) -> None:
    before = {path: path.read_bytes() for path in dense.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError):
        run(dense, dense / "out", **ARGUMENTS)
    with pytest.raises(CheckpointError):
        run(dense, dense, **ARGUMENTS, overwrite=True)
    assert {path: path.read_bytes() for path in dense.rglob("*") if path.is_file()} == before
