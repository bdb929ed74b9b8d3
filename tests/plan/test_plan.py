"""Plans: the exact budget, which units stay, and that no nonsense is made, read or applied."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import NEURONS_ONLY, PRUNABLE_HEADS, Tiny, find, make_model, save_model
from tiny_plans import CONFIGS, PARAMETERS, REAL, fake_scores, kept, ratio_of, shape_of

from amprune import CalibrationSet, ImportanceScores, ModelShape, PlanError, PruningPlan, apply_plan, make_plan, score
from amprune.cut.slicing import prune_model
from amprune.errors import UnsupportedModelError
from amprune.model.architecture import describe
from amprune.plan.artefact import check_plan
from amprune.plan.budget import find_budget, largest_ratio
from amprune.plan.heads import head_choices
from amprune.scoring.scores import LayerScores
from amprune.settings import PlanOptions

MODES = ("groups", "within")
ORDERS = ("amp", "reversed", "random")
KINDS = ("query_heads", "key_value_heads", "neurons")


def half_a_neuron(shape: ModelShape) -> float:
    """Half a neuron in every layer, as a share of the parameters."""
    return shape.neuron_parameters * shape.num_layers / shape.parameters / 2


# The budget


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_their_published_number_of_parameters(name: str) -> None:
    assert shape_of(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("exact", [False, True], ids=["as printed", "unrounded"])
@pytest.mark.parametrize(
    ("printed", "heads", "neurons"), [(0.0901, 29, 9976), (0.2102, 25, 8600), (0.3003, 22, 7568), (0.5106, 15, 5160)]
)
def test_the_ratios_of_the_paper_give_its_shapes(printed: float, heads: int, neurons: int, exact: bool) -> None:
    ratio = ratio_of(shape_of("Llama-2-7B"), heads, heads, neurons) if exact else printed
    plan = make_plan(fake_scores("Llama-2-7B"), ratio=ratio)
    assert kept(plan) == (heads, heads, neurons)
    assert round(plan.ratio_actual, 4) == printed


def test_heads_alone_at_30_percent_leave_llama_2_two_heads() -> None:
    plan = make_plan(fake_scores("Llama-2-7B"), ratio=0.3003, only="heads")
    assert kept(plan) == (2, 2, 11008)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(CONFIGS)), mode=st.sampled_from(MODES), share=st.floats(0, 1))
def test_any_ratio_up_to_the_largest_is_met_within_half_a_neuron(name: str, mode: str, share: float) -> None:
    shape = shape_of(name)
    options = PlanOptions(heads_mode=mode)  # type: ignore[arg-type]
    largest = largest_ratio(shape, options)
    ratio = share * largest
    if ratio < 1.01 * half_a_neuron(shape) or _in_a_gap(shape, options, ratio):
        return
    budget = find_budget(shape, PlanOptions(ratio=ratio, heads_mode=mode))  # type: ignore[arg-type]
    actual = ratio_of(shape, budget.query_heads, budget.key_value_heads, budget.neurons)
    assert abs(actual - ratio) <= half_a_neuron(shape) + 1e-9


def _in_a_gap(shape: ModelShape, options: PlanOptions, ratio: float) -> bool:
    """Tells a ratio between what all neurons give with one number of heads and what the next number gives alone."""
    choices, near = head_choices(shape, options), half_a_neuron(shape) * (1 + 1e-9)
    neurons = (shape.intermediate_size - 1) * shape.neuron_parameters * shape.num_layers / shape.parameters
    low = [removed * choices.cost / shape.parameters for removed in choices.removable]
    return not any(start - near <= ratio <= start + neurons + near for start in low)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("Llama-2-7B", "Llama-3-8B", "Phi-2", "Falcon-7B")])
@pytest.mark.parametrize("mode", MODES)
def test_plans_of_every_family_meet_their_ratio(name: str, mode: Any) -> None:
    shape, scores = shape_of(name), fake_scores(name)
    options = PlanOptions(heads_mode=mode)
    largest = largest_ratio(shape, options)
    for ratio in (2.5 * half_a_neuron(shape), 0.1, 0.2, 0.25 + 1 / 700, 0.6 * largest, largest - 1e-6, largest):
        if _in_a_gap(shape, options, ratio):
            continue
        plan = make_plan(scores, ratio=ratio, heads_mode=mode)
        check_plan(plan)
        # A ratio of four decimals may stand for the equal shares that print as it.
        allowed = max(half_a_neuron(shape), 5e-5) if ratio == round(ratio, 4) else half_a_neuron(shape)
        assert abs(plan.ratio_actual - ratio) <= allowed + 1e-9
        assert plan.ratio_target == ratio
        assert plan.ratio_actual == pytest.approx(ratio_of(shape, *kept(plan)), abs=1e-12)


@pytest.mark.parametrize("tiny", [tiny for tiny in PRUNABLE_HEADS if tiny.variant == "gqa"], ids=lambda tiny: tiny.id)
def test_a_ratio_between_two_numbers_of_groups_is_met_or_refused_with_its_neighbours(tiny: Tiny) -> None:
    shape, scores = shape_of(tiny.id), fake_scores(tiny.id)
    options = PlanOptions()
    for ratio in np.linspace(0.01, largest_ratio(shape, options), 120).tolist():
        if not _in_a_gap(shape, options, ratio):
            assert make_plan(scores, ratio=ratio).ratio_actual == pytest.approx(ratio, abs=half_a_neuron(shape) + 1e-9)
            continue
        with pytest.raises(PlanError, match="nearest reachable are") as caught:
            make_plan(scores, ratio=ratio)
        below, above = map(float, re.findall(r"are ([\d.]+) and ([\d.]+)", str(caught.value))[0])
        assert below < ratio < above
        for near in (below, above):
            assert make_plan(scores, ratio=near).ratio_actual == pytest.approx(near, abs=half_a_neuron(shape) + 1e-9)


@pytest.mark.parametrize("ratio", [0.05, 0.11, 0.2, 0.37, 0.5])
@pytest.mark.parametrize("name", ["Llama-2-7B", "Phi-2"])
def test_heads_with_their_own_key_value_head_round_to_the_nearest(name: str, ratio: float) -> None:
    shape = shape_of(name)
    share = ratio * shape.parameters / (shape.attention_parameters + shape.mlp_parameters)
    budget = find_budget(shape, PlanOptions(ratio=ratio))
    assert budget.query_heads == budget.key_value_heads == 32 - round(share * 32)


@pytest.mark.parametrize("ratio", [0.05, 0.11, 0.2, 0.37])
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("name", ["Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-2B"])
def test_heads_that_share_a_key_value_head_round_down(name: str, mode: Any, ratio: float) -> None:
    shape = shape_of(name)
    share = ratio * shape.parameters / (shape.attention_parameters + shape.mlp_parameters)
    groups, size = shape.num_key_value_heads, shape.group_size
    budget = find_budget(shape, PlanOptions(ratio=ratio, heads_mode=mode))
    if mode == "within":
        # The key-value heads that stay hold a part of attention, so that more query heads have to go.
        wanted = share * shape.attention_parameters / (shape.num_layers * groups * shape.query_head_parameters)
        size -= math.floor(wanted)
    else:
        groups -= math.floor(share * groups)
    assert (budget.query_heads, budget.key_value_heads) == (groups * size, groups)


def test_multi_query_attention_is_pruned_within_its_one_group_by_default() -> None:
    plan = make_plan(fake_scores("llama-mqa"), ratio=0.3)
    assert plan.options["heads_mode"] == "within"
    assert 1 <= plan.shape_after.num_attention_heads < 6
    assert plan.shape_after.num_key_value_heads == 1


@pytest.mark.parametrize("mode", MODES)
def test_without_shared_key_value_heads_both_modes_are_the_same(mode: Any) -> None:
    scores = fake_scores("llama-mha")
    assert make_plan(scores, ratio=0.3, heads_mode=mode).layers == make_plan(scores, ratio=0.3).layers


# Options


def test_only_neurons_leaves_heads_and_only_heads_leaves_neurons() -> None:
    scores, shape = fake_scores("llama-gqa"), shape_of("llama-gqa")
    neurons = make_plan(scores, ratio=0.1, only="neurons")
    assert kept(neurons)[:2] == (12, 4)
    assert neurons.ratio_actual == pytest.approx(0.1, abs=half_a_neuron(shape))
    heads = make_plan(scores, ratio=0.1, only="heads", heads_mode="groups")
    assert kept(heads) == (9, 3, 80)
    assert kept(make_plan(scores, only="heads", heads_ratio=0.5)) == (6, 2, 80)
    assert kept(make_plan(scores, only="neurons", neurons_ratio=0.5)) == (12, 4, 40)


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "Llama-3-8B", "Gemma-2-2B"])
def test_a_share_set_by_hand_is_kept_and_the_other_kind_makes_up_the_rest(name: str) -> None:
    scores, shape = fake_scores(name), shape_of(name)
    by_heads = make_plan(scores, ratio=0.3, heads_ratio=0.5)
    assert kept(by_heads)[0] == shape.num_attention_heads // 2
    assert by_heads.ratio_actual == pytest.approx(0.3, abs=half_a_neuron(shape) + 1e-9)
    by_neurons = make_plan(scores, ratio=0.4, neurons_ratio=0.5)
    assert kept(by_neurons)[2] == shape.intermediate_size // 2
    choices = head_choices(shape, PlanOptions())
    assert abs(by_neurons.ratio_actual - 0.4) <= choices.cost / shape.parameters
    both = make_plan(scores, heads_ratio=0.5, neurons_ratio=0.25)
    assert kept(both)[0] == shape.num_attention_heads // 2
    assert kept(both)[2] == 0.75 * shape.intermediate_size
    assert both.ratio_target == both.ratio_actual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("neurons", [1, 16, 64])
@pytest.mark.parametrize("name", ["Llama-2-7B", "Llama-3-8B", "Gemma-2-2B"])
def test_multiples_divide_what_is_kept(name: str, neurons: int, heads: int, mode: Any) -> None:
    shape = shape_of(name)
    for ratio in (0.05, 0.2, 0.35, 0.45):
        budget = find_budget(
            shape, PlanOptions(ratio=ratio, heads_mode=mode, neuron_multiple=neurons, head_multiple=heads)
        )
        assert budget.neurons % neurons == 0
        by_group = mode == "groups" or shape.group_size == 1
        assert (budget.key_value_heads if by_group else budget.query_heads) % heads == 0
        actual = ratio_of(shape, budget.query_heads, budget.key_value_heads, budget.neurons)
        assert abs(actual - ratio) <= max(neurons * half_a_neuron(shape), 5e-5) + 1e-9


@pytest.mark.parametrize("name", ["gemma2-mha", "gemma2-gqa", "gemma3_text-gqa", "arcee-mha", "arcee-gqa"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("multiple", [1, 2])
def test_only_head_counts_that_transformers_accepts_are_kept(name: str, mode: Any, multiple: int) -> None:
    shape, scores = shape_of(name), fake_scores(name)
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.9):
        plan = make_plan(scores, heads_ratio=share, neurons_ratio=0.5, heads_mode=mode, head_multiple=multiple)
        query, key_value, _ = kept(plan)
        assert query in shape.query_head_counts
        counted = key_value if mode == "groups" or shape.group_size == 1 else query
        assert counted % multiple == 0
        describe({**CONFIGS[name], "num_attention_heads": query, "num_key_value_heads": key_value})


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "no number at all": ("llama-gqa", {}, "give a ratio, or both"),
    "heads_ratio alone": ("llama-gqa", {"heads_ratio": 0.2}, "give a ratio, or both"),
    "neurons_ratio alone": ("llama-gqa", {"neurons_ratio": 0.2}, "give a ratio, or both"),
    "only neurons alone": ("llama-gqa", {"only": "neurons"}, "give a ratio, or both"),
    **{
        f"ratio {ratio}": ("llama-gqa", {"ratio": ratio}, f"ratio is {ratio}, expected a number between 0 and 1")
        for ratio in (0, 0.0, -0.1, 1, 1.0, 1.5, 20, math.nan, math.inf, -math.inf)
    },
    **{
        f"{name} {share}": ("llama-gqa", {"ratio": 0.2, name: share}, f"{name} is {share}, expected at least 0")
        for name in ("heads_ratio", "neurons_ratio")
        for share in (-0.1, 1, math.nan, math.inf)
    },
    "order": ("llama-gqa", {"ratio": 0.2, "order": "best"}, "order is 'best', expected one of amp, reversed, random"),
    "only": ("llama-gqa", {"ratio": 0.2, "only": "mlp"}, "only is 'mlp', expected one of None, heads, neurons"),
    "mode": ("llama-gqa", {"ratio": 0.2, "heads_mode": "all"}, "heads_mode is 'all', expected one of"),
    "only heads and a share of neurons": (
        "llama-gqa", {"ratio": 0.2, "only": "heads", "neurons_ratio": 0.1}, "only=heads contradicts",
    ),
    "only neurons and a share of heads": (
        "llama-gqa", {"ratio": 0.2, "only": "neurons", "heads_ratio": 0.1}, "only=neurons contradicts",
    ),
    **{
        f"neuron_multiple {value}": (
            "llama-gqa", {"ratio": 0.2, "neuron_multiple": value}, f"neuron_multiple is {value}, expected 1 to 80",
        )
        for value in (0, -1, 81, 2.5, math.nan)
    },
    **{
        f"head_multiple {value}": (
            "llama-gqa", {"ratio": 0.2, "head_multiple": value}, f"head_multiple is {value}, expected 1 to 12",
        )
        for value in (0, 13, 1.5)
    },
    "head_multiple that no count meets": (
        "llama-gqa", {"ratio": 0.2, "head_multiple": 5}, "no number of heads is a multiple of 5: the llama model",
    ),
    "a multiple that removes more than the ratio": (
        "llama-gqa", {"ratio": 0.05, "head_multiple": 3}, "the smallest reachable is 0.14",
    ),
    "a share of heads that is more than the ratio": (
        "llama-gqa", {"ratio": 0.05, "heads_ratio": 0.75}, "the smallest reachable is 0.42",
    ),
    "a share of heads that leaves too much to neurons": (
        "llama-gqa", {"ratio": 0.5, "heads_ratio": 0.25}, "the largest reachable is 0.399",
    ),
    "a share of neurons that is more than the ratio": (
        "llama-gqa", {"ratio": 0.05, "neurons_ratio": 0.75}, "the smallest reachable is 0.1969",
    ),
    "a share of neurons that leaves too much to heads": (
        "llama-gqa", {"ratio": 0.8, "neurons_ratio": 0.25}, "the largest reachable is 0.48",
    ),
    "too small": ("llama-gqa", {"ratio": 1e-5}, "a ratio of 1e-05 would remove nothing.*step.* is 3.28e-03"),
    "too small for heads": (
        "llama-gqa", {"ratio": 0.01, "only": "heads"}, "a ratio of 0.01 would remove nothing.*step.* is 1.40e-01",
    ),
    "shares of nothing": (
        "llama-gqa", {"heads_ratio": 0, "neurons_ratio": 0}, "heads_ratio and neurons_ratio together would remove noth",
    ),
    "beyond the largest": ("llama-gqa", {"ratio": 0.7}, "the largest reachable is 0.679"),
    "beyond the largest without heads": (
        "gpt2-mha", {"ratio": 0.5}, r"the largest reachable is 0\.\d+ \(heads cannot be removed: .* ignores head_dim",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_and_contradictory_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(fake_scores(name), **options)


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.05, "only": "heads"}, {"ratio": 0.05, "heads_ratio": 0.2}, {"heads_ratio": 0.2, "neurons_ratio": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("name", [tiny.id for tiny in NEURONS_ONLY])
def test_heads_of_a_family_that_cannot_lose_them_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"heads of a \w+ model cannot be removed: "):
        make_plan(fake_scores(name), **options)


def test_a_family_that_cannot_lose_heads_is_pruned_by_neurons_alone() -> None:
    scores, shape = fake_scores("gpt2-mha"), shape_of("gpt2-mha")
    for options in ({"ratio": 0.1}, {"ratio": 0.1, "only": "neurons"}, {"ratio": 0.1, "heads_ratio": 0}):
        plan = make_plan(scores, **options)
        assert kept(plan)[0] == 6
        assert plan.ratio_actual == pytest.approx(0.1, abs=half_a_neuron(shape) + 1e-9)
    assert kept(make_plan(scores, neurons_ratio=0.5)) == (6, 6, 40)


@pytest.mark.parametrize(
    "options",
    [{}, {"heads_mode": "within"}, {"only": "neurons"}, {"only": "heads"}, {"neuron_multiple": 32},
     {"head_multiple": 2}, {"heads_ratio": 0.5}, {"neurons_ratio": 0.5}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "gemma2-gqa", "Llama-2-7B", "Qwen2.5-0.5B"])
def test_beyond_the_largest_ratio_the_error_names_one_that_works(name: str, options: dict[str, Any]) -> None:
    shape = shape_of(name)
    with pytest.raises(PlanError, match="the largest reachable is") as caught:
        find_budget(shape, PlanOptions(ratio=0.999, **options))
    stated = float(re.findall(r"largest reachable is ([\d.]+)", str(caught.value))[0])
    largest = largest_ratio(shape, PlanOptions(**options))
    assert largest - 1e-4 <= stated <= largest
    budget = find_budget(shape, PlanOptions(ratio=stated, **options))
    assert budget.neurons >= 1
    assert budget.query_heads >= 1


# Selection


def best(values: np.ndarray, count: int, order: str) -> list[int]:
    """Returns what stays, ascending; of equal scores the lower index."""
    return sorted(np.argsort(values if order == "reversed" else -values, kind="stable")[:count].tolist())


def expected_layer(layer: LayerScores, plan: PruningPlan, mode: str, order: str) -> dict[str, list[int]]:
    query, key_value, neurons = kept(plan)
    size = plan.shape_before.group_size
    groups = best(layer.groups, key_value, order) if mode == "groups" else list(range(len(layer.groups)))
    heads = [
        group * size + head
        for group in groups
        for head in best(layer.heads[group * size : (group + 1) * size], query // key_value, order)
    ]
    return {"query_heads": heads, "key_value_heads": groups, "neurons": best(layer.neurons, neurons, order)}


@pytest.mark.parametrize("order", ["amp", "reversed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "phi-mha", "gemma2-gqa", "Qwen2.5-0.5B"])
def test_the_best_units_stay(name: str, mode: Any, order: Any) -> None:
    scores = fake_scores(name)
    plan = make_plan(scores, heads_ratio=0.5, neurons_ratio=0.4, heads_mode=mode, order=order)
    for layer, found in zip(scores.layers, plan.layers, strict=True):
        expected = expected_layer(layer, plan, mode if scores.shape.group_size > 1 else "groups", order)
        assert {kind: list(getattr(found, kind)) for kind in KINDS} == expected


def test_ties_keep_the_lower_index() -> None:
    shape = shape_of("llama-gqa")
    same = LayerScores(*(np.ones(count, dtype=np.float32) for count in (12, 4, 80)))
    scores = ImportanceScores((same, same), shape, "0", "amp", {}, {})
    for order in ("amp", "reversed"):
        plan = make_plan(scores, heads_ratio=0.5, neurons_ratio=0.5, order=order)  # type: ignore[arg-type]
        for layer in plan.layers:
            assert layer.key_value_heads == (0, 1)
            assert layer.query_heads == tuple(range(6))
            assert layer.neurons == tuple(range(40))


def test_random_order_is_seeded_and_like_no_other() -> None:
    scores = fake_scores("Qwen2.5-0.5B")

    def neurons(order: Any, seed: int = 0) -> tuple[tuple[int, ...], ...]:
        return tuple(layer.neurons for layer in make_plan(scores, ratio=0.2, order=order, seed=seed).layers)

    assert neurons("random") == neurons("random")
    assert neurons("amp") == neurons("amp", seed=1)
    drawn = [neurons("random"), neurons("random", seed=1), neurons("amp"), neurons("reversed")]
    assert len(set(drawn)) == 4
    assert len(set(drawn[0])) == len(drawn[0]), "every layer has a draw of its own"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "phi3-mha", "Gemma-2-2B"])
def test_groups_stay_whole_and_layers_alike(name: str, mode: Any, order: Any) -> None:
    shape = shape_of(name)
    plan = make_plan(fake_scores(name), heads_ratio=0.5, neurons_ratio=0.3, heads_mode=mode, order=order)
    query, key_value, neurons = kept(plan)
    for layer in plan.layers:
        assert (len(layer.query_heads), len(layer.key_value_heads), len(layer.neurons)) == (query, key_value, neurons)
        readers = [head // shape.group_size for head in layer.query_heads]
        assert readers == sorted(layer.key_value_heads * (query // key_value))


def test_the_same_scores_give_the_same_plan() -> None:
    assert make_plan(fake_scores("glm-gqa"), ratio=0.2) == make_plan(fake_scores("glm-gqa"), ratio=0.2)


# The file


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "gpt2-mha"])
def test_a_plan_survives_its_file_and_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    plan = make_plan(fake_scores(name), ratio=0.15, seed=3)
    plan.save(tmp_path / "new" / "plan.json")
    loaded = PruningPlan.load(tmp_path / "new" / "plan.json")
    assert loaded == plan
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new" / "plan.json").read_bytes()
    assert json.loads((tmp_path / "again.json").read_text())["format"] == 2


def test_a_plan_that_cannot_be_written_is_a_plan_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"cannot write .*plan\.json"):
        make_plan(fake_scores("llama-gqa"), ratio=0.2).save(tmp_path / "file" / "plan.json")


@pytest.mark.process
def test_planning_imports_no_torch() -> None:
    code = """
import importlib, pkgutil, sys
import amprune.plan
names = [module.name for module in pkgutil.iter_modules(amprune.plan.__path__)]
for name in names:
    importlib.import_module(f"amprune.plan.{name}")
assert "make" in names
assert not {"torch", "numpy"} & set(sys.modules), "a heavy package was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


Content = dict[str, Any]


def _unit(layer: int, kind: str, position: int, value: object) -> Callable[[Content], None]:
    def edit(plan: Content) -> None:
        plan["layers"][layer][kind][position] = value

    return edit


def _field(name: str, value: object, *, of: str | None = None) -> Callable[[Content], None]:
    def edit(plan: Content) -> None:
        (plan[of] if of else plan)[name] = value

    return edit


def _drop(name: str, *, of: str | None = None) -> Callable[[Content], None]:
    def edit(plan: Content) -> None:
        del (plan[of] if of else plan)[name]

    return edit


def _swap(plan: Content) -> None:
    heads = plan["layers"][0]["query_heads"]
    heads[0], heads[1] = heads[1], heads[0]


def _fewer_in_one_layer(plan: Content) -> None:
    plan["layers"][1]["neurons"].pop()


def _reader_moved(plan: Content) -> None:
    """One key-value head is left with two readers, another with four."""
    layer = plan["layers"][1]
    layer["key_value_heads"], layer["query_heads"] = [0, 1], [0, 1, 3, 4, 5, 6]


def _uneven_readers(plan: Content) -> None:
    layer = plan["layers"][1]
    layer["key_value_heads"], layer["query_heads"] = [0, 1, 2], [0, 1, 2, 3, 4, 6]
    plan["layers"][0] = dict(layer)
    for name, value in (("num_key_value_heads", 3), ("num_attention_heads", 6)):
        plan["shape_after"][name] = value


def _readers_of_a_removed_head(plan: Content) -> None:
    layer = plan["layers"][1]
    layer["key_value_heads"], layer["query_heads"] = [0, 1], [0, 1, 2, 9, 10, 11]


def _last_layer_dropped(plan: Content) -> None:
    plan["layers"].pop()


def _layer_field(edit: Callable[[Content], None]) -> Callable[[Content], None]:
    return lambda plan: edit(plan["layers"][1])


NONSENSE: dict[str, tuple[Callable[[Content], None], str]] = {
    "duplicate unit": (_unit(1, "neurons", 1, 0), "layer 1, neurons: unit 0 is listed twice"),
    "unsorted": (_swap, r"layer 0, query_heads: unit \d+ comes after \d+; units must ascend"),
    "out of range": (_unit(1, "neurons", -1, 80), "layer 1, neurons: unit 80 is out of range, the model has 0 to 79"),
    "far out of range": (_unit(0, "query_heads", -1, 10**30), f"layer 0, query_heads: unit {10**30} is out of range"),
    "negative": (_unit(1, "key_value_heads", 0, -1), "layer 1, key_value_heads: unit -1 is out of range"),
    "unequal counts": (_fewer_in_one_layer, "layer 1, neurons: keeps 39 units, but shape_after says 40 in every layer"),
    "reader of a removed head": (
        _readers_of_a_removed_head, "layer 1: keeps query head 9 but not key-value head 3, which it reads",
    ),
    "reader moved": (_reader_moved, "layer 1: keeps query head 6 but not key-value head 2"),
    "uneven readers": (_uneven_readers, "layer 0: keeps 1 query heads for key-value head 2 and 3 for key-value head 0"),
    "float": (_unit(1, "neurons", 2, 3.0), "layer 1, neurons: entry 2 is 3.0, expected a whole number; make it"),
    "text": (_unit(1, "query_heads", 2, "3"), 'layer 1, query_heads: entry 2 is "3", expected a whole number'),
    "boolean": (_unit(0, "key_value_heads", 0, True), "layer 0, key_value_heads: entry 0 is true, expected a whole"),
    "null": (_unit(0, "neurons", 0, None), "layer 0, neurons: entry 0 is null, expected a whole number"),
    "nested": (_unit(0, "neurons", 0, [1]), r"layer 0, neurons: entry 0 is \[1\], expected a whole number"),
    "missing layer": (_last_layer_dropped, "has 1 layers, but the model has 2"),
    "layers no list": (_field("layers", {"0": 1}), "layers is .*, expected a list"),
    "layer no object": (lambda plan: plan["layers"].__setitem__(1, [1, 2]), r"layer 1 is \[1, 2\], expected an object"),
    "layer without a list": (_layer_field(_drop("neurons")), "layer 1: lacks the field neurons"),
    "layer with another list": (_layer_field(_field("heads", [])), "layer 1: has the unknown field heads"),
    "units no list": (_layer_field(_field("neurons", 40)), "layer 1, neurons is 40, expected a list"),
    "empty list": (_layer_field(_field("neurons", [])), "layer 1, neurons: keeps 0 units, but shape_after says 40"),
    **{
        f"without {name}": (_drop(name), f"lacks the field {name}")
        for name in ("ratio_target", "ratio_actual", "shape_before", "shape_after", "provenance", "layers", "options",
                     "compensated", "refitted")
    },
    "options": (_field("options", "mine"), 'options is "mine", expected an object'),
    **{
        f"{name} {value}": (_field(name, value), f"{name} is .*, expected true or false")
        for name in ("compensated", "refitted")
        for value in (1, None, "true")
    },
    "unknown field": (_field("comment", "mine"), "has the unknown field comment"),
    **{
        f"{name} {value}": (_field(name, value), f"{name} is .*, expected a number of at least 0 and less than 1")
        for name in ("ratio_target", "ratio_actual")
        for value in (None, "0.2", True, math.nan, math.inf, -0.1, 1, 10**400)
    },
    "wrong ratio_actual": (_field("ratio_actual", 0.25), "ratio_actual is 0.25, but the kept units give 0.41"),
    "wrong count in shape_after": (
        _field("intermediate_size", 41, of="shape_after"), "layer 0, neurons: keeps 40 units, but shape_after says 41",
    ),
    **{
        f"shape_after {name}": (_field(name, value, of="shape_after"), f"shape_after disagrees .*: {name} is .*{value}")
        for name, value in (("parameters", 80000), ("head_dim", 12), ("layer_parameters", 7), ("hidden_size", 64),
                            ("model_type", "qwen2"), ("heads_refused", "no"))
    },
    "shape_after num_layers": (_field("num_layers", 1, of="shape_after"), "keeps 2 of 2 blocks, .* shape_after says 1"),
    "query_head_counts": (
        _field("query_head_counts", [1], of="shape_after"), r"shape_after disagrees .*: query_head_counts is \[1\]",
    ),
    "a count that transformers refuses": (
        lambda plan: [plan[which].update(query_head_counts=[2, 4]) for which in ("shape_before", "shape_after")],
        "keeps 6 query heads, but transformers loads .* only with 2, 4",
    ),
    "heads that cannot go": (
        lambda plan: [plan[which].update(heads_refused="fixed") for which in ("shape_before", "shape_after")],
        "removes heads of a llama model: fixed",
    ),
    **{
        f"shape_before {name} {value}": (_field(name, value, of="shape_before"), f"shape_before[:,] .*{name}")
        for name, value in (("num_key_value_heads", 0), ("parameters", 0), ("num_layers", -1), ("head_dim", 1.5),
                            ("parameters", 100), ("model_type", 3), ("query_head_counts", "all"), ("bits", 4))
    },
    "shape_before without a field": (_drop("head_dim", of="shape_before"), "shape_before: lacks the field head_dim"),
    "shape_before null": (_field("shape_before", None), "shape_before is null, expected an object"),
    "uneven heads in shape_before": (
        _field("num_attention_heads", 13, of="shape_before"), "13 query heads cannot be shared out evenly among 4",
    ),
    "provenance": (_field("provenance", [1]), r"provenance is \[1\], expected an object"),
    "fingerprint": (_field("fingerprint", 7, of="provenance"), "provenance: fingerprint is 7, expected text or null"),
    "format": (_field("format", 3), r"is no plan of amprune \(format 1 or 2\)"),
    "no format": (_drop("format"), r"is no plan of amprune \(format 1 or 2\)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plan_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    make_plan(fake_scores("llama-gqa"), heads_ratio=0.5, neurons_ratio=0.5).save(path)
    return path.read_text()


@pytest.mark.parametrize(("edit", "message"), NONSENSE.values(), ids=NONSENSE)
def test_edited_nonsense_is_refused_by_its_place(
    edit: Callable[[Content], Any], message: str, plan_text: str, tmp_path: Path
) -> None:
    content = json.loads(plan_text)
    edit(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message) as caught:
        PruningPlan.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1, 2]", "null", "7", '"plan"', "{}", "\ufeff{}", "\x00", "[" * 10**5, "1" * 5000],
    ids=lambda content: content[:6],
)
def test_what_is_no_plan_is_refused_by_its_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PlanError, match=r"cannot be read|expected a JSON object|no plan of amprune") as caught:
        PruningPlan.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_plan_or_a_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x80")
    for path in (tmp_path / "missing.json", tmp_path, binary):
        with pytest.raises(PlanError, match=f"{re.escape(str(path))} (is missing|cannot be read)"):
            PruningPlan.load(path)


def test_a_plan_edited_to_other_units_is_accepted(plan_text: str, tmp_path: Path) -> None:
    content = json.loads(plan_text)
    content["layers"][0] = {"query_heads": [0, 1, 2, 6, 7, 8], "key_value_heads": [0, 2], "neurons": [*range(40, 80)]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content, indent=4))
    assert PruningPlan.load(path).layers[0].key_value_heads == (0, 2)


# Plans of another model

CALIBRATION = CalibrationSet("random", (tuple(range(1, 17)),))


def test_a_plan_fits_its_own_model_alone(tmp_path: Path) -> None:
    tiny = find("llama-gqa")
    own = save_model(tiny, tmp_path / "own")
    plan = make_plan(score(own, calibration=CALIBRATION, preset="paper"), ratio=0.2)
    wider = Tiny("llama", "wider", {**tiny.entries, "intermediate_size": 96})
    for other, seed, message in (
        (find("mistral-gqa"), 0, r"another model.*model_type llama != mistral"),
        (wider, 0, r"another model.*intermediate_size 80 != 96"),
        (tiny, 1, r"other weights.*score this model and plan again"),
    ):
        folder = save_model(other, tmp_path / f"{other.id}-{seed}", seed=seed)
        with pytest.raises(PlanError, match=message):
            apply_plan(folder, plan, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(PlanError, match=message):
            prune_model(make_model(other, seed=seed), plan)


def test_a_plan_of_a_float32_checkpoint_fits_its_bfloat16_copy(tmp_path: Path) -> None:
    tiny = find("llama-gqa")
    plan = make_plan(score(save_model(tiny, tmp_path / "wide"), calibration=CALIBRATION, preset="paper"), ratio=0.2)
    narrow = save_model(tiny, tmp_path / "narrow", dtype=torch.bfloat16)
    result = apply_plan(narrow, plan, tmp_path / "out")
    assert result.verification.passed
    pruned = prune_model(make_model(tiny, dtype=torch.bfloat16), plan)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == plan.shape_after.parameters


@pytest.mark.parametrize("devices", [0, -2])
def test_fewer_than_one_device_is_refused(devices: int) -> None:
    with pytest.raises(PlanError, match=f"tensor_parallel is {devices}, expected a number of devices, at least 1"):
        make_plan(fake_scores("llama-gqa"), ratio=0.2, tensor_parallel=devices)


def test_a_share_of_heads_is_refused_where_the_config_accepts_no_other_number() -> None:
    scores = fake_scores("llama-gqa")
    shape = replace(scores.shape, query_head_counts=(scores.shape.num_attention_heads,))
    for wish in ({"heads_ratio": 0.3, "ratio": 0.2}, {"only": "heads", "ratio": 0.01}):
        with pytest.raises(PlanError, match="its config accepts no other number than 12; let only neurons go"):
            make_plan(replace(scores, shape=shape), **wish)
    assert make_plan(replace(scores, shape=shape), ratio=0.2).shape_after.num_attention_heads == 12


@pytest.mark.parametrize(
    "settled",
    [
        {"heads_ratio": 0.25, "neurons_ratio": 0.1},
        {"only": "heads", "heads_ratio": 0.25},
        {"only": "neurons", "neurons_ratio": 0.1},
    ],
    ids=str,
)
def test_a_wish_that_shares_settle_otherwise_is_refused(settled: dict[str, Any]) -> None:
    scores = fake_scores("llama-gqa")
    assert make_plan(scores, **settled).ratio_actual > 0
    for wish in ({"ratio": 0.2}, {"target_parameters": 10_000}):
        with pytest.raises(PlanError, match=r"decides nothing where the shares .* are both settled; leave one out"):
            make_plan(scores, **wish, **settled)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch and PEFT
def test_what_wraps_a_model_is_taken_off_and_what_is_none_refused(tmp_path: Path) -> None:
    tiny = find("llama-gqa")
    model = make_model(tiny)
    plan = make_plan(score(save_model(tiny, tmp_path / "model"), calibration=CALIBRATION, preset="paper"), ratio=0.2)
    model.generation_config.max_new_tokens = 77
    pruned = prune_model(model, plan)
    assert pruned.generation_config.max_new_tokens == 77
    expected = pruned.state_dict()
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model), torch.compile(torch.nn.DataParallel(model))):
        found = prune_model(wrapped, plan).state_dict()  # type: ignore[arg-type]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    adapted = get_peft_model(make_model(tiny), LoraConfig(target_modules="all-linear"))
    refused: dict[str, Any] = {
        "has PEFT adapters; merge them first": adapted,
        "the LlamaModel is no causal language model; load it by AutoModelForCausalLM": model.model,
        "the model is a NoneType, expected a causal language model": None,
        "the Linear is no causal language model": torch.nn.Linear(2, 2),
    }
    for message, other in refused.items():
        with pytest.raises(UnsupportedModelError, match=message):
            prune_model(other, plan)
