"""The presets `best` and `paper` through `prune`, targets in the place of a ratio, and the set that ships."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import find, make_model
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

from amprune import (
    CalibrationSet,
    PruningPlan,
    apply_plan,
    draw_calibration,
    load_calibration,
    make_plan,
    prune,
    score,
    verify,
)
from amprune.model.reader import read_checkpoint
from amprune.settings import PRESETS

QUICK: dict[str, Any] = {"tokens": 3000, "max_length": 128}


def plan_in(folder: Path) -> PruningPlan:
    return PruningPlan.load(folder / "amprune" / "plan.json")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_model(find("llama-gqa")).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def best(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best") / "out"
    assert prune(dense, folder, ratio=0.2, **QUICK).verification.passed
    return folder


def test_best_allocates_refits_and_says_so(best: Path, dense: Path) -> None:
    plan = plan_in(best)
    assert plan.provenance["preset"] == "best"
    assert plan.provenance["criterion"] == "activation-l2"
    assert plan.provenance["calibration"]["name"] == "mixed"
    assert len(plan.provenance["allocation"]["candidates"]) > 2
    assert plan.refitted
    record = json.loads((best / "amprune" / "reconstruction.json").read_text(encoding="utf-8"))
    assert len(record["layers"]) == plan.shape_before.num_layers
    assert record["sha256"]
    assert "refitted" in (best / "README.md").read_text(encoding="utf-8")
    assert verify(best, dense=dense).passed


def test_what_is_held_out_is_neither_scored_on_nor_fitted(best: Path) -> None:
    allocation = plan_in(best).provenance["allocation"]
    record = json.loads((best / "amprune" / "reconstruction.json").read_text(encoding="utf-8"))
    scored = plan_in(best).provenance["calibration"]
    assert scored["samples"] + allocation["held_out"]["samples"] == record["calibration"]["samples"]
    assert scored["sha256"] != allocation["held_out"]["sha256"]


def test_the_same_call_gives_the_same_bytes(best: Path, dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "again", ratio=0.2, **QUICK)
    for name in ("model.safetensors", "amprune/plan.json", "amprune/reconstruction.json"):
        assert (tmp_path / "again" / name).read_bytes() == (best / name).read_bytes(), name


def test_paper_is_the_stages_with_their_own_defaults(dense: Path, tmp_path: Path) -> None:
    texts = [f"### Instruction:\nName {number} colours.\n\n### Response:\nRed." for number in range(60)]
    prune(dense, tmp_path / "paper", ratio=0.2, preset="paper", calibration=texts)
    scores = score(dense, preset="paper", calibration=texts)
    assert scores.calibration["samples"] == 50
    apply_plan(dense, make_plan(scores, ratio=0.2), tmp_path / "stages", scores=scores)
    files = [tmp_path / name / "model.safetensors" for name in ("paper", "stages")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "paper" / "amprune" / "reconstruction.json").exists()
    assert "allocation" not in plan_in(tmp_path / "paper").provenance


def test_shares_by_hand_and_single_switches_come_before_the_preset(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "only", ratio=0.2, only="neurons", reconstruct=False, **QUICK)
    plan = plan_in(tmp_path / "only")
    assert "allocation" not in plan.provenance
    assert plan.shape_after.num_attention_heads == plan.shape_before.num_attention_heads
    assert not plan.refitted
    prune(dense, tmp_path / "random", ratio=0.2, criterion="random", allocate=False, **QUICK)
    assert plan_in(tmp_path / "random").refitted  # text for the refit alone


def test_depth_pruning_under_the_preset_neither_allocates_nor_refits(dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "out", ratio=0.4, criterion="depth", protect_first=0, protect_last=0, tokens=300)
    plan = plan_in(tmp_path / "out")
    assert plan.shape_after.num_layers == 1
    assert not plan.refitted


def test_the_first_two_targets_are_met_exactly(dense: Path, tmp_path: Path) -> None:
    before = read_checkpoint(dense)
    step = before.shape.neuron_parameters * before.shape.num_layers
    exact = {**QUICK, "neuron_multiple": 1, "reconstruct": False}
    result = prune(dense, tmp_path / "a", target="params=60k", **exact)
    assert 0 <= 60_000 - result.plan.shape_after.parameters < step
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert sum(parameter.numel() for parameter in model.parameters()) == result.plan.shape_after.parameters
    wanted = before.bytes * 4 // 5
    result = prune(dense, tmp_path / "b", target=f"weight-bytes={wanted}", allocate=False, **exact)
    assert 0 <= wanted - result.bytes_after < 4 * step


def test_a_speedup_is_timed_and_the_least_damaging_shape_taken(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    from amprune.search import run as planning
    from amprune.search.timing import Timing

    @contextmanager
    def timer(*_: object, **__: object) -> Any:
        yield Timing(lambda shape: 130_000 / (shape.parameters + 40_000), (2,))

    monkeypatch.setattr(planning, "shape_timer", timer)
    result = prune(dense, tmp_path / "fast", target="speedup=1.1x", reconstruct=False, **QUICK)
    found = result.plan.provenance["speedup"]
    assert found["wanted"] == 1.1
    chosen = result.plan.provenance["allocation"]["candidates"][result.plan.provenance["allocation"]["chosen"]]
    assert chosen["budget"] in [shape["budget"] for shape in found["reached"]]
    assert chosen["damage"]["kl"] == min(c["damage"]["kl"] for c in result.plan.provenance["allocation"]["candidates"])


def test_a_plan_that_asks_for_a_refit_gets_one_unless_told_otherwise(best: Path, dense: Path, tmp_path: Path) -> None:
    plan = plan_in(best)
    apply_plan(dense, plan, tmp_path / "plain", reconstruct=False)
    assert not plan_in(tmp_path / "plain").refitted
    assert verify(tmp_path / "plain", dense=dense).passed
    apply_plan(dense, plan, tmp_path / "unasked", **QUICK)
    assert (tmp_path / "unasked" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    calibration = draw_calibration(dense, "mixed", **QUICK)
    apply_plan(dense, plan, tmp_path / "again", refit=calibration)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_mixed_ships_and_holds_several_kinds_of_text() -> None:
    class Words:
        chat_template = None

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            seen.append(text)
            return {"input_ids": list(range(len(text.split())))}

    seen: list[str] = []
    found = load_calibration("mixed", Words(), tokens=10**9, max_length=10**6)
    assert found.tokens > 40_000
    for sign in ("### Instruction:", "def ", "User: ", "August 1802"):
        assert any(sign in text for text in seen), sign
    seen = [text for text in seen if len(text) > 1]  # one letter tells which token a text begins with
    assert len(set(seen)) == len(seen)


def test_tokens_bound_the_draw_and_samples_come_first() -> None:
    class Words:
        chat_template = None

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [1] * 10}

    assert len(load_calibration(["a b"] * 99, Words(), tokens=45).samples) == 5
    assert len(load_calibration(["a b"] * 99, Words(), tokens=45, samples=3).samples) == 3
    assert len(load_calibration(["a b"] * 99, Words()).samples) == 50


def test_a_set_is_split_so_that_an_eighth_is_held_out() -> None:
    fit, held_out = CalibrationSet("a", tuple((index,) for index in range(17))).split()
    assert (len(fit.samples), len(held_out.samples)) == (14, 3)
    assert not set(fit.samples) & set(held_out.samples)
    alone = CalibrationSet("a", ((1,),))
    assert alone.split() == (alone, alone)


def test_the_presets_differ_where_the_documents_say() -> None:
    paper, best = PRESETS["paper"].pruning, PRESETS["best"].pruning
    assert (paper.criterion, paper.calibration, paper.samples, paper.max_length) == ("amp", "alpaca", 50, 512)
    assert not paper.allocate
    assert not paper.reconstruct
    assert best.allocate
    assert best.reconstruct


def test_refitting_beats_plain_pruning_on_other_text(best: Path, dense: Path, tmp_path: Path) -> None:
    prune(dense, tmp_path / "plain", ratio=0.2, reconstruct=False, **QUICK)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, best, tmp_path / "plain")]
    ids = torch.tensor(load_calibration("mixed", make_tokenizer(), samples=40, max_length=64, seed=7).samples[0])[None]
    with torch.inference_mode():
        logits = [model(ids).logits for model in models]
    assert (logits[1] - logits[0]).square().mean() < (logits[2] - logits[0]).square().mean()


@pytest.mark.parametrize("device_map", ["disk", "auto"])
def test_a_model_larger_than_memory_is_allocated_and_refitted(dense: Path, tmp_path: Path, device_map: str) -> None:
    result = prune(dense, tmp_path / "out", ratio=0.2, device_map=device_map, **QUICK)
    assert result.verification.passed
    assert result.plan.provenance["allocation"]["candidates"]
    assert result.plan.refitted
