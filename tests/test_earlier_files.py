"""Files that an earlier amprune wrote, in formats of which there is a newer one, are read as what they were.

Those in tests/data were made by amprune 0.1.0 from tiny random models: `prune` by the preset best, by the preset paper
with biases that compensate, and by the preset paper alone, whose scores lie beside it; `evaluate` of a dense and a
pruned model by every measurement, and then of fewer windows, interrupted before the latency.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_evaluation import text_file, tiny_model

from amprune import Evaluation, ImportanceScores, LatencySettings, PlanError, PruningPlan, evaluate, make_plan
from amprune.evaluation import run
from amprune.evaluation.comparison import paired
from amprune.evaluation.identity import Subject

DATA = Path(__file__).parent / "data"
SAME = {"head_multiple": 1, "heads_mode": "groups", "heads_ratio": None, "neurons_ratio": None, "only": None,
        "order": "amp", "ratio": 0.2, "seed": 0}  # fmt: skip
BUDGET = {"heads_mode": "groups", "key_value_heads": 4, "neurons": 16, "query_heads": 12}
PLANS: dict[str, tuple[bool, bool, dict[str, Any], str, int]] = {
    "plan-format-1": (True, False, {**SAME, "neuron_multiple": 8, "budget": BUDGET}, "best", 16),
    "plan-format-1-compensated": (False, True, {**SAME, "neuron_multiple": 1}, "paper", 19),
    "plan-format-1-plain": (False, False, {**SAME, "neuron_multiple": 1}, "paper", 19),
}
"""Of each: refitted, compensated, options, preset, neurons that a layer keeps."""


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_format_1_says_what_its_provenance_said(name: str, tmp_path: Path) -> None:
    refitted, compensated, options, preset, neurons = PLANS[name]
    written = json.loads((DATA / f"{name}.json").read_text())
    assert written["format"] == 1
    plan = PruningPlan.load(DATA / f"{name}.json")
    assert (plan.refitted, plan.compensated) == (refitted, compensated)
    assert plan.options == options
    assert plan.provenance == {key: value for key, value in written["provenance"].items() if key != "options"}
    assert (plan.provenance["preset"], plan.fingerprint) == (preset, written["provenance"]["fingerprint"])
    assert plan.choices == written["provenance"]["options"]
    assert (plan.ratio_target, plan.ratio_actual) == (written["ratio_target"], written["ratio_actual"])
    assert [list(layer.neurons) for layer in plan.layers if layer] == [one["neurons"] for one in written["layers"]]
    assert {len(layer.neurons) for layer in plan.layers if layer} == {neurons}
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == 2
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_a_plan_of_format_1_is_held_to_its_invariants(tmp_path: Path) -> None:
    content = json.loads((DATA / "plan-format-1.json").read_text())
    content["layers"][1]["neurons"][0] = 999
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=r"layer 1, neurons: unit"):
        PruningPlan.load(tmp_path / "plan.json")


def test_scores_of_then_give_the_plan_of_then() -> None:
    scores = ImportanceScores.load(DATA / "scores-of-plan-format-1.safetensors")
    before = PruningPlan.load(DATA / "plan-format-1-plain.json")
    plan = make_plan(scores, ratio=0.2)
    assert (plan.layers, plan.shape_after) == (before.layers, before.shape_after)
    assert (scores.criterion, scores.fingerprint) == ("amp", before.fingerprint)
    assert (scores.calibration or {})["sha256"] == before.provenance["calibration"]["sha256"]


def test_an_evaluation_of_then_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    evaluation = Evaluation.load(DATA / "evaluation-format-1.json")
    assert list(evaluation.models) == ["dense", "pruned"]
    assert (evaluation.models["pruned"].pruned or {})["provenance"]["preset"] == "best"
    measured = {(record.measurement, record.metric) for record in evaluation.of("dense")}
    assert {name for name, _ in measured} == {"size", "perplexity", "zero_shot", "latency", "memory", "energy"}
    for record, baseline in zip(evaluation.of("pruned"), evaluation.of("dense"), strict=True):
        assert (record.task, record.metric) == (baseline.task, baseline.metric)
        assert (paired(record, baseline) is None) == (record.measurement in ("size", "memory"))
    evaluation.save(tmp_path / "again.json")
    then, now = (file.read_text() for file in (DATA / "evaluation-format-1.json", tmp_path / "again.json"))
    assert now.count(', "start_token": "first"}') == then.count('"measurement": "perplexity"')  # then the only way
    assert now.replace(', "start_token": "first"}', "}").replace('{"start_token": "first", ', "{") == then


def test_an_evaluation_that_was_interrupted_then_goes_on_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "evaluation.json"
    shutil.copy(DATA / "evaluation-format-1.json", file)
    before = Evaluation.load(file)
    assert before.unfinished is not None
    models, device = before.models, before.unfinished["request"]["device"]

    @contextmanager
    def loaded(folder: Path, **options: Any) -> Iterator[Any]:
        yield tiny_model()

    monkeypatch.setattr(
        run, "open_subjects", lambda *_: [Subject(name, tmp_path, models[name], 1024) for name in models]
    )
    monkeypatch.setattr(run, "device_name", lambda _: device)
    monkeypatch.setattr(run, "loaded_model", loaded)
    monkeypatch.setattr(run, "load_tokenizer", lambda *_, **__: pytest.fail("perplexity is measured again"))
    after = evaluate(
        ["dense", "pruned"], file, measure=["perplexity", "latency"], texts=[text_file(tmp_path / "my.txt", 6)],
        sequence_length=32, windows=2, tasks=["winogrande"], limit=3, energy_seconds=0.3, start_token="first",
        latency=[LatencySettings(new_tokens=4, warmup=1, runs=2)],
    )  # fmt: skip
    assert after.unfinished is None
    assert list(after.records) == list(before.records)
    anew = {record.measurement for key, record in after.records.items() if record != before.records[key]}
    assert anew == {"latency", "memory"}
