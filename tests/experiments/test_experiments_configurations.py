"""The paper's configurations: what they say, and that each runs on a tiny model of its family."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_experiments import dense_model, settings, states

from amprune.errors import EvaluationError
from amprune.experiments.recipes import RECIPES
from amprune.experiments.run import experiment
from amprune.experiments.settings import Settings, load_configuration, make_cells, make_settings, shipped
from amprune.settings import Training, with_preset


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


def made(name: str, config: str) -> Settings:
    return make_settings(RECIPES[name], {}, configured=load_configuration(config).settings_of(name), quick=False)


FAMILIES = {"llama-7b": "llama-mha", "llama-2-7b": "llama-mha", "phi-1.5": "phi-mha", "phi-2": "phi-mha"}
HUB = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "phi-1.5": "microsoft/phi-1_5",
    "phi-2": "microsoft/phi-2",
}
PAIRS = [(name, experiment) for name in FAMILIES for experiment in load_configuration(name).experiments]


def test_the_configurations_of_the_paper_ship() -> None:
    assert shipped() == tuple(sorted(FAMILIES))
    assert {name: load_configuration(name).model for name in FAMILIES} == HUB
    ratios = {name: made("table1", name).ratios for name in FAMILIES}
    assert ratios == {"llama-7b": (0.2,), "llama-2-7b": (0.3,), "phi-1.5": (0.3,), "phi-2": (0.3,)}
    assert set(load_configuration("llama-2-7b").experiments) == set(RECIPES)
    assert made("speedup", "llama-7b").ratios == made("speedup", "llama-2-7b").ratios == (0.2102,)


@pytest.mark.parametrize(("name", "which"), PAIRS)
def test_a_configuration_is_the_paper_s_recipe(name: str, which: str) -> None:
    found = made(which, name)
    assert (found.calibration, found.samples, found.seed, found.limit, found.windows) == ("alpaca", 50, 0, None, None)
    if which != "speedup":
        epochs = 4.0 if which == "epochs" else 2.0
        assert found.recovery == with_preset(Training(preset="paper", epochs=epochs))
        assert found.data == "alpaca"
        assert found.training_samples is None
    assert len(make_cells(RECIPES[which], found)) > 1


@pytest.mark.parametrize(("name", "which"), PAIRS)
def test_a_configuration_runs_on_a_tiny_model_of_its_family(name: str, which: str, place: Path, tmp_path: Path) -> None:
    """With its own ratios, of which one is enough, and its own recipe on fewer samples."""
    model = place / FAMILIES[name]
    if not model.is_dir():
        dense_model(model, FAMILIES[name], num_hidden_layers=7)
    small = {**settings(place), "training_samples": 4, "data": "builtin", "ratios": made(which, name).ratios[:1]}
    files = experiment(which, model, tmp_path / "out", config=name, **small)
    assert set(states(files).values()) <= {"done", "n/a"}
    assert files.results.request["settings"]["recovery"] is None or (
        files.results.request["settings"]["recovery"]["learning_rate"] == 3e-4
    )
    assert len([state for state in states(files).values() if state == "done"]) > 1


def test_a_configuration_may_be_a_user_s_own(place: Path, tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    file = tmp_path / "mine.json"
    content: dict[str, Any] = {
        "format": "amprune configuration 1",
        "model": str(dense),
        "settings": {"samples": 2, "calibration": "builtin"},
        "experiments": {"table1": {"ratios": [0.1], "methods": ["random"], "samples": 3}},
    }
    file.write_text(json.dumps(content))
    given = {name: value for name, value in settings(place).items() if name not in ("samples", "calibration")}
    files = experiment("table1", output=tmp_path / "out", config=file, **given)
    assert states(files) == {"dense": "done", "random 10 %": "done"}
    assert files.results.request["settings"]["samples"] == 3
    for change, words in (
        ({"format": "2"}, "format"),
        ({"settigns": {}}, "did you mean settings"),
        ({"recovery": {"learning_rte": 1}}, "did you mean learning_rate"),
        ({"experiments": {"table4": {}}}, "did you mean table"),
        ({"experiments": {"table1": {"ratio": [1]}}}, "did you mean ratios"),
        ({"experiments": []}, "expected an object"),
        ({"model": None}, "expected a folder or a hub id"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(EvaluationError, match=words):
            experiment("table1", output=tmp_path / "other", config=file, **given)
    file.write_text("{")
    with pytest.raises(EvaluationError, match="not JSON"):
        experiment("table1", output=tmp_path / "other", config=file, **given)
