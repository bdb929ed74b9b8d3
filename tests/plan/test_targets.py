"""Targets beside the ratio: parameters and bytes, exactly, and shapes that reach a speedup."""

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_calibration import architecture_of
from tiny_models import Tiny, config_of, find, save_model
from tiny_plans import CONFIGS, fake_scores, shape_of

from amprune import ModelShape, PlanError, apply_plan, make_plan, score
from amprune.errors import EvaluationError
from amprune.model.latency import Latency, LatencySettings
from amprune.model.reader import read_checkpoint
from amprune.plan.budget import find_budget
from amprune.plan.heads import Budget, choices_of_all_modes, kept_heads
from amprune.plan.target import Target, parse_target, target_parameters
from amprune.scoring.scores import ImportanceScores
from amprune.search import timing as timing_module
from amprune.search.speedup import find_shapes
from amprune.search.timing import shape_timer
from amprune.settings import PlanOptions

SMALL = sorted(name for name in CONFIGS if name not in ("Llama-2-7B", "Llama-3-8B", "Phi-2", "Falcon-7B"))


def parameters(shape: ModelShape, budget: Budget) -> int:
    return shape.shrunk(
        query_heads=budget.query_heads, key_value_heads=budget.key_value_heads, neurons=budget.neurons
    ).parameters


def reachable(shape: ModelShape, options: PlanOptions) -> list[int]:
    """The sizes of all shapes of the default mode, by trying every one."""
    choices = choices_of_all_modes(shape, options)[0]
    heads = [kept_heads(shape, choices.mode, removed) for removed in choices.removable]
    widths = range(options.neuron_multiple, shape.intermediate_size + 1, options.neuron_multiple)
    return [parameters(shape, Budget(choices.mode, *kept, width)) for kept in heads for width in widths]


# The words


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("params=100M", "params", 100_000_000),
        ("params=1.1B", "params", 1_100_000_000),
        ("params=100_000_000", "params", 100_000_000),
        ("params=100000000", "params", 100_000_000),
        ("params=500k", "params", 500_000),
        ("params = 1.2345678 B", "params", 1_234_567_800),
        ("weight-bytes=4GiB", "weight-bytes", 2**32),
        ("weight-bytes=900MB", "weight-bytes", 900_000_000),
        ("weight-bytes=4294967296", "weight-bytes", 2**32),
        ("weight-bytes=1.5 MiB", "weight-bytes", 3 * 2**19),
        ("speedup=1.25x", "speedup", 1.25),
        ("speedup=2", "speedup", 2.0),
    ],
)
def test_targets_are_read(text: str, kind: str, value: float) -> None:
    found = parse_target(text)
    assert (found.kind, found.value) == (kind, value)
    assert isinstance(found.value, float if kind == "speedup" else int)
    assert parse_target(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("100M", r"'100M' does not say of what, expected params=100M, weight-bytes=4GiB or speedup=1\.25x"),
        ("parms=100M", "unknown kind 'parms'; did you mean params"),
        ("bytes=4GiB", "unknown kind 'bytes'; .*expected params=100M, weight-bytes"),
        ("params=100GiB", "the value '100GiB', expected a number of parameters such as 500k"),
        ("params=", "the value ''"),
        ("params=-5", "the value '-5'"),
        ("params=1_00", "the value '1_00'"),
        ("params=0", "asks for 0, expected a number"),
        ("weight-bytes=4x", "expected a size such as 900MB"),
        ("speedup=1.0x", "asks for 1.0x, expected a factor above 1"),
        ("speedup=0.8", "expected a factor above 1"),
    ],
)
def test_what_is_no_target_is_refused_with_the_forms_that_are(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_target(text)


# Parameters


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(SMALL), multiple=st.sampled_from([1, 1, 8, 16]), share=st.floats(0, 1), data=st.data())
def test_a_number_of_parameters_is_never_exceeded_and_met_to_a_neuron(
    name: str, multiple: int, share: float, data: Any
) -> None:
    shape = shape_of(name)
    modes = ["groups"] if shape.num_key_value_heads > 1 else ["within"]
    options = PlanOptions(neuron_multiple=multiple, heads_mode=data.draw(st.sampled_from([*modes, "within"])))
    sizes = _sizes(name, options)
    target = round(sizes[0] + share * (shape.parameters - 1 - sizes[0]))
    budget = find_budget(shape, replace(options, target_parameters=target))
    left = parameters(shape, budget)
    assert left <= target
    step = multiple * shape.neuron_parameters * shape.num_layers
    # Where no number of heads comes so close, nothing comes closer.
    assert target - left < step or left == max(size for size in sizes if size <= target)


@functools.cache
def _sizes(name: str, options: PlanOptions) -> list[int]:
    return sorted(reachable(shape_of(name), options))


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "gpt2-mha", "phi-mha", "falcon-gqa", "Qwen2.5-0.5B"])
def test_a_size_that_can_be_reached_is_met_exactly_and_one_less_is_not(name: str) -> None:
    shape, scores = shape_of(name), fake_scores(name)
    for ratio in (0.02, 0.1, 0.25):
        size = make_plan(scores, ratio=ratio).shape_after.parameters
        plan = make_plan(scores, target_parameters=size)
        step = shape.neuron_parameters * shape.num_layers
        assert size - step < plan.shape_after.parameters <= size
        assert plan.ratio_target == pytest.approx(1 - size / shape.parameters)
        assert plan.options["target_parameters"] == size
        assert make_plan(scores, target_parameters=size - 1).shape_after.parameters < size
    assert "target_parameters" not in make_plan(scores, ratio=0.1).options


@pytest.mark.parametrize("options", [{"only": "heads"}, {"neurons_ratio": 0.25}, {"heads_ratio": 0.5}], ids=str)
def test_what_is_settled_by_hand_leaves_the_rest_to_the_target(options: dict[str, Any]) -> None:
    shape, scores = shape_of("llama-mha"), fake_scores("llama-mha")
    target = round(0.75 * shape.parameters)
    plan = make_plan(scores, target_parameters=target, **options)
    head = (shape.query_head_parameters + shape.key_value_head_parameters) * shape.num_layers
    neuron = shape.neuron_parameters * shape.num_layers
    assert target - (neuron if "heads_ratio" in options else head) < plan.shape_after.parameters <= target
    if "neurons_ratio" in options:
        assert plan.shape_after.intermediate_size == 60


def test_a_target_out_of_reach_is_refused_with_the_nearest() -> None:
    shape, scores = shape_of("llama-gqa"), fake_scores("llama-gqa")
    smallest = min(reachable(shape, PlanOptions()))
    with pytest.raises(PlanError, match=f"the smallest reachable is {smallest:,};"):
        make_plan(scores, target_parameters=smallest - 1)
    assert make_plan(scores, target_parameters=smallest).shape_after.parameters == smallest
    step = shape.neuron_parameters * shape.num_layers
    for target in (shape.parameters, 10 * shape.parameters):
        with pytest.raises(PlanError, match=f"would remove nothing: .* the next below is {shape.parameters - step:,}"):
            make_plan(scores, target_parameters=target)
    assert make_plan(scores, target_parameters=shape.parameters - 1).shape_after.parameters == shape.parameters - step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.2, "target_parameters": 50_000}, "say the same; give one of them"),
        ({"target_parameters": 0}, "expected a whole number of at least 1"),
        ({"target_parameters": 5e4}, "expected a whole number"),
        ({"target_parameters": 50_000, "heads_ratio": 0.1, "neurons_ratio": 0.1}, "decides nothing"),
        ({"target_parameters": 50_000, "only": "neurons", "neurons_ratio": 0.1}, "decides nothing"),
    ],
)
def test_a_target_beside_what_contradicts_it_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(fake_scores("llama-gqa"), **options)


def blocks_of(name: str, layers: int = 6) -> ImportanceScores:
    shape = shape_of(name)
    rest = shape.parameters - shape.num_layers * shape.layer_parameters
    shape = replace(shape, num_layers=layers, parameters=rest + layers * shape.layer_parameters)
    return ImportanceScores((), shape, "0" * 64, "depth", {}, {}, blocks=np.arange(layers, dtype=np.float32))


def test_blocks_take_a_target_too() -> None:
    scores, free = blocks_of("llama-gqa"), {"protect_first": 0, "protect_last": 0}
    shape = scores.shape
    for removed in (1, 3, 5):
        size = shape.parameters - removed * shape.layer_parameters
        for target in (size, size + shape.layer_parameters - 1):
            plan = make_plan(scores, target_parameters=target, **free)
            assert plan.shape_after.parameters == size
        assert plan.options["target_parameters"] == target
    smallest = shape.parameters - 5 * shape.layer_parameters
    with pytest.raises(PlanError, match=f"at most 5 can go: .*; the smallest reachable is {smallest:,}"):
        make_plan(scores, target_parameters=smallest - 1, **free)
    with pytest.raises(PlanError, match=f"without one block it has {shape.parameters - shape.layer_parameters:,}"):
        make_plan(scores, target_parameters=shape.parameters, **free)


# A budget that is given


def test_a_budget_becomes_a_plan_that_says_so() -> None:
    scores, budget = fake_scores("llama-gqa"), Budget("within", 8, 4, 57)
    plan = make_plan(scores, budget=budget, ratio=0.2)
    after = plan.shape_after
    assert (after.num_attention_heads, after.num_key_value_heads, after.intermediate_size) == (8, 4, 57)
    assert plan.ratio_target == 0.2
    recorded = plan.options
    assert recorded["heads_mode"] == "within"
    assert make_plan(scores, budget=Budget(**recorded["budget"]), ratio=recorded["ratio"]) == plan
    same = find_budget(scores.shape, PlanOptions(ratio=0.2))
    assert make_plan(scores, budget=same, ratio=0.2).layers == make_plan(scores, ratio=0.2).layers


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget("groups", 8, 4, 57), "keeps 8 query and 4 key-value heads, expected"),
        (Budget("within", 9, 3, 57), "expected"),
        (Budget("groups", 9, 3, 0), "keeps 0 neurons, expected 1 to 80"),
        (Budget("groups", 9, 3, 81), "keeps 81 neurons"),
    ],
)
def test_a_budget_that_no_layer_can_keep_is_refused(budget: Budget, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(fake_scores("llama-gqa"), budget=budget)
    with pytest.raises(PlanError, match="means nothing to scores of whole blocks"):
        make_plan(blocks_of("llama-gqa"), budget=budget)


# Bytes


@pytest.mark.parametrize(
    ("name", "dtype", "share"),
    [
        ("llama-gqa", torch.bfloat16, 0.8),
        ("llama-tied", torch.float32, 0.9),
        ("gpt2-mha", torch.bfloat16, 0.97),
        ("starcoder2-gqa", torch.float32, 0.75),
    ],
)
def test_a_number_of_bytes_is_what_the_written_tensors_have(
    name: str, dtype: torch.dtype, share: float, tmp_path: Path
) -> None:
    dense = save_model(find(name), tmp_path / "dense", dtype=dtype)
    checkpoint, scores = read_checkpoint(dense), score(dense, criterion="magnitude")
    target = Target("weight-bytes", round(share * checkpoint.bytes))
    plan = make_plan(scores, target_parameters=target_parameters(target, checkpoint, PlanOptions()))
    out = apply_plan(dense, plan, tmp_path / "out")
    assert out.bytes_after == read_checkpoint(out.folder).bytes
    step = checkpoint.shape.neuron_parameters * checkpoint.shape.num_layers * dtype.itemsize
    assert 0 <= target.value - out.bytes_after < step


def test_of_several_dtypes_the_tensors_that_shrink_count(tmp_path: Path) -> None:
    dense = save_model(find("llama-gqa"), tmp_path / "dense", dtype=torch.bfloat16)
    tensors = load_file(dense / "model.safetensors")
    wide = {name: t.float() if "embed" in name or "norm" in name else t for name, t in tensors.items()}
    save_file(wide, dense / "model.safetensors", metadata={"format": "pt"})
    checkpoint = read_checkpoint(dense)
    target = Target("weight-bytes", checkpoint.bytes - 10_000)
    assert target_parameters(target, checkpoint, PlanOptions()) == checkpoint.shape.parameters - 5_000
    plan = make_plan(score(dense, criterion="magnitude"), target_parameters=checkpoint.shape.parameters - 5_000)
    assert 0 <= target.value - apply_plan(dense, plan, tmp_path / "out").bytes_after < 2 * 288 * 2
    assert target_parameters(target, checkpoint, PlanOptions(), depth=True) == checkpoint.shape.parameters - 5_000


def test_bytes_out_of_reach_are_refused_in_bytes(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_model(find("llama-gqa"), tmp_path / "dense", dtype=torch.bfloat16))
    with pytest.raises(PlanError, match=f"would remove nothing: the weights have {checkpoint.bytes:,}; the next below"):
        target_parameters(Target("weight-bytes", checkpoint.bytes), checkpoint, PlanOptions())
    with pytest.raises(PlanError, match="the options leave at least") as caught:
        target_parameters(Target("weight-bytes", 100), checkpoint, PlanOptions())
    least = int(re.findall(r"at least ([\d,]+)", str(caught.value))[0].replace(",", ""))
    most = target_parameters(Target("weight-bytes", least), checkpoint, PlanOptions())
    assert find_budget(checkpoint.shape, PlanOptions(target_parameters=most)).neurons == 1
    with pytest.raises(PlanError, match="has to be measured"):
        target_parameters(Target("speedup", 1.25), checkpoint, PlanOptions())
    assert target_parameters(Target("params", 7), checkpoint, PlanOptions()) == 7


# Speedups


def linear(shape: ModelShape, fixed: float = 0.5) -> Any:
    """A device whose time is a constant and the parameters that shrink."""
    units = shape.attention_parameters + shape.mlp_parameters

    def speedup(after: ModelShape) -> float:
        left = after.attention_parameters + after.mlp_parameters
        return (fixed + 1) / (fixed + left / units)

    return speedup


@pytest.mark.parametrize(
    "options", [PlanOptions(), PlanOptions(neuron_multiple=16), PlanOptions(only="neurons")], ids=str
)
@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "llama-mqa", "gpt2-mha", "Qwen2.5-0.5B"])
def test_for_each_number_of_heads_the_widest_shape_that_is_fast_enough_is_found(
    name: str, options: PlanOptions
) -> None:
    shape, wanted = shape_of(name), 1.2
    timer = linear(shape)
    found = find_shapes(shape, wanted, options, timer, head_counts=100)
    step = 16 if options.neuron_multiple == 16 and shape.intermediate_size < 1024 else None
    kept = {(b.query_heads, b.key_value_heads): b for b in found.budgets}
    for choices in choices_of_all_modes(shape, options):
        for removed in choices.removable:
            heads = kept_heads(shape, choices.mode, removed)
            fast = [n for n in range(1, shape.intermediate_size + 1) if _fast(shape, (*heads, n), timer, wanted)]
            if heads not in kept:
                assert not fast or max(fast) < 64
                continue
            neurons = kept[heads].neurons
            assert neurons in fast
            assert max(fast) - neurons < (step or 64)
            assert neurons % options.neuron_multiple == 0
    assert all(shape.speedup >= wanted for shape in found.reached)
    assert {shape.budget for shape in found.reached} <= {shape.budget for shape in found.timed}
    assert len(found.timed) <= 9 * sum(len(c.removable) for c in choices_of_all_modes(shape, options))


def _fast(shape: ModelShape, kept: tuple[int, int, int], timer: Any, wanted: float) -> bool:
    query_heads, key_value_heads, neurons = kept
    after = shape.shrunk(query_heads=query_heads, key_value_heads=key_value_heads, neurons=neurons)
    return bool(timer(after) >= wanted)


def test_a_speedup_out_of_reach_is_refused_with_the_largest_that_was_measured() -> None:
    shape = shape_of("llama-gqa")
    with pytest.raises(PlanError, match=r"the largest that was measured is 1\.\d\d, of a shape with 3 query heads"):
        find_shapes(shape, 3.0, PlanOptions(), linear(shape, fixed=1.0))
    for options, message in (
        (PlanOptions(ratio=0.2), "leave out the ratio"),
        (PlanOptions(heads_ratio=0.2), "leave out heads_ratio"),
        (PlanOptions(neuron_multiple=500), "neuron_multiple is 500"),
    ):
        with pytest.raises(PlanError, match=message):
            find_shapes(shape, 1.2, options, linear(shape))
    with pytest.raises(PlanError, match="expected more than 1"):
        find_shapes(shape, 1.0, PlanOptions(), linear(shape))


def test_few_numbers_of_heads_are_tried_where_there_are_many() -> None:
    shape = shape_of("Llama-2-7B")
    found = find_shapes(shape, 1.3, PlanOptions(), linear(shape), head_counts=4)
    assert [budget.query_heads for budget in found.budgets] == [32, 22, 11, 1]
    assert len(found.timed) < 4 * 10
    record = found.to_dict()
    assert record["wanted"] == 1.3
    assert Budget(**record["reached"][0]["budget"]) == found.budgets[0]


def by_parameters(layer: float = 1.0, rest: float = 100_000.0) -> Any:
    """Stands for `measure_latency`: the seconds follow the parameters of a model's blocks, and `rest`."""

    def measure(models: Mapping[str, Any], settings: LatencySettings, *, progress: Any) -> dict[str, Latency]:
        found = {}
        for name, model in models.items():
            blocks = sum(p.numel() for key, p in model.named_parameters() if ".layers." in key)
            seconds = rest + layer * blocks
            found[name] = Latency(decode=[seconds, 2 * seconds], prefill=[3 * seconds])
        return found

    return measure


def test_models_that_do_not_fit_are_timed_with_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny("llama", "deep", {**config_of(find("llama-gqa")), "num_hidden_layers": 8})
    architecture, config = architecture_of(tiny), config_of(tiny)
    shape = architecture.shape
    after = shape.shrunk(query_heads=9, key_value_heads=3, neurons=40)
    found = {}
    monkeypatch.setattr(timing_module, "measure_latency", by_parameters())
    for free in (1 << 40, 5 * shape.parameters):
        monkeypatch.setattr(timing_module, "free_memory", lambda _, free=free: free)
        with shape_timer(config, architecture, device="cpu") as timing:
            found[timing.layers] = timing.speedup(after)
    assert len(found) == 2
    whole, extrapolated = found
    assert whole == (8,)
    few, more = extrapolated
    assert 1 <= few < more < 8
    assert found[whole] == pytest.approx(found[extrapolated])
    blocks = shape.num_layers * shape.layer_parameters
    expected = (100_000 + blocks) / (100_000 + blocks - (shape.parameters - after.parameters))
    assert found[whole] == pytest.approx(expected)
    assert timing.words(8) == f"models of {few} and {more} of 8 layers, extrapolated linearly"


def test_timing_is_refused_where_no_two_layers_fit_or_nothing_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = find("llama-gqa")
    monkeypatch.setattr(timing_module, "free_memory", lambda _: 1000)
    with (
        pytest.raises(EvaluationError, match="2 layers, dense and pruned, do not fit"),
        shape_timer(config_of(tiny), architecture_of(tiny), device="cpu"),
    ):
        pass
    tiny = Tiny("llama", "deep", {**config_of(tiny), "num_hidden_layers": 8})
    architecture = architecture_of(tiny)
    monkeypatch.setattr(timing_module, "free_memory", lambda _: 5 * architecture.shape.parameters)
    monkeypatch.setattr(timing_module, "measure_latency", by_parameters(layer=-1.0, rest=200_000.0))
    with (
        shape_timer(config_of(tiny), architecture, device="cpu") as timing,
        pytest.raises(EvaluationError, match="too noisy"),
    ):
        timing.speedup(architecture.shape)


def test_a_real_model_is_timed_beside_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = find("llama-gqa")
    architecture, before = architecture_of(tiny), torch.get_rng_state()
    monkeypatch.setattr(timing_module, "DECODING", replace(timing_module.DECODING, new_tokens=4, warmup=1, runs=3))
    with shape_timer(config_of(tiny), architecture, device="cpu") as timing:
        assert timing.layers == (2,)
        assert timing.words(2) == "whole models of random weights"
        # 8 query heads in 4 groups: LlamaConfig refuses them, and mistral stands in.
        for heads, groups in ((12, 4), (8, 4)):
            after = architecture.shape.shrunk(query_heads=heads, key_value_heads=groups, neurons=8)
            assert 0.2 < timing.speedup(after) < 5
    assert torch.get_rng_state().equal(before)
