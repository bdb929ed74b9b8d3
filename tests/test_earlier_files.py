"""Files that an earlier amprune wrote, in formats of which there is a newer one, are read as what they were.

Those in tests/data were made by amprune 0.1.0 from tiny random models: `prune` by the preset best, by the preset paper
with biases that compensate, and by the preset paper alone, whose scores lie beside it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from amprune import ImportanceScores, PlanError, PruningPlan, make_plan

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
