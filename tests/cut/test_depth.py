"""Depth: whole blocks are scored by perplexity, planned, removed from files and from memory, and verified."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle
from tiny_models import ALL, VOCABULARY, Tiny, config_of, find, make_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from amprune import (
    CalibrationSet,
    ImportanceScores,
    ModelShape,
    PlanError,
    PruningPlan,
    ScoresError,
    VerificationError,
    apply_plan,
    inspect,
    make_plan,
    prune,
    prune_model,
    verify,
)
from amprune.model import architecture as architecture_module
from amprune.model.architecture import describe
from amprune.model.files import stored_tensors
from amprune.model.reader import read_checkpoint
from amprune.plan.artefact import check_plan
from amprune.plan.budget import find_depth, removable_blocks
from amprune.prove.card import removal
from amprune.prove.checks import verify_checkpoint
from amprune.report.importance import blocks_figure
from amprune.report.write import write_report
from amprune.scoring.blocks import block_perplexities
from amprune.scoring.scores import InputMeans, LayerScores
from amprune.settings import PlanOptions

ONE_OF_EACH = [
    next(tiny for tiny in ALL if tiny.model_type == kind) for kind in dict.fromkeys(t.model_type for t in ALL)
]
SAMPLES = tuple(
    tuple((i * 7 + j * 13) % VOCABULARY for j in range(length)) for i, length in enumerate((20, 9, 1, 2, 20))
)
CALIBRATION = CalibrationSet("made up", SAMPLES)


def deep(tiny: Tiny, layers: int, **entries: Any) -> Tiny:
    """Returns the variant with more layers; they stand under the config's own key."""
    key = "n_layer" if "n_layer" in tiny.entries else "num_hidden_layers"
    return Tiny(tiny.model_type, tiny.variant, {**tiny.entries, key: layers, **entries})


def depth_scores(shape: ModelShape, blocks: list[float], fingerprint: str = "f" * 64) -> ImportanceScores:
    values = np.array(blocks, np.float32)
    return ImportanceScores((), shape, fingerprint, "depth", CALIBRATION.to_dict(), {}, blocks=values)


@functools.cache
def shape_of(layers: int) -> ModelShape:
    return describe(config_of(deep(find("llama-gqa"), layers))).shape


def share(shape: ModelShape, blocks: float) -> float:
    """Returns the ratio that this many blocks make up."""
    return blocks * shape.layer_parameters / shape.parameters


class Skipped(torch.nn.Module):
    """Takes the place of a block and does nothing."""

    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


def without(model: PreTrainedModel, gone: list[int]) -> PreTrainedModel:
    """Copies a model and puts nothing in the place of blocks."""
    model = copy.deepcopy(model)
    blocks = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    for block in gone:
        blocks[block] = Skipped(as_tuple=gives_a_tuple(model, blocks[block]))
    return model


def gives_a_tuple(model: PreTrainedModel, block: torch.nn.Module) -> bool:
    """Tells what the block returns, which changes from one transformers to the next."""
    found: list[bool] = []
    handle = block.register_forward_hook(lambda _module, _inputs, output: found.append(isinstance(output, tuple)))
    logits(model)
    handle.remove()
    return found[0]


def written(tiny: Tiny, folder: Path) -> tuple[PreTrainedModel, Path]:
    model = make_model(tiny)
    model.save_pretrained(folder / "dense")
    return model, folder / "dense"


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model(ids, use_cache=False).logits
    return found


# Scores


@torch.inference_mode()
def log_perplexity(model: PreTrainedModel) -> float:
    total, count = 0.0, 0
    for sample in SAMPLES:
        if len(sample) > 1:
            rows = model(torch.tensor([sample]), use_cache=False).logits[0, :-1]
            total += float(cross_entropy(rows.double(), torch.tensor(sample[1:]), reduction="sum"))
            count += len(sample) - 1
    return total / count


@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda tiny: tiny.model_type)
def test_blocks_are_scored_by_the_perplexity_without_them(tiny: Tiny) -> None:
    model = make_model(deep(tiny, 3))
    found = block_perplexities(model, describe(model.config.to_dict()), CALIBRATION, batch_tokens=40)
    dense = log_perplexity(model)
    expected = [log_perplexity(without(model, [block])) - dense for block in range(3)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-4
    assert log_perplexity(model) == dense, "the model is as it was"


def test_neither_batches_nor_a_bound_on_logits_change_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(deep(find("llama-gqa"), 3))
    architecture = describe(model.config.to_dict())
    alone = block_perplexities(model, architecture, CALIBRATION, batch_tokens=1)
    together = block_perplexities(model, architecture, CALIBRATION)
    widths: list[int] = []
    model.register_forward_hook(lambda _, __, output: widths.append(output.logits[..., 0].numel()))
    monkeypatch.setattr("amprune.scoring.blocks._LOGITS", 25 * VOCABULARY)
    bounded = block_perplexities(model, architecture, CALIBRATION)
    np.testing.assert_allclose(alone, together, atol=1e-6)
    np.testing.assert_allclose(bounded, together, atol=1e-6)
    assert max(widths) <= 25


def test_progress_counts_a_pass_for_each_block_and_one_for_the_dense_model() -> None:
    from contextlib import contextmanager

    told: list[int] = []

    @contextmanager
    def progress(_description: str, total: int) -> Any:
        told.append(-total)
        yield told.append

    model = make_model(deep(find("llama-gqa"), 3))
    block_perplexities(model, describe(model.config.to_dict()), CALIBRATION, progress=progress)
    assert sum(told) == 0
    assert told[0] == -4 * 4


def test_a_loss_that_is_not_finite_names_the_block() -> None:
    model = make_model(deep(find("llama-gqa"), 3))
    norm: Any = model.get_submodule("model.layers.2.input_layernorm")
    norm.weight.data[0] = float("nan")
    with pytest.raises(ScoresError, match="without block 0, the loss on the calibration set is not finite"):
        block_perplexities(model, describe(model.config.to_dict()), CALIBRATION)
    assert "forward" not in vars(model.get_submodule("model.layers.0")), "nothing stays in the model"


def test_a_set_without_a_next_token_is_refused() -> None:
    model = make_model(find("llama-gqa"))
    with pytest.raises(ScoresError, match="no sample of the calibration set 'ones' has two tokens"):
        block_perplexities(model, describe(model.config.to_dict()), CalibrationSet("ones", ((1,), (2,))))


# The score file


def test_scores_of_blocks_survive_their_file(tmp_path: Path) -> None:
    scores = depth_scores(shape_of(8), list(range(8)))
    for name in ("one", "two"):
        scores.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = ImportanceScores.load(tmp_path / "one")
    assert read.layers == ()
    assert read.input_means is None
    assert read.shape == scores.shape
    assert read.blocks is not None
    assert read.blocks.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [(np.zeros(7, np.float32), r"blocks is float32 of shape \(7,\), expected float32 of shape \(8,\)"),
     (np.full(8, np.nan, np.float32), "blocks holds values that are not finite")],
)  # fmt: skip
def test_damaged_scores_of_blocks_are_refused(blocks: np.ndarray, message: str, tmp_path: Path) -> None:
    replace(depth_scores(shape_of(8), [0.0]), blocks=blocks).save(tmp_path / "scores")
    with pytest.raises(ScoresError, match=message):
        ImportanceScores.load(tmp_path / "scores")


def test_mean_inputs_survive_their_file_and_a_missing_one_is_named(tmp_path: Path) -> None:
    shape = shape_of(2)
    units = LayerScores(np.ones(12, np.float32), np.ones(4, np.float32), np.ones(80, np.float32))
    means = tuple(InputMeans(np.full(192, i, np.float32), np.full(80, i, np.float32)) for i in range(2))
    scores = ImportanceScores((units, units), shape, "f" * 64, "flap", {}, {}, input_means=means)
    scores.save(tmp_path / "scores")
    read = ImportanceScores.load(tmp_path / "scores").input_means
    assert read is not None
    assert read[1].attention.tolist() == [1] * 192
    assert read[1].mlp.tolist() == [1] * 80
    replace(scores, input_means=means[:1]).save(tmp_path / "scores")
    with pytest.raises(ScoresError, match=r"layers\.1\.attention_inputs is missing"):
        ImportanceScores.load(tmp_path / "scores")


# Plans


def plan_of(blocks: list[float], removed: float, **options: Any) -> PruningPlan:
    shape = shape_of(len(blocks))
    return make_plan(depth_scores(shape, blocks), ratio=share(shape, removed), **options)


def test_the_lowest_unprotected_blocks_go() -> None:
    plan = plan_of([0, 0, 0, 0, 5, 1, 3, 2, 4, 0, 0], 2)
    assert plan.kept_layers == (0, 1, 2, 3, 4, 6, 8, 9, 10)
    assert plan.layers[5] is None
    assert plan.layers[7] is None
    before, after = plan.shape_before, plan.shape_after
    assert after.num_layers == 9
    assert after.layer_parameters == before.layer_parameters
    assert after.parameters == before.parameters - 2 * before.layer_parameters
    assert plan.ratio_actual == pytest.approx(share(before, 2))
    assert describe(config_of(deep(find("llama-gqa"), 9))).shape == after
    assert plan.options == {
        "ratio": share(before, 2), "order": "amp", "seed": 0, "protect_first": 4, "protect_last": 2,
    }  # fmt: skip


def test_of_equal_scores_the_higher_index_goes() -> None:
    kept = plan_of([1] * 8, 2, protect_first=1, protect_last=1).kept_layers
    assert kept == (0, 1, 2, 3, 4, 7)


def test_reversed_order_removes_the_best_of_the_unprotected() -> None:
    kept = plan_of([9, 1, 2, 3, 4, 5, 6, 9], 2, order="reversed", protect_first=1, protect_last=1).kept_layers
    assert kept == (0, 1, 2, 3, 4, 7)


def test_random_order_is_seeded_and_spares_the_protected() -> None:
    def kept(seed: int) -> tuple[int, ...]:
        return plan_of([1] * 12, 3, order="random", seed=seed).kept_layers

    assert kept(0) == kept(0)
    drawn = {kept(seed) for seed in range(12)}
    assert len(drawn) > 3
    assert all({0, 1, 2, 3, 10, 11} <= set(choice) for choice in drawn)


@pytest.mark.parametrize(("blocks", "removed"), [(0.51, 1), (1.5, 1), (1.51, 2), (2.49, 2)])
def test_the_number_of_blocks_is_the_nearest_and_ties_go_down(blocks: float, removed: int) -> None:
    shape = shape_of(12)
    assert find_depth(shape, PlanOptions(ratio=share(shape, blocks))) == removed


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"ratio": 0.001}, "would remove no block, as each holds .* the nearest ratio that works is 0.0"),
    "too much": ({"ratio": 0.9}, "of 12 blocks, but at most 6 can go: the first 4 and the last 2 .* largest ratio is"),
    "no ratio": ({}, "give a ratio"),
    "no share": ({"ratio": 1.5}, "ratio is 1.5, expected a number between 0 and 1"),
    "protected": ({"ratio": 0.2, "protect_first": 10}, "none of the 12 blocks can be removed: the first 10 and"),
    "negative": ({"ratio": 0.2, "protect_last": -1}, "protect_last is -1, expected a number of blocks"),
    "order": ({"ratio": 0.2, "order": "best"}, "order is 'best', expected one of amp"),
    **{
        name: ({"ratio": 0.2, name: value}, f"{name} is {value}, but means nothing where whole blocks are removed")
        for name, value in (("only", "heads"), ("heads_mode", "within"), ("heads_ratio", 0.2), ("neurons_ratio", 0.0),
                            ("neuron_multiple", 8), ("head_multiple", 2))
    },
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_means_nothing_or_cannot_be_is_refused_with_and_without_scores(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(depth_scores(shape_of(12), [0.0] * 12), **options)
    with pytest.raises(PlanError, match=message):
        find_depth(shape_of(12), PlanOptions(**options))


@pytest.mark.parametrize("protected", [2, 4])
def test_the_ratios_that_an_error_names_work(protected: int) -> None:
    shape = shape_of(12)
    for ratio, removed in ((0.0001, 1), (0.95, 12 - 2 * protected)):
        options = PlanOptions(ratio=ratio, protect_first=protected, protect_last=protected)
        with pytest.raises(PlanError) as caught:
            find_depth(shape, options)
        named = float(str(caught.value).rsplit(" ", 1)[1])
        assert find_depth(shape, replace(options, ratio=named)) == removed


def test_one_block_stays_where_none_is_protected() -> None:
    shape = shape_of(3)
    free = PlanOptions(ratio=share(shape, 2), protect_first=0, protect_last=0)
    assert find_depth(shape, free) == 2 == removable_blocks(shape, free)
    assert removable_blocks(shape, PlanOptions()) == 0


@pytest.mark.parametrize("name", ["protect_first", "protect_last"])
def test_heads_and_neurons_know_no_protected_blocks(name: str) -> None:
    units = LayerScores(np.ones(12, np.float32), np.ones(4, np.float32), np.ones(80, np.float32))
    scores = ImportanceScores((units, units), shape_of(2), "f" * 64, "amp", {}, {})
    with pytest.raises(PlanError, match=f"{name} is 0, but no block is removed by scores of heads and neurons"):
        make_plan(scores, ratio=0.2, **{name: 0})
    assert "protect_first" not in make_plan(scores, ratio=0.2).options


def test_a_family_whose_blocks_know_their_index_is_refused() -> None:
    shape = describe(config_of(deep(find("gpt2-mha"), 8, scale_attn_by_inverse_layer_idx=True))).shape
    with pytest.raises(
        PlanError, match="blocks of a gpt2 model cannot be removed: with scale_attn_by_inverse_layer_idx"
    ):
        make_plan(depth_scores(shape, [0.0] * 8), ratio=share(shape, 1))
    plain = replace(shape, blocks_refused=None)
    plan = make_plan(depth_scores(plain, [0.0] * 8), ratio=share(shape, 1))
    with pytest.raises(PlanError, match="removes blocks of a gpt2 model: with scale_attn"):
        check_plan(replace(plan, shape_before=shape))


def test_blocks_of_different_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture_module, "_described", architecture_module._described.__wrapped__)
    real = architecture_module.meta_model

    def uneven(*arguments: Any, **options: Any) -> Any:
        model: Any = real(*arguments, **options)
        model.model.layers[0].register_parameter("more", torch.nn.Parameter(torch.empty(7, device="meta")))
        return model

    monkeypatch.setattr(architecture_module, "meta_model", uneven)
    shape = describe(config_of(find("llama-gqa"))).shape
    with pytest.raises(PlanError, match="its blocks hold different numbers of parameters"):
        find_depth(shape, PlanOptions(ratio=0.2))


def test_files_that_say_nothing_of_blocks_are_read_but_serve_no_depth() -> None:
    shape = shape_of(12)
    values = {k: v for k, v in shape.to_dict().items() if k not in ("layer_parameters", "blocks_refused")}
    read = ModelShape.from_dict(values, where="file", error=PlanError)
    assert read == replace(shape, layer_parameters=0)
    assert not read.differences(shape)
    with pytest.raises(PlanError, match="do not say how many parameters a block holds"):
        find_depth(read, PlanOptions(ratio=0.2))


Content = dict[str, Any]


def _set(name: str, value: object, *, of: str) -> Callable[[Content], None]:
    return lambda plan: plan[of].__setitem__(name, value)


NONSENSE: dict[str, tuple[Callable[[Content], Any], str]] = {
    "another block gone": (lambda plan: plan["layers"].__setitem__(0, None), "keeps 9 of 12 .* shape_after says 10"),
    "every block gone": (lambda plan: plan.__setitem__("layers", [None] * 12), "removes every block"),
    "a block back": (lambda plan: plan["layers"].__setitem__(10, plan["layers"][0]), "keeps 11 of 12 blocks"),
    "no object": (lambda plan: plan["layers"].__setitem__(0, False), "layer 0 is false, .*null where the block"),
    "a short block": (lambda plan: plan["layers"][0]["neurons"].pop(), "layer 0, neurons: keeps 79 units"),
    "another size": (_set("layer_parameters", 5, of="shape_after"), "layer_parameters is 5, expected"),
    "too large blocks": (_set("layer_parameters", 10**9, of="shape_before"), "blocks, alone have 12000000000"),
    "unknown size": (
        lambda plan: [plan[of].pop("layer_parameters") for of in ("shape_before", "shape_after")],
        "removes blocks, but does not say how many parameters one holds",
    ),
    "ratio": (lambda plan: plan.__setitem__("ratio_actual", 0.3), "ratio_actual is 0.3, but the kept units give"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), NONSENSE.values(), ids=NONSENSE)
def test_edited_nonsense_is_refused(edit: Callable[[Content], Any], message: str, tmp_path: Path) -> None:
    plan = plan_of([1] * 12, 2, protect_first=1, protect_last=0)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["layers"][10:] == [None, None]
    edit(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


# Files, memory and the proof


def planned(folder: Path, *, blocks: list[float], removed: int) -> PruningPlan:
    checkpoint = read_checkpoint(folder)
    scores = depth_scores(checkpoint.shape, blocks, checkpoint.fingerprint)
    return make_plan(scores, ratio=share(checkpoint.shape, removed), protect_first=1, protect_last=0)


@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda tiny: tiny.model_type)
def test_the_output_is_the_dense_model_without_its_blocks(tiny: Tiny, tmp_path: Path) -> None:
    model, dense = written(deep(tiny, 4), tmp_path)
    plan = planned(dense, blocks=[9, 1, 8, 2], removed=2)
    assert plan.kept_layers == (0, 2)
    result = apply_plan(dense, plan, tmp_path / "out")
    assert result.verification.passed
    assert result.verification.logit_difference == 0
    assert "2 of 4 blocks kept, in order" in [check.detail for check in result.verification.checks]

    expected = logits(without(model, [1, 3]))
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(reloaded), expected)
    assert torch.equal(logits(prune_model(model, plan)), expected)
    assert sum(p.numel() for p in reloaded.parameters()) == plan.shape_after.parameters
    assert (expected - logits(model)).abs().max() > 1e-3 * expected.std()
    assert (expected - logits(without(model, [0, 1]))).abs().max() > 1e-3 * expected.std()


_WINDOW = {"sliding_window": 4}
BY_INDEX: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3, **_WINDOW},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 3, **_WINDOW},
    "gemma2": _WINDOW,
    "gemma3_text": {"sliding_window_pattern": 3, **_WINDOW},
    "cohere2": {"sliding_window_pattern": 3, **_WINDOW},
    "exaone4": {"sliding_window_pattern": 3, **_WINDOW},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo3": _WINDOW,
    "cwm": _WINDOW,
    "vaultgemma": _WINDOW,
    "ministral": {"layer_types": ["full_attention", "sliding_attention"] * 3, **_WINDOW},
}


@pytest.mark.parametrize(("model_type", "entries"), BY_INDEX.items(), ids=BY_INDEX)
def test_what_depends_on_the_index_goes_with_its_block(
    model_type: str, entries: dict[str, Any], tmp_path: Path
) -> None:
    tiny = deep(find(f"{model_type}-mha"), 6, **entries)
    model, dense = written(tiny, tmp_path)
    # As older checkpoints have it: the pattern alone.
    (dense / "config.json").write_text(json.dumps(config_of(tiny)))
    plan = planned(dense, blocks=[9, 1, 8, 2, 7, 6], removed=2)
    result = apply_plan(dense, plan, tmp_path / "out")
    assert result.verification.logit_difference == 0
    expected = logits(without(model, [1, 3]))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    assert torch.equal(logits(prune_model(model, plan)), expected)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    lists = [name for name in ("layer_types", "no_rope_layers") if name in config]
    assert lists
    assert all(len(config[name]) == 4 for name in lists)
    if model_type.startswith("qwen"):
        assert config["max_window_layers"] == 2
    dense_lists = {name: getattr(model.config, name)[:4] for name in lists}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | dense_lists))
    other = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (other - expected).abs().max() > 1e-3 * expected.std(), "the lists matter"
    with pytest.raises(VerificationError, match=r"config\.json differs"):
        verify(tmp_path / "out", dense=dense).require()


def test_stored_names_close_the_gap_as_well(tmp_path: Path) -> None:
    """Checkpoints of base models leave out the prefix."""
    model, _ = written(deep(find("gpt2-mha"), 4), tmp_path)
    model.base_model.save_pretrained(tmp_path / "base")
    plan = planned(tmp_path / "base", blocks=[9, 1, 8, 2], removed=2)
    assert apply_plan(tmp_path / "base", plan, tmp_path / "out", max_shard_size="100KB").verification.passed
    before, after = (stored_tensors(tmp_path / name) for name in ("base", "out"))
    assert set(after) == {name for name in before if not name.startswith(("h.2.", "h.3."))}
    assert len({tensor.file for tensor in after.values()}) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(without(model, [1, 3])))


def test_pruning_by_depth_in_one_go(tmp_path: Path) -> None:
    tiny = deep(find("llama-gqa"), 5)
    model, dense = written(tiny, tmp_path)
    ratio = share(describe(config_of(tiny)).shape, 2)
    request: dict[str, Any] = {"ratio": ratio, "criterion": "depth", "calibration": CALIBRATION, "protect_last": 0}
    with pytest.raises(PlanError, match="the first 4 and the last 0 blocks are protected"):
        prune(dense, tmp_path / "out", **request)
    result = prune(dense, tmp_path / "out", **request, protect_first=0)
    change = [log_perplexity(without(model, [block])) for block in range(5)]
    assert result.plan.kept_layers == tuple(sorted(sorted(range(5), key=lambda block: change[block])[2:]))
    assert ImportanceScores.load(tmp_path / "out" / "amprune" / "scores.safetensors").blocks is not None
    assert verify(tmp_path / "out", dense=dense).passed


def test_verification_notices_blocks_in_another_order(tmp_path: Path) -> None:
    _, dense = written(deep(find("llama-gqa"), 4), tmp_path)
    checkpoint, plan = read_checkpoint(dense), planned(dense, blocks=[9, 1, 8, 2], removed=2)
    apply_plan(dense, plan, tmp_path / "out")
    other = replace(plan, layers=(plan.layers[0], None, None, plan.layers[2]))
    report = verify_checkpoint(tmp_path / "out", checkpoint, other)
    assert [check.name for check in report.checks if not check.passed] == ["tensors", "logits"]
    with pytest.raises(VerificationError, match="logits differ from those of the masked dense model"):
        report.require()


def test_a_plan_of_other_depth_does_not_pass_as_this_one(tmp_path: Path) -> None:
    _, dense = written(deep(find("llama-gqa"), 4), tmp_path)
    apply_plan(dense, planned(dense, blocks=[9, 1, 8, 2], removed=2), tmp_path / "out")
    report = verify_checkpoint(tmp_path / "out", read_checkpoint(dense), planned(dense, blocks=[9, 1, 8, 2], removed=1))
    assert {check.name for check in report.checks if not check.passed} >= {"config", "dtype and ties", "logits"}


def test_blocks_and_units_may_go_together(tmp_path: Path) -> None:
    """A plan may be edited by hand to remove both; the numbers must agree."""
    model, dense = written(deep(find("llama-gqa"), 4), tmp_path)
    plan = planned(dense, blocks=[9, 1, 8, 2], removed=2)
    layers = tuple(layer and replace(layer, neurons=layer.neurons[:60]) for layer in plan.layers)
    after = plan.shape_before.shrunk(query_heads=12, key_value_heads=4, neurons=60, layers=2)
    both = replace(
        plan, layers=layers, shape_after=after, ratio_actual=1 - after.parameters / plan.shape_before.parameters
    )
    assert apply_plan(dense, both, tmp_path / "out").verification.passed
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in reloaded.parameters()) == after.parameters
    assert torch.equal(logits(reloaded), logits(prune_model(model, both)))


# Words


def test_cards_and_inspection_speak_of_blocks(tmp_path: Path) -> None:
    _, dense = written(deep(find("llama-gqa"), 8), tmp_path)
    plan = planned(dense, blocks=[9, 1, 8, 2, 7, 6, 5, 5], removed=2)
    assert removal(plan) == "2 of 8 decoder blocks were removed, the least important (1, 3 of 0 to 7)"
    apply_plan(dense, plan, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by the criterion depth. It is an ordinary checkpoint." in card
    assert "with the removed blocks skipped" in card
    assert "| decoder blocks | 8 | 6 |" in card
    assert "AMP" not in card
    assert inspect(dense).removable_blocks == 2


def test_reports_draw_the_blocks_and_say_which_went(tmp_path: Path) -> None:
    _, dense = written(deep(find("llama-gqa"), 8), tmp_path)
    apply_plan(
        dense, plan := planned(dense, blocks=[9, 1, 8, 2, 7, 6, 5, 5], removed=2), tmp_path / "out",
        scores=depth_scores(plan.shape_before, [9, 1, 8, 2, 7, 6, 5, 5], plan.fingerprint or ""),
    )  # fmt: skip
    report = write_report(tmp_path / "out").markdown.read_text()
    assert "By the criterion depth whole decoder blocks were scored" in report
    assert "![Bar chart of the scores of 8 decoder blocks. Blocks of out: 2 of 8 were removed (hatched).]" in report
    assert "2 of 8 decoder blocks were removed, the least important (1, 3 of 0 to 7), by the criterion depth." in report
    assert "heads.png" not in report
    assert "AMP" not in report


def test_removed_blocks_are_drawn_hollow() -> None:
    plan = plan_of([4, -1, 2, 3, 5, 1], 2, protect_first=0, protect_last=0)
    figure = blocks_figure(np.array([4, -1, 2, 3, 5, 1], np.float32), plan)
    bars = [bar for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]
    hollow = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars if bar.get_hatch()}
    assert hollow == {1: -1, 5: 1}
    assert len(bars) == 6
