"""Shapes that hardware likes: multiples of neurons, and heads and neurons that devices can share out."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_calibration import architecture_of
from tiny_models import NEURONS_ONLY, find, make_model
from tiny_plans import CONFIGS, HELD_OUT, fake_scores, kept, loud_model, ratio_of, scores_of, shape_of
from tiny_tokenizer import make_tokenizer
from typer.testing import CliRunner

from amprune import ImportanceScores, ModelShape, PlanError, PruningPlan, make_plan, prune
from amprune.cli.display import show_plan
from amprune.cli.options import app
from amprune.model.architecture import describe
from amprune.model.backends import heads_split
from amprune.plan.budget import find_budget, largest_ratio, unrounded
from amprune.plan.heads import Budget, choices_of_all_modes, kept_heads
from amprune.search import allocation as choice
from amprune.search.allocation import allocate, candidates, plan_of
from amprune.search.speedup import find_shapes
from amprune.settings import PRESETS, PlanOptions

SMOLLM2 = describe(
    {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
).shape  # fmt: skip
SMALL = sorted(name for name in CONFIGS if name not in ("Llama-2-7B", "Llama-3-8B", "Phi-2", "Falcon-7B"))
NAMES = [*SMALL, "Llama-2-7B", "Llama-3-8B", "Phi-2", "Falcon-7B"]
QUICK: dict[str, Any] = {"calibration": "builtin", "samples": 4, "max_length": 64}


def after(shape: ModelShape, budget: Budget) -> ModelShape:
    return shape.shrunk(
        query_heads=budget.query_heads, key_value_heads=budget.key_value_heads, neurons=budget.neurons
    )  # fmt: skip


def removed(shape: ModelShape, budget: Budget) -> float:
    return 1 - after(shape, budget).parameters / shape.parameters


def usual(width: int) -> int:
    """64, or in narrow layers the largest of its halves that is at most a quarter of the width."""
    return max(multiple for multiple in (64, 32, 16, 8, 4, 2, 1) if multiple == 1 or multiple <= width / 4)


def hardware_neurons(shape: ModelShape, heads: tuple[int, int], ratio: float) -> set[int]:
    """The neurons that the rule allows beside these heads, by trying every multiple of 256 and of the usual one."""

    def missed(neurons: int) -> float:
        return abs(ratio_of(shape, *heads, neurons) - ratio)

    def nearest(multiple: int) -> set[int]:
        widths = range(multiple, shape.intermediate_size + 1, multiple)
        least = min(map(missed, widths), default=1.0)
        return {width for width in widths if missed(width) <= least + 1e-12}

    wide = {width for width in nearest(256) if missed(width) <= 0.0025}
    multiple = usual(shape.intermediate_size)
    half = multiple * shape.neuron_parameters * shape.num_layers / shape.parameters / 2
    return wide or {width for width in nearest(multiple) if missed(width) <= half + 1e-9}


# Multiples of neurons


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(NAMES), ratio=st.floats(0.02, 0.6))
def test_each_number_of_heads_has_the_widest_multiple_that_fits(name: str, ratio: float) -> None:
    shape, options = shape_of(name), PlanOptions(ratio=ratio, neuron_multiple="hardware")
    everything = (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
    expected = {}
    for choices in choices_of_all_modes(shape, PlanOptions()):
        for gone in choices.removable:
            heads = kept_heads(shape, choices.mode, gone)
            if fitting := {n for n in hardware_neurons(shape, heads, ratio) if (*heads, n) != everything}:
                expected[heads] = fitting
    if not expected or shape.heads_refused is not None:
        return
    found = {(budget.query_heads, budget.key_value_heads): budget.neurons for budget in candidates(shape, options)}
    assert found.keys() == expected.keys()
    assert all(neurons in expected[heads] for heads, neurons in found.items())


@pytest.mark.parametrize(
    ("name", "ratio", "neurons", "multiple"),
    [
        ("SmolLM2", 0.2, 1024, 64),  # 1,024 is a multiple of 256, but 0.27 % of the parameters beside the ratio
        ("SmolLM2", 0.3, 768, 64),
        ("SmolLM2", 0.198, 1024, 256),
        ("SmolLM2", 0.15, 1152, 64),
        ("Llama-3-8B", 0.2, 10240, 256),
        ("llama-gqa", 0.2, 16, 16),
    ],
)
def test_the_plan_says_which_multiple_it_has(name: str, ratio: float, neurons: int, multiple: int) -> None:
    scores = scores_of(SMOLLM2) if name == "SmolLM2" else fake_scores(name)
    plan = make_plan(scores, ratio=ratio, neuron_multiple="hardware", only="neurons")
    assert kept(plan)[2] == neurons
    assert plan.options["neuron_multiple"] == multiple
    assert plan.ratio_target == ratio
    again = make_plan(scores, ratio=ratio, neuron_multiple=multiple, only="neurons")
    assert again == plan
    if multiple == 256:
        assert abs(plan.ratio_actual - ratio) <= 0.0025


@pytest.mark.parametrize("name", ["Llama-3-8B", "Qwen2.5-0.5B", "llama-gqa", "llama-mha"])
def test_a_number_of_parameters_is_not_exceeded_for_the_sake_of_a_multiple(name: str) -> None:
    shape, seen = shape_of(name), set[int]()
    for share in (0.97, 0.9, 0.8, 0.75):
        target = round(share * shape.parameters)
        for budget in candidates(shape, PlanOptions(target_parameters=target, neuron_multiple="hardware")):

            def short(neurons: int, budget: Budget = budget, target: int = target) -> int:
                return target - after(shape, replace(budget, neurons=neurons)).parameters

            most = {
                multiple: max((n for n in range(0, shape.intermediate_size + 1, multiple) if short(n) >= 0), default=0)
                for multiple in (256, usual(shape.intermediate_size))
            }
            fits = most[256] > 0 and short(most[256]) <= 0.0025 * shape.parameters
            multiple = 256 if fits else usual(shape.intermediate_size)
            assert budget.neurons == most[multiple]
            assert short(budget.neurons) < multiple * step(shape) * shape.parameters
            seen.add(multiple)
    assert seen == ({64, 256} if shape.intermediate_size > 256 else {16})


@pytest.mark.parametrize("width", [2, 3, 4, 7, 15, 80, 100, 255, 256, 300])
def test_narrow_layers_have_at_least_four_multiples(width: int) -> None:
    shape = describe({**CONFIGS["llama-gqa"], "intermediate_size": width}).shape
    budget = find_budget(shape, PlanOptions(neurons_ratio=0.5, only="neurons", neuron_multiple="hardware"))
    assert budget.neurons % usual(width) == 0
    assert abs(budget.neurons - width / 2) <= usual(width) / 2
    plan = make_plan(scores_of(shape), neurons_ratio=0.5, only="neurons", neuron_multiple="hardware")
    assert plan.options["neuron_multiple"] == usual(width)


@pytest.mark.parametrize("asked", [{"ratio": 0.01}, {"ratio": 0.004}], ids=str)
def test_what_would_remove_nothing_gets_a_narrower_multiple(asked: dict[str, Any]) -> None:
    for shape in (SMOLLM2, shape_of("llama-gqa"), shape_of("gpt2-mha")):
        plan = make_plan(scores_of(shape), **asked, neuron_multiple="hardware")
        multiple = plan.options["neuron_multiple"]
        assert 0 < plan.ratio_actual <= plan.ratio_target + multiple / 2 * step(shape) + 1e-9
        assert multiple < usual(shape.intermediate_size)
        assert plan.shape_after.intermediate_size % multiple == 0


def step(shape: ModelShape) -> float:
    """One neuron in every layer, as a share of the parameters."""
    return shape.neuron_parameters * shape.num_layers / shape.parameters


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "gpt2-mha", "Qwen2.5-0.5B"])
def test_what_is_out_of_reach_of_the_multiple_is_reached_by_a_narrower_one_or_refused_as_without(name: str) -> None:
    shape, scores = shape_of(name), fake_scores(name)
    largest = largest_ratio(shape, PlanOptions())
    plan = make_plan(scores, ratio=largest, neuron_multiple="hardware")
    assert plan.ratio_actual == pytest.approx(largest, abs=1.001 * step(shape))
    for ratio in (1e-6, 0.999):
        with pytest.raises(PlanError) as exact:
            make_plan(scores, ratio=ratio)
        with pytest.raises(PlanError, match=re.escape(str(exact.value))):
            make_plan(scores, ratio=ratio, neuron_multiple="hardware")


def test_the_presets_differ_in_their_multiples() -> None:
    assert PRESETS["paper"].pruning.neuron_multiple == 1
    assert PRESETS["best"].pruning.neuron_multiple == "hardware"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers that are just wide enough for multiples of 64."""
    folder, tiny = tmp_path_factory.mktemp("models") / "dense", find("llama-gqa")
    make_model(replace(tiny, entries={**tiny.entries, "intermediate_size": 320})).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_best_has_multiples_of_64_and_one_by_hand_or_the_paper_does_not(dense: Path, tmp_path: Path) -> None:
    quick = {**QUICK, "ratio": 0.2, "reconstruct": False}
    best = prune(dense, tmp_path / "best", **quick)
    assert best.verification.passed
    assert best.plan.shape_after.intermediate_size % 64 == 0
    assert best.plan.options["neuron_multiple"] == 64
    table = best.plan.provenance["allocation"]["candidates"]
    assert len(table) > 2
    assert {one["budget"]["neurons"] % 64 for one in table} == {0}
    for multiple in (1, 10):
        plan = prune(dense, tmp_path / f"{multiple}", **quick, allocate=False, neuron_multiple=multiple).plan
        assert plan.shape_after.intermediate_size % multiple == 0
        assert abs(plan.ratio_actual - 0.2) <= multiple / 2 * step(plan.shape_before) + 1e-9
        assert plan.options["neuron_multiple"] == multiple
    paper = prune(dense, tmp_path / "paper", **QUICK, ratio=0.2, preset="paper").plan
    assert abs(paper.ratio_actual - 0.2) <= step(paper.shape_before) / 2 + 5e-5


def test_whole_blocks_go_under_best_as_before(dense: Path, tmp_path: Path) -> None:
    plan = prune(dense, tmp_path / "out", ratio=0.4, criterion="depth", protect_first=0, protect_last=0, **QUICK).plan
    assert plan.shape_after.num_layers == 1
    with pytest.raises(PlanError, match="neuron_multiple is 64, but means nothing where whole blocks are removed"):
        prune(dense, tmp_path / "no", ratio=0.4, criterion="depth", neuron_multiple=64, **QUICK)


# Candidates are compared at equal cost


def quiet_attention() -> tuple[Any, Any, ImportanceScores]:
    """A model in which a head adds less than its parameters would in neurons, but not by much."""
    model, architecture = loud_model(find("llama-mha")), architecture_of(find("llama-mha"))
    with torch.no_grad():
        for layer in range(architecture.shape.num_layers):
            model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight").mul_(0.45)
    return model, architecture, scores_of(architecture.shape)


def test_no_split_looks_better_for_removing_less() -> None:
    """Rounded to 16 of 80 neurons, one candidate removes 8.1 % and the other 12.2 %: the milder wins, as they stand."""
    model, architecture, scores = quiet_attention()
    options = PlanOptions(ratio=0.1, neuron_multiple="hardware")
    rounded = candidates(architecture.shape, options)
    as_they_stand = allocate(model, architecture, scores, HELD_OUT, options, budgets=rounded)
    assert as_they_stand.chosen.ratio == min(candidate.ratio for candidate in as_they_stand.candidates) < 0.09
    fair = allocate(model, architecture, scores, HELD_OUT, options)
    assert [candidate.budget for candidate in fair.candidates] == list(rounded)
    assert fair.chosen.budget == rounded[0] != as_they_stand.chosen.budget
    exact = allocate(model, architecture, scores, HELD_OUT, PlanOptions(ratio=0.1))
    assert fair.chosen.budget.query_heads == exact.chosen.budget.query_heads
    assert [candidate.kl for candidate in fair.candidates] == [candidate.kl for candidate in exact.candidates]


@pytest.mark.parametrize("asked", [{"ratio": 0.2}, {"target_parameters": 70_000}], ids=str)
@pytest.mark.parametrize("multiple", ["hardware", 20])
def test_every_candidate_is_measured_at_the_share_that_was_asked_for(
    asked: dict[str, Any], multiple: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, masked_plans = shape_of("llama-gqa"), list[PruningPlan]()
    own = choice.masked
    monkeypatch.setattr(choice, "masked", lambda model, plan, a: masked_plans.append(plan) or own(model, plan, a))
    options, model = PlanOptions(**asked, neuron_multiple=multiple), loud_model(find("llama-gqa"))
    found = allocate(model, architecture_of(find("llama-gqa")), scores_of(shape), HELD_OUT, options)
    share = asked.get("ratio", 1 - asked.get("target_parameters", 0) / shape.parameters)
    assert masked_plans
    for plan in masked_plans:
        less = plan.ratio_actual - share
        beyond = kept(plan)[2] == shape.intermediate_size  # all neurons stay, and the heads alone remove more
        assert abs(less) <= step(shape) / 2 + 1e-9 or 0 <= less <= step(shape) or beyond
    for candidate in found.candidates:
        assert candidate.budget.neurons % (16 if multiple == "hardware" else multiple) == 0
        assert candidate.ratio == pytest.approx(removed(shape, candidate.budget))
        exact = unrounded(shape, candidate.budget, options)
        assert candidate.measured_neurons == (None if exact == candidate.budget else exact.neurons)
    plan = plan_of(scores_of(shape), found, options)
    assert plan.ratio_actual == pytest.approx(found.chosen.ratio)
    record = plan.provenance["allocation"]["candidates"]
    assert [one["measured_neurons"] for one in record] == [one.measured_neurons for one in found.candidates]


def test_without_a_multiple_what_is_measured_is_what_is_kept() -> None:
    for name in ("llama-mha", "Llama-3-8B"):
        options = PlanOptions(ratio=0.2)
        assert all(unrounded(shape_of(name), b, options) == b for b in candidates(shape_of(name), options))


# Tensor parallelism


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NAMES),
    devices=st.sampled_from([2, 3, 4, 6, 8]),
    mode=st.sampled_from([None, "groups", "within"]),
    only=st.sampled_from([None, None, "neurons", "heads"]),
    asked=st.sampled_from([{"ratio": 0.08}, {"ratio": 0.2}, {"ratio": 0.35}, {"share": 0.8}]),
    multiple=st.sampled_from([1, 8, "hardware"]),
    head_multiple=st.sampled_from([1, 1, 2]),
)
def test_what_is_kept_can_be_shared_out(
    name: str, devices: int, mode: Any, only: Any, asked: dict[str, float], multiple: Any, head_multiple: int
) -> None:
    shape = shape_of(name)
    size = {"ratio": asked["ratio"]} if "ratio" in asked else {"target_parameters": round(0.8 * shape.parameters)}
    options: dict[str, Any] = {
        **size, "heads_mode": mode, "only": only, "neuron_multiple": multiple, "head_multiple": head_multiple,
    }  # fmt: skip
    splits = PlanOptions(**options, tensor_parallel=devices)
    possible = any(
        heads_split(*kept_heads(shape, choices.mode, gone), devices)
        for choices in choices_of_all_modes(shape, PlanOptions(heads_mode=mode, head_multiple=head_multiple, only=only))
        for gone in choices.removable
    )
    if not possible:
        with pytest.raises(
            PlanError, match=r"can be split over|cannot be removed|no number of heads is|shared out over"
        ):
            find_budget(shape, splits)
        return
    found: list[Budget] = []
    with suppress(PlanError):  # the devices are not what is in the way
        found = [find_budget(shape, splits), *candidates(shape, splits)]
    if not found:
        with pytest.raises(
            PlanError, match=r"reach|cannot be removed|shared out over|remove nothing|ask for a multiple"
        ):
            find_budget(shape, splits)
    for budget in found:
        assert heads_split(budget.query_heads, budget.key_value_heads, devices)
        assert budget.neurons % devices == 0
        by_groups = budget.heads_mode == "groups" or shape.group_size == 1
        if shape.heads_refused is None and only != "neurons":
            assert (budget.key_value_heads if by_groups else budget.query_heads) % head_multiple == 0
        if "target_parameters" in size:
            assert after(shape, budget).parameters <= size["target_parameters"]
        if multiple == 8 and only != "heads":
            assert budget.neurons % np.lcm(8, devices) == 0


def test_the_plan_says_over_how_many_devices_and_of_which_multiple_neurons_are() -> None:
    plan = make_plan(scores_of(SMOLLM2), ratio=0.2, neuron_multiple=64, tensor_parallel=3)
    assert kept(plan)[:2] == (9, 3)
    assert plan.options["tensor_parallel"] == 3
    assert plan.options["neuron_multiple"] == 192
    assert plan.shape_after.intermediate_size % 192 == 0
    assert make_plan(scores_of(SMOLLM2), ratio=0.2, neuron_multiple=192, tensor_parallel=3) == plan
    assert "tensor_parallel" not in make_plan(scores_of(SMOLLM2), ratio=0.2).options


@pytest.mark.parametrize(
    ("devices", "options", "expected"),
    [
        (2, {"ratio": 0.2}, (6, 2)),
        (2, {"ratio": 0.2, "heads_mode": "groups"}, (6, 2)),
        (3, {"ratio": 0.3}, (9, 3)),
        (9, {"ratio": 0.2}, (9, 3)),
        (6, {"ratio": 0.2, "heads_mode": "within"}, (6, 3)),
        (6, {"ratio": 0.2}, (6, 2)),
        (6, {"ratio": 0.055}, (6, 3)),  # a group would be too much
    ],
    ids=str,
)
def test_heads_go_until_the_rest_can_be_split(devices: int, options: dict[str, Any], expected: tuple[int, int]) -> None:
    plan = make_plan(scores_of(SMOLLM2), **options, tensor_parallel=devices)
    assert kept(plan)[:2] == expected
    assert kept(plan)[2] % devices == 0


def test_where_no_number_of_groups_can_be_split_heads_go_within_groups() -> None:
    plan = make_plan(fake_scores("llama-gqa"), ratio=0.25, tensor_parallel=8)
    assert kept(plan)[:2] == (8, 4)
    assert plan.options["heads_mode"] == "within"
    with pytest.raises(PlanError, match="can be split over tensor_parallel=8 devices with heads_mode=groups"):
        make_plan(fake_scores("llama-gqa"), ratio=0.25, tensor_parallel=8, heads_mode="groups")


NOT_SPLIT: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "no number of heads": (
        "llama-gqa", 5, {},
        "no number of heads of the llama model, which has 12 query and 4 key-value heads, can be split over "
        "tensor_parallel=5 devices: .*: 2 (12/4, 8/4, 6/2, 4/4); 3 (9/3, 3/1); 4 (12/4, 8/4, 4/4); 6 (6/2); "
        "8 (8/4); 9 (9/3); 12 (12/4)",
    ),
    "by groups": (
        "llama-gqa", 8, {"heads_mode": "groups"}, "heads_mode=groups: .*: 2 (12/4, 6/2); 3 (9/3, 3/1); 4 (12/4); "
        "6 (6/2); 9 (9/3); 12 (12/4)",
    ),
    "within groups": (
        "llama-gqa", 3, {"heads_mode": "within"}, ": 2 (12/4, 8/4, 4/4); 4 (12/4, 8/4, 4/4); 8 (8/4); 12 (12/4)",
    ),
    "heads that must stay": ("gpt2-mha", 4, {}, "(heads stay: .*: 2 (6/6); 3 (6/6); 6 (6/6)"),
    "neurons alone": (
        "llama-gqa", 8, {"only": "neurons"}, "(heads stay: neurons alone are to go): .*: 2 (12/4); 4 (12/4)",
    ),
    "a multiple of heads": ("llama-mha", 4, {"head_multiple": 5}, "which has 6 query .*: 5 (5/5)"),
    "counts that transformers refuses": ("gemma2-mha", 5, {}, ": 2 (6/6, 4/4, 2/2); 3 (6/6, 3/3); 4 (4/4); 6 (6/6)"),
    "one key-value head": ("falcon-mqa", 4, {}, ": 2 (6/1); 3 (6/1); 6 (6/1)"),
    "neurons that stay": ("llama-gqa", 3, {"only": "heads"}, "the 80 neurons that stay cannot be shared out over"),
    "more devices than neurons": ("llama-gqa", 81, {}, "ask for a multiple of 81 neurons, but a layer has 80"),
    "multiples that do not go together": ("llama-gqa", 4, {"neuron_multiple": 27}, "ask for a multiple of 108 neurons"),
    **{
        f"{devices} devices": ("llama-gqa", devices, {}, f"tensor_parallel is {devices}, expected a number of devices")
        for devices in (0, -2, 1.5, True)
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "devices", "options", "message"), NOT_SPLIT.values(), ids=NOT_SPLIT)
def test_what_cannot_be_split_is_refused_with_what_can(
    name: str, devices: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        make_plan(fake_scores(name), ratio=0.2, tensor_parallel=devices, **options)
    for size, listed in re.findall(r"(\d+) \(((?:\d+/\d+(?:, )?)+)\)", str(caught.value)):
        assert all(heads_split(*map(int, pair.split("/")), int(size)) for pair in listed.split(", "))


@pytest.mark.parametrize("name", [tiny.id for tiny in NEURONS_ONLY if tiny.variant == "mha"])
def test_of_a_family_that_keeps_its_heads_the_dense_counts_decide(name: str) -> None:
    plan = make_plan(fake_scores(name), ratio=0.1, tensor_parallel=3)
    assert kept(plan)[0] == 6
    assert kept(plan)[2] % 3 == 0


def test_shares_by_hand_keep_what_can_be_split() -> None:
    scores = fake_scores("llama-gqa")
    assert kept(make_plan(scores, heads_ratio=0.25, neurons_ratio=0.3, tensor_parallel=2)) == (12, 4, 56)
    assert kept(make_plan(scores, heads_ratio=0.5, neurons_ratio=0, tensor_parallel=2)) == (6, 2, 80)
    assert kept(make_plan(scores, heads_ratio=0.5, neurons_ratio=0, tensor_parallel=3)) == (9, 3, 78)


def test_a_budget_that_is_given_has_to_suit_the_devices() -> None:
    scores = fake_scores("llama-gqa")
    assert kept(make_plan(scores, budget=Budget("groups", 6, 2, 40), tensor_parallel=2)) == (6, 2, 40)
    with pytest.raises(PlanError, match="keeps 9 query and 3 key-value heads, expected"):
        make_plan(scores, budget=Budget("groups", 9, 3, 40), tensor_parallel=2)
    with pytest.raises(PlanError, match="keeps 41 neurons, expected a multiple of tensor_parallel=2"):
        make_plan(scores, budget=Budget("groups", 6, 2, 41), tensor_parallel=2)


def test_shapes_that_reach_a_speedup_can_be_split() -> None:
    shape = shape_of("llama-gqa")
    options = PlanOptions(neuron_multiple="hardware", tensor_parallel=6)
    found = find_shapes(shape, 1.3, options, lambda after: shape.parameters / after.parameters)
    assert found.budgets
    for budget in found.budgets:
        assert heads_split(budget.query_heads, budget.key_value_heads, 6)
        assert budget.neurons % 48 == 0


def test_blocks_go_where_the_dense_counts_suit_the_devices() -> None:
    shape = replace(SMOLLM2, num_layers=8)
    scores = ImportanceScores((), shape, "0" * 64, "depth", {}, {}, blocks=np.arange(8, dtype=np.float32))
    options: dict[str, Any] = {"ratio": 1.1 * shape.layer_parameters / shape.parameters, "protect_first": 0}
    plan = make_plan(scores, **options, tensor_parallel=3)
    assert plan.shape_after.num_layers == 7
    assert plan.options["tensor_parallel"] == 3
    with pytest.raises(
        PlanError, match="tensor_parallel is 2, but blocks that stay keep their units: 9 query and 3 key"
    ):
        make_plan(scores, **options, tensor_parallel=2)
    with pytest.raises(PlanError, match="tensor_parallel is 0, expected"):
        make_plan(scores, **options, tensor_parallel=0)


# The command line


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_prune_splits_and_says_so(dense: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", "builtin", "--samples", 4, "--max-length", 64, "--no-reconstruct")
    out = tmp_path / "out"
    code, shown, errors = run("prune", dense, out, "--ratio", 0.2, "--tensor-parallel", 2, *arguments)
    assert code == 0, errors
    assert "Heads and neurons can be split over 2 devices (tensor parallelism)." in shown
    config = json.loads((out / "config.json").read_text())
    assert heads_split(config["num_attention_heads"], config["num_key_value_heads"], 2)
    assert config["intermediate_size"] % 64 == 0
    assert run("verify", out, "--dense", dense)[0] == 0
    code, shown, _ = run("plan", out / "amprune/scores.safetensors", "-o", tmp_path / "p", "--ratio", 0.2,
                         "--tensor-parallel", 6, "--preset", "paper", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(shown)["tensor_parallel"] == json.loads(shown)["neuron_multiple"] == 6
    code, _, errors = run("prune", dense, tmp_path / "no", "--ratio", 0.2, "--tensor-parallel", 5, *arguments)
    assert code == 1
    assert "can be split over tensor_parallel=5 devices" in errors
    code, _, errors = run("prune", dense, tmp_path / "no", "--target", "weight-bytes=300kB", "--tensor-parallel", 5)
    assert code == 1
    assert "can be split over tensor_parallel=5 devices" in errors
    assert not (tmp_path / "no").exists()


def test_run_takes_both_options(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--ratio", 0.2, "--calibration", "builtin", "--samples", 4, "--no-reconstruct")
    arguments = (*arguments, "--no-allocate", "--tensor-parallel", 2)
    code, _, errors = run("run", dense, tmp_path / "out", *arguments)
    assert code == 0, errors
    plan = PruningPlan.load(tmp_path / "out" / "amprune" / "plan.json")
    assert plan.options["tensor_parallel"] == 2
    assert plan.options["neuron_multiple"] == 64
    asked: dict[str, Any] = {}

    def stop(_model: Any, _out: Any, settings: Any, **_: Any) -> None:
        asked.update(vars(settings))
        raise PlanError("enough")

    monkeypatch.setattr("amprune.pipeline.prune", stop)
    assert run("run", dense, tmp_path / "by-hand", *arguments, "--neuron-multiple", 10)[0] == 1
    assert (asked["neuron_multiple"], asked["tensor_parallel"]) == (10, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.2, "neuron_multiple": "hardware"},
         "Asked for 20.00%; the nearest is 19.73% (neurons are kept in multiples of 64; for the exact ratio: "
         "--neuron-multiple 1)."),
        ({"ratio": 0.2, "tensor_parallel": 9, "neuron_multiple": 64}, "(neurons are kept in multiples of 576; for a "
         "nearer ratio: --neuron-multiple 1)."),
        ({"target_parameters": 107_000_000, "neuron_multiple": 64},
         "Asked for 20.45%; the least that meets the target is 22.20% (neurons are kept in multiples of 64;"),
        ({"ratio": 0.07, "only": "heads"}, "Asked for 7.00%; the nearest with these options is 6.58%."),
        ({"ratio": 0.2}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_a_ratio_that_is_not_met_says_why_and_how_it_can_be(
    options: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    monkeypatch.setattr("amprune.cli.display.stdout", Console(highlight=False, soft_wrap=True, width=200))
    show_plan(make_plan(scores_of(SMOLLM2), **options), "Plan")
    shown = capsys.readouterr().out
    assert said in shown
    assert ("Asked for" in shown) == bool(said)
