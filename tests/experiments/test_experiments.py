"""Experiments whole, on tiny models: every recipe, rows of other tools, several models."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_evaluation import task_folder
from tiny_experiments import TRAINING, count, dense_model, figures, left, settings, states

from amprune.errors import CheckpointError, EvaluationError, PlanError
from amprune.evaluation.records import Evaluation
from amprune.experiments import cells
from amprune.experiments.recipes import RECIPES
from amprune.experiments.run import experiment
from amprune.pipeline import prune


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def dense(place: Path) -> Path:
    return dense_model(place / "dense")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count(monkeypatch)


# Every recipe

EXPECTED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "table1": (
        {"methods": ["amp", "taylor", "depth"]}, ["dense", "amp 20 %", "taylor 20 %", "depth 20 %"],
        ["place", "Difference from amp 20 %", "](figures/table1-1.png)"],
    ),
    "table2": (
        {"ratios": [0.3003]}, ["dense", "amp 30.03 %", "random 30.03 %", "reversed 30.03 %"],
        ["amp < random < reversed", "| reversed |", "](figures/table2-1.png)"],
    ),
    "table3": (
        {}, ["dense", "heads and neurons 30 %", "neurons only 30 %", "heads only 30 %"],
        ["Difference from heads and neurons 30 %", "](figures/table3-1.png)"],
    ),
    "figure1": (
        {"ratios": [0.2], **TRAINING}, ["dense", "best 20 %", "best, trained 20 %", "amp 20 %", "amp, trained 20 %"],
        ["](figures/perplexity-1.png)", "dashed: the dense model", "best: preset of amprune"],
    ),
    "speedup": (
        {"ratios": [0.2]}, ["dense", "amp 20 %", "depth 20 %"],
        ["Speedup of decoding", "ideal", "](figures/speedup-1.png)", "](figures/latency.png)"],
    ),
    "epochs": (
        {"ratios": [0.2], **TRAINING, "epochs": 2}, ["dense", "not trained 20 %", "1 epoch 20 %", "2 epochs 20 %"],
        ["](figures/epochs-perplexity.png)", "trained once, for all epochs"],
    ),
    "cost": ({}, ["dense", "amp 21.02 %"], ["Making amp 21.02 %", "kWh", "Wh per 1,000 tokens"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_whole(name: str, dense: Path, place: Path, tmp_path: Path, calls: list[str]) -> None:
    changes, names, words = EXPECTED[name]
    files = experiment(name, dense, tmp_path / "out", **settings(place, **changes))
    assert states(files) == dict.fromkeys(names, "done")
    assert files.failed == ()
    for cell, result in files.results.models[0].cells.items():
        asked = re.search(r"([\d.]+) %", cell)
        assert result.ratio == pytest.approx(float(asked[1]) / 100 if asked else 0, abs=0.04)
    assert list(Evaluation.load(tmp_path / "out" / "dense" / "evaluation.json").models) == names
    text = files.report.markdown.read_text()
    assert all(word in text for word in words), text
    assert left(tmp_path / "out") == {"experiment.json", "report.md", "report.html", "dense"} | (
        {"figures"} if files.report.figures else set()
    )
    assert left(tmp_path / "out" / "dense") == {"evaluation.json", "scores"}  # nothing left of models/
    assert len([call for call in calls if call.startswith("score_criteria")]) == {"table1": 3, "speedup": 2}.get(
        name, 1
    )
    assert len([call for call in calls if call.startswith("recover")]) == {"figure1": 2, "epochs": 1}.get(name, 0)
    pruned = [call for call in calls if call.startswith(("apply_plan", "prune"))]
    assert len(pruned) == len(set(pruned)), "a pruned model is made once"


def test_training_helps_in_figure1(dense: Path, place: Path, tmp_path: Path) -> None:
    """The trained model is another one than the pruned, and both are measured as what they are."""
    files = experiment("figure1", dense, tmp_path / "out", **settings(place, ratios=[0.2], methods=["amp"], **TRAINING))
    found = {name: value["perplexity, text.txt"]["value"] for name, value in figures(files).items()}
    assert found["amp, trained 20 %"] < found["amp 20 %"]
    assert files.results.models[0].cells["amp, trained 20 %"].making_seconds is not None


def test_best_is_the_preset_on_its_own_set(dense: Path, place: Path, tmp_path: Path, calls: list[str]) -> None:
    """It shares no scores with the others; the samples of the experiment bound those of its set, too."""
    files = experiment("table1", dense, tmp_path / "out", keep=True, **settings(place, methods=["best", "amp"]))
    made = ["evaluate dense", "prune best-amp-both-0.2", "evaluate best 20 %"]
    assert calls == ["score_criteria amp", *made, "apply_plan amp-amp-both-0.2", "evaluate amp 20 %"]
    found = files.results.models[0].cells
    drawn = found["best 20 %"].calibration
    assert drawn is not None
    assert (drawn["name"], drawn["samples"], drawn["seed"]) == ("mixed", 3, 0)
    assert found["amp 20 %"].calibration is None
    assert (found["best 20 %"].making_seconds or 0) > 0
    plan = json.loads((tmp_path / "out/dense/models/best-amp-both-0.2/amprune/plan.json").read_text())
    assert (plan["provenance"]["preset"], plan["provenance"]["criterion"]) == ("best", "activation-l2")
    assert plan["options"]["neuron_multiple"] == 1
    before = plan["shape_before"]
    neuron = before["neuron_parameters"] * before["num_layers"] / before["parameters"]
    for cell in ("best 20 %", "amp 20 %"):
        assert found[cell].ratio == pytest.approx(0.2, abs=neuron / 2)
    text = files.report.markdown.read_text()
    assert f"best: preset of amprune, calibrated on its own mixed set, {drawn['tokens']:,} tokens." in text
    assert "on 3 samples of builtin, seed 0, the same for all methods but best;" in text
    quality, difference = re.findall(r"^\| best \|(.*)\|$", text, re.M)
    assert "\u00b1" in difference
    assert re.match(r" (20|19)\.\d\d % \|", quality)


def test_best_draws_no_more_than_there_is(
    dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(model: Path, out: Path, **options: Any) -> None:
        asked.append(options)
        raise PlanError("the ratio is out of reach")

    monkeypatch.setattr(cells, "prune", refuse)
    for samples in (3, 5000):
        given = settings(place, methods=["best"], samples=samples, seed=7)
        files = experiment("table1", dense, tmp_path / str(samples), **given)
        assert states(files) == {"dense": "done", "best 20 %": "n/a"}
        assert "best 20 %: not possible with this model; the ratio is out of reach" in files.report.markdown.read_text()
    shown = [(found["samples"], found["tokens"], found["seed"], found["device"]) for found in asked]
    assert shown == [(3, 32_768, 7, "cpu"), (247, 32_768, 7, "cpu")]


def test_every_method_of_table1_has_a_row(dense: Path, place: Path, tmp_path: Path) -> None:
    files = experiment("table1", dense, tmp_path / "out", **settings(place))
    rows = [line.split("|")[1].strip() for line in files.report.markdown.read_text().splitlines() if line[:1] == "|"]
    methods = ["best", "amp", "amp-l2", "amp-weighted", "activation-l2", "wanda-sp", "flap", "taylor", "magnitude",
               "random", "depth", "depth-taylor"]  # fmt: skip
    assert rows[2 : 3 + len(methods)] == ["dense", *methods]
    assert set(states(files).values()) == {"done"}
    assert len({json.dumps(value) for value in figures(files).values()}) > 8, "the methods differ"


def test_tasks_are_asked_and_the_recovery_is_the_same_for_all(dense: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = task_folder(tmp_path / "data")
    files = experiment(
        "table1", dense, tmp_path / "out",
        **settings(
            place, methods=["amp", "random"], data_dir=data, tasks=["winogrande"], limit=6, recover=True, **TRAINING
        ),
    )  # fmt: skip
    text = files.report.markdown.read_text()
    assert "| WinoGrande |" in text
    assert "the first 6 questions of each of winogrande" in text
    assert "Every pruned model was trained the same way: LoRA of rank 8, 1 epoch on 12 samples of builtin" in text
    assert all("WinoGrande" in value for value in figures(files).values())


# Rows of other tools, several models, what stays on disk


def test_a_checkpoint_of_another_tool_is_a_row(dense: Path, place: Path, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {"calibration": "builtin", "samples": 2}
    other = prune(dense, tmp_path / "theirs", ratio=0.2, neuron_multiple=1, order="random", **drawn).folder
    shutil.rmtree(other / "amprune")
    files = experiment(
        "table1", dense, tmp_path / "out", **settings(place, methods=["amp"], checkpoints=[f"slicer={other}"])
    )
    assert states(files) == {"dense": "done", "amp 20 %": "done", "slicer": "done"}
    assert files.results.models[0].cells["slicer"].ratio == pytest.approx(0.2, abs=0.01)
    assert re.search(r"\| slicer \| (20|19)\.\d\d % \|", files.report.markdown.read_text())
    assert (other / "config.json").is_file()
    with pytest.raises(EvaluationError, match="two models of the experiment are called 'dense'"):
        experiment("table1", dense, tmp_path / "two", **settings(place, checkpoints=[f"dense={other}"]))
    with pytest.raises(CheckpointError):
        experiment("table1", dense, tmp_path / "two", **settings(place, checkpoints=["x=/no/where"]))
    with pytest.raises(EvaluationError, match="no row for a --checkpoint"):
        experiment("table2", dense, tmp_path / "two", **settings(place, checkpoints=[f"x={other}"]))
    assert "two" not in left(tmp_path)


def test_several_models_have_a_section_each(dense: Path, place: Path, tmp_path: Path) -> None:
    second = dense_model(tmp_path / "second", "llama-mha")
    files = experiment("speedup", [dense, second], tmp_path / "out", **settings(place, ratios=[0.2], methods=["amp"]))
    assert [found.folder for found in files.results.models] == ["dense", "second"]
    text = files.report.markdown.read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == [
        "dense", "Latency, dense", "Memory and energy, dense", "second", "Latency, second",
        "Memory and energy, second", "How it was measured",
    ]  # fmt: skip
    names = [path.stem for path in files.report.figures if path.suffix == ".svg"]
    assert names == ["dense-speedup-1", "dense-latency", "second-speedup-1", "second-latency"]
    with pytest.raises(EvaluationError, match="two models would be kept"):
        experiment("table1", [dense, dense], tmp_path / "two", **settings(place))


def test_models_may_be_kept(dense: Path, place: Path, tmp_path: Path) -> None:
    experiment("table1", dense, tmp_path / "out", keep=True, **settings(place, methods=["amp"]))
    assert (tmp_path / "out" / "dense" / "models" / "amp-amp-both-0.2" / "config.json").is_file()


def test_time_is_measured(dense: Path, place: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    files = experiment("table1", dense, tmp_path / "out", **settings(place, methods=["amp"]))
    found = files.results.models[0]
    spent = sum(found.scoring_seconds.values()) + sum(
        (cell.making_seconds or 0) + (cell.measuring_seconds or 0) for cell in found.cells.values()
    )
    assert 0 < spent <= time.perf_counter() - start + 0.5
    assert found.cells["dense"].making_seconds is None
