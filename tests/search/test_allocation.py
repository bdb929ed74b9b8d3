"""Allocation: every split of a budget is a candidate, and the one that does the least damage is chosen."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_calibration import architecture_of
from tiny_models import PRUNABLE_HEADS, Tiny, config_of, find
from tiny_plans import HELD_OUT, loud_model, scores_of
from transformers import PreTrainedModel

from amprune import CalibrationSet, ImportanceScores, ModelShape, PlanError, PruningPlan, ScoresError, make_plan
from amprune.cut.masking import masked, swapped, whole_tensors
from amprune.cut.slicing import cuts_by_tensor, prune_model
from amprune.model.architecture import Architecture, describe
from amprune.plan.heads import Budget
from amprune.search import allocation as choice
from amprune.search.allocation import FINALISTS, MOST, Candidate, allocate, candidates, choose, nearest, plan_of
from amprune.search.damage import Damage, measure_changes
from amprune.settings import PlanOptions

GQA, MHA = find("llama-gqa"), find("llama-mha")
FAMILIES = [tiny for tiny in PRUNABLE_HEADS if tiny.variant in ("gqa", "mha", "mqa", "biases")]


def shape_of(tiny: Tiny) -> ModelShape:
    return describe(config_of(tiny)).shape


def left(shape: ModelShape, budget: Budget) -> int:
    return shape.shrunk(
        query_heads=budget.query_heads, key_value_heads=budget.key_value_heads, neurons=budget.neurons
    ).parameters


def counts(budget: Budget) -> tuple[int, int, int]:
    return budget.query_heads, budget.key_value_heads, budget.neurons


# Candidates


def tried(shape: ModelShape, options: PlanOptions) -> set[tuple[int, int, int]]:
    """Every split that spends the budget, by trying all numbers of heads and neurons."""
    multiple, size = options.neuron_multiple, shape.group_size
    everything = (shape.num_attention_heads, shape.num_key_value_heads)
    groups = {(kept * size, kept) for kept in range(1, shape.num_key_value_heads + 1)}
    within = {(kept * shape.num_key_value_heads, shape.num_key_value_heads) for kept in range(1, size + 1)}
    modes = {"groups": groups, "within": within if size > 1 else groups}
    heads = modes[options.heads_mode] if options.heads_mode else modes["groups"] | modes["within"]
    step, found = multiple * shape.neuron_parameters * shape.num_layers, set()
    for (queries, keys), width in product(heads, range(multiple, shape.intermediate_size + 1, multiple)):
        if (queries, keys) != everything and queries not in shape.query_head_counts:
            continue
        stays = left(shape, Budget("groups", queries, keys, width))
        if options.target_parameters is not None:
            fits = 0 <= options.target_parameters - stays < step
        else:
            fits = abs(1 - stays / shape.parameters - (options.ratio or 0)) * shape.parameters <= step / 2 + 1e-6
        if fits and (queries, keys, width) != (*everything, shape.intermediate_size):
            found.add((queries, keys, width))
    return found


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    tiny=st.sampled_from(FAMILIES),
    ratio=st.floats(0.03, 0.5),
    exact=st.booleans(),
    multiple=st.sampled_from([1, 1, 4]),
    mode=st.sampled_from([None, None, "groups", "within"]),
)
def test_candidates_are_all_splits_that_spend_the_budget(
    tiny: Tiny, ratio: float, exact: bool, multiple: int, mode: Any
) -> None:
    shape = shape_of(tiny)
    asked: dict[str, Any] = {"ratio": ratio}
    if exact:
        asked = {"target_parameters": round((1 - ratio) * shape.parameters)}
    options = PlanOptions(**asked, neuron_multiple=multiple, heads_mode=mode)
    expected = tried(shape, options)
    if not expected:
        return
    found = candidates(shape, options)
    assert {counts(budget) for budget in found} >= expected
    assert len({counts(budget) for budget in found}) == len(found)
    for extra in {counts(budget) for budget in found} - expected:  # a tie of two numbers of neurons, equally near
        assert any(extra[:2] == other[:2] and abs(extra[2] - other[2]) <= multiple for other in expected)
    for budget in found:
        plan = make_plan(scores_of(shape), budget=budget, **vars(options))
        assert (plan.shape_after.num_attention_heads, plan.shape_after.intermediate_size) == (
            budget.query_heads,
            budget.neurons,
        )


def test_candidates_go_from_no_heads_to_the_most_in_each_mode_and_name_none_twice() -> None:
    wide = describe({**config_of(GQA), "intermediate_size": 800}).shape
    found = candidates(wide, PlanOptions(ratio=0.3))
    assert [(budget.heads_mode, budget.query_heads, budget.key_value_heads) for budget in found] == [
        ("groups", 12, 4), ("groups", 9, 3), ("groups", 6, 2), ("groups", 3, 1), ("within", 8, 4), ("within", 4, 4),
    ]  # fmt: skip
    assert [b.heads_mode for b in candidates(shape_of(MHA), PlanOptions(ratio=0.3))] == ["groups"] * 4
    assert {b.heads_mode for b in candidates(shape_of(find("llama-mqa")), PlanOptions(ratio=0.3))} == {"within"}
    even = candidates(wide, PlanOptions(ratio=0.3, head_multiple=2, heads_mode="groups"))
    assert [budget.key_value_heads for budget in even] == [4, 2]


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("llama-gqa", {"ratio": 0.2, "only": "neurons"}, "only settles"),
        ("llama-gqa", {"ratio": 0.2, "heads_ratio": 0.25}, "heads_ratio settles"),
        ("llama-gqa", {"heads_ratio": 0.25, "neurons_ratio": 0.25}, "heads_ratio and neurons_ratio settles"),
        ("opt-mha", {"ratio": 0.2}, "heads stay"),
    ],
)
def test_where_shares_are_settled_there_is_one_candidate(
    model: str, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    shape = shape_of(find(model))
    with caplog.at_level(logging.INFO, logger="amprune"):
        (budget,) = candidates(shape, PlanOptions(**options))
    assert reason in caplog.text
    plan = make_plan(scores_of(shape), **options)
    assert counts(budget) == (
        plan.shape_after.num_attention_heads, plan.shape_after.num_key_value_heads, plan.shape_after.intermediate_size,
    )  # fmt: skip


def test_a_budget_that_nothing_spends_is_refused_as_in_a_plan() -> None:
    with pytest.raises(PlanError, match="cannot be reached"):
        candidates(shape_of(GQA), PlanOptions(ratio=0.999))
    with pytest.raises(PlanError, match="give a ratio"):
        candidates(shape_of(GQA), PlanOptions())


# Damage


def divergence(dense: PreTrainedModel, other: PreTrainedModel, samples: CalibrationSet) -> tuple[float, float]:
    """KL a token and loss a predicted token, sample by sample, in float64 probabilities."""
    kl, loss, predicted = 0.0, 0.0, 0
    for sample in samples.samples:
        ids = torch.tensor([sample])
        with torch.no_grad():
            p, q = (torch.softmax(model(ids).logits[0].double(), -1) for model in (dense, other))
        kl += float((p * (p / q).log()).sum())
        loss -= float(q[:-1].log().gather(1, ids[0, 1:, None]).sum())
        predicted += len(sample) - 1
    return kl / samples.tokens, loss / predicted


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-gqa", "phi3-gqa", "cohere-mha", "gpt2-mha", "opt-mha"])
def test_the_damage_is_that_of_the_sliced_model(name: str) -> None:
    tiny = find(name)
    model, architecture = loud_model(tiny), architecture_of(tiny)
    scores = scores_of(architecture.shape)
    # Of no weights in particular: the scores are not these weights'.
    plans = [replace(make_plan(scores, ratio=ratio), provenance={}) for ratio in (0.1, 0.25)]
    changes = [partial(masked, model, plan, architecture) for plan in plans]
    dense, found = measure_changes(model, changes, samples=HELD_OUT, batch_tokens=64)
    assert dense == Damage(0.0, pytest.approx(divergence(model, model, HELD_OUT)[1], rel=1e-5))
    for plan, damage in zip(plans, found, strict=True):
        kl, loss = divergence(model, prune_model(model, plan), HELD_OUT)
        assert kl > 1e-4
        assert damage.kl == pytest.approx(kl, rel=1e-3)
        assert damage.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_loses_nothing_takes_no_damage_and_stays_as_it_was(dtype: torch.dtype) -> None:
    model, architecture = loud_model(GQA).to(dtype), architecture_of(GQA)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = make_plan(scores_of(architecture.shape), budget=Budget("groups", 12, 4, 80))
    for size in (8, 64, 4096):
        dense, (damage,) = measure_changes(
            model, [partial(masked, model, plan, architecture)], samples=HELD_OUT, batch_tokens=size
        )
        assert damage.kl == pytest.approx(0, abs=1e-6)
        assert damage.loss == pytest.approx(dense.loss)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_long_samples_are_taken_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, architecture = loud_model(GQA), architecture_of(GQA)
    change = partial(masked, model, make_plan(scores_of(architecture.shape), ratio=0.2), architecture)
    whole = measure_changes(model, [change], samples=HELD_OUT)
    monkeypatch.setattr("amprune.search.damage.CHUNK", 7)
    parts = measure_changes(model, [change], samples=HELD_OUT)
    assert parts[1][0].kl == pytest.approx(whole[1][0].kl, rel=1e-4)
    assert parts[1][0].loss == pytest.approx(whole[1][0].loss)


def test_samples_and_logits_that_tell_nothing_are_refused() -> None:
    model = loud_model(GQA)
    for samples, message in (
        (CalibrationSet("short", ((5,), (6,))), "no sample of the calibration set 'short' has two tokens"),
        (CalibrationSet("other", ((5, 9999),)), "token id 9999"),
    ):
        with pytest.raises(ScoresError, match=message):
            measure_changes(model, [], samples=samples)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(torch.nan)
    with pytest.raises(ScoresError, match="is not finite"):
        measure_changes(model, [], samples=HELD_OUT)


# The choice


def planted(tiny: Tiny, module: str) -> tuple[PreTrainedModel, Architecture, ImportanceScores]:
    """A model of which attention, or of which the MLPs, give nothing."""
    model, architecture = loud_model(tiny), architecture_of(tiny)
    with torch.no_grad():
        for layer in range(architecture.shape.num_layers):
            model.get_parameter(f"model.layers.{layer}.{module}.weight").zero_()
    return model, architecture, scores_of(architecture.shape)


@pytest.mark.parametrize("tiny", [MHA, GQA], ids=lambda tiny: tiny.id)
def test_what_adds_nothing_is_what_goes(tiny: Tiny) -> None:
    options = PlanOptions(ratio=0.15)
    heads = allocate(*planted(tiny, "self_attn.o_proj"), HELD_OUT, options)
    assert heads.chosen.budget.neurons == max(found.budget.neurons for found in heads.candidates) > 60
    assert heads.chosen.budget.query_heads < tiny.entries["num_attention_heads"]
    neurons = allocate(*planted(tiny, "mlp.down_proj"), HELD_OUT, options)
    assert counts(neurons.chosen.budget)[0] == tiny.entries["num_attention_heads"]
    assert neurons.chosen.kl == pytest.approx(0, abs=1e-6)


def test_the_choice_is_recorded_and_becomes_a_plan() -> None:
    model, architecture, scores = planted(GQA, "self_attn.o_proj")
    options = PlanOptions(ratio=0.15, order="reversed")
    found = allocate(model, architecture, scores, HELD_OUT, options)
    assert tuple(candidate.budget for candidate in found.candidates) == candidates(architecture.shape, options)
    plan = plan_of(scores, found, options)
    assert plan.ratio_actual == found.chosen.ratio
    assert plan.ratio_target == 0.15
    record = plan.provenance["allocation"]
    assert record["held_out"]["sha256"] == HELD_OUT.sha256
    chosen = record["candidates"][record["chosen"]]
    assert chosen["damage"] == {"kl": found.chosen.kl, "loss": found.chosen.damage.loss}
    again = make_plan(scores, budget=Budget(**chosen["budget"]), ratio=0.15, order="reversed")
    assert again.layers == plan.layers
    assert again.options == plan.options


def test_a_clear_winner_is_not_refitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "NEAR", 1.0)
    model, architecture = loud_model(GQA), architecture_of(GQA)
    scores = scores_of(architecture.shape)

    def refit(plan: PruningPlan) -> Mapping[str, torch.Tensor]:
        raise AssertionError(plan)

    found = allocate(model, architecture, scores, HELD_OUT, PlanOptions(ratio=0.15), refit=refit)
    assert found.chosen == min(found.candidates, key=lambda candidate: candidate.damage.kl)


def test_a_plan_with_an_allocation_survives_its_file(tmp_path: Any) -> None:
    model, architecture, scores = planted(GQA, "self_attn.o_proj")
    plan = plan_of(
        scores, allocate(model, architecture, scores, HELD_OUT, PlanOptions(ratio=0.15)), PlanOptions(ratio=0.15)
    )
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").provenance == plan.provenance


def test_of_equal_damage_fewer_heads_go() -> None:
    budgets = [Budget("groups", 3, 1, 80), Budget("groups", 12, 4, 40), Budget("within", 8, 4, 60)]
    equal = [Candidate(budget, 0.2, Damage(0.5 + index * 1e-8, 1.0)) for index, budget in enumerate(budgets)]
    assert choose(equal).budget == budgets[1]
    assert choose([*equal, Candidate(budgets[0], 0.2, Damage(0.6, 1.0), Damage(0.1, 1.0))]).kl == 0.1


def test_of_many_candidates_a_few_are_measured_and_then_the_neighbours_of_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = {"num_attention_heads": 48, "num_key_value_heads": 48, "head_dim": 4, "intermediate_size": 800}
    shape = describe({**config_of(MHA), **many}).shape
    scores, options = scores_of(shape), PlanOptions(ratio=0.3)
    splits, passes = candidates(shape, options), list[int]()
    assert len(splits) > 2 * MOST

    def measure(model: Any, changes: Any, **_: Any) -> tuple[Damage, list[Damage]]:
        passes.append(len(changes))
        plans = [change.args[1] for change in changes]
        return Damage(0, 1), [Damage((plan.shape_after.num_attention_heads - 33) ** 2, 2.0) for plan in plans]

    monkeypatch.setattr("amprune.search.allocation.measure_changes", measure)
    found = allocate(None, None, scores, HELD_OUT, options)  # type: ignore[arg-type]
    assert found.chosen.budget.query_heads == 33
    assert passes[0] == MOST
    assert max(passes[1:]) <= 2
    assert len(found.candidates) == sum(passes) < len(splits)
    kept = [candidate.budget.query_heads for candidate in found.candidates]
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (splits[0].query_heads, splits[-1].query_heads)


def test_budgets_that_are_given_are_the_candidates() -> None:
    model, architecture, scores = planted(GQA, "mlp.down_proj")
    budgets = [Budget("groups", 9, 3, 64), Budget("groups", 12, 4, 16)]
    found = allocate(model, architecture, scores, HELD_OUT, PlanOptions(), budgets=budgets)
    assert [candidate.budget for candidate in found.candidates] == budgets
    assert found.chosen.budget == budgets[1]
    plan = plan_of(scores, found, PlanOptions())
    assert plan.ratio_target == plan.ratio_actual


# Refitted weights


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa", "gpt2-mha"])
def test_weights_of_a_pruned_model_are_measured_in_the_place_of_the_dense_ones(name: str) -> None:
    tiny = find(name)
    model, architecture = loud_model(tiny), architecture_of(tiny)
    plan = replace(make_plan(scores_of(architecture.shape), ratio=0.2), provenance={})
    pruned = prune_model(model, plan)
    names = list(cuts_by_tensor(architecture, plan))
    with torch.no_grad():
        for name in names:
            pruned.get_parameter(name).mul_(1.1)
    tensors = {name: pruned.get_parameter(name).detach() for name in names}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([HELD_OUT.samples[1]])
    with torch.inference_mode():
        expected = pruned(ids).logits
        whole = whole_tensors(model, plan, architecture, tensors)
        with masked(model, plan, architecture), swapped(model, whole):
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    model(ids).logits.sum().backward()  # the parameters take gradients as before


def test_the_best_few_are_judged_by_their_refitted_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "NEAR", math.inf)
    model, architecture = loud_model(GQA), architecture_of(GQA)
    scores, options, refitted = scores_of(architecture.shape), PlanOptions(ratio=0.15), list[PruningPlan]()

    def refit(plan: PruningPlan) -> Mapping[str, torch.Tensor]:
        assert not torch.is_inference_mode_enabled()
        refitted.append(plan)
        cuts = cuts_by_tensor(architecture, plan)
        good = len(refitted) == 2
        return {
            name: model.get_parameter(name).detach().index_select(cut.axis, kept) * (1.0 if good else 20.0)
            for name, (cut, kept) in cuts.items()
            if name.endswith("down_proj.weight")
        }

    found = allocate(model, architecture, scores, HELD_OUT, options, refit=refit)
    by_damage = sorted(found.candidates, key=lambda candidate: candidate.damage.kl)
    assert len(refitted) == FINALISTS
    assert [candidate.refitted is not None for candidate in by_damage] == [True] * 3 + [False] * (len(by_damage) - 3)
    assert found.chosen == by_damage[1]
    assert found.chosen.kl == pytest.approx(found.chosen.damage.kl, rel=1e-3)
    assert found.chosen.kl < by_damage[0].kl
    assert by_damage[0].damage.kl < found.chosen.damage.kl


def test_what_misses_the_ratio_by_a_point_more_than_another_is_not_chosen() -> None:
    def candidate(ratio: float, kl: float) -> Candidate:
        return Candidate(Budget("groups", 4, 2, 10), ratio, Damage(kl, kl))

    far, near, least = candidate(0.13, 0.1), candidate(0.118, 0.3), candidate(0.109, 0.2)
    options = PlanOptions(ratio=0.11)
    assert nearest([far, near, least], options) == [near, least]  # 2, 0.8 and 0.1 points
    assert nearest([far], options) == [far]
    assert nearest([far, near, least], PlanOptions(target_parameters=10)) == [far, near, least]
