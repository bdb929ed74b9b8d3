"""Bias compensation: stored biases hold the mean of what was removed, and every proof still holds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ALL, VOCABULARY, Tiny, config_of, find, make_model, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from amprune import (
    CalibrationSet,
    ImportanceScores,
    PlanError,
    ScoresError,
    VerificationError,
    apply_plan,
    make_plan,
    prune_model,
    score,
    verify,
)
from amprune.cut.biases import check_biases, compensated_biases
from amprune.model.architecture import describe
from amprune.model.families import find_family
from amprune.model.reader import read_checkpoint
from amprune.scoring.scores import InputMeans, LayerScores

CALIBRATION = CalibrationSet("made up", tuple(tuple((i * 7 + j) % VOCABULARY for j in range(12)) for i in range(3)))


def has_biases(tiny: Tiny) -> bool:
    architecture = describe(config_of(tiny))
    family = architecture.family
    prefix = family.layer_prefix.format(layer=1)
    names = (f"{prefix}{module}.bias" for module in (family.attention_output, family.mlp_output))
    return any(name in architecture.tensors for name in names)


BIASED = [tiny for tiny in ALL if has_biases(tiny)]


def made_scores(folder: Path, *, means: bool = True) -> ImportanceScores:
    """Random scores and means, so that nothing cancels."""
    checkpoint, draw = read_checkpoint(folder), np.random.default_rng(0)
    shape = checkpoint.shape
    sizes = (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
    wide = (shape.num_attention_heads * shape.head_dim, shape.intermediate_size)
    layers = [LayerScores(*(draw.random(size, np.float32) for size in sizes)) for _ in range(2)]
    inputs = [InputMeans(*(draw.normal(0, 2, size).astype(np.float32) for size in wide)) for _ in range(2)]
    return ImportanceScores(
        tuple(layers), shape, checkpoint.fingerprint, "flap", CALIBRATION.to_dict(), {},
        input_means=tuple(inputs) if means else None,
    )  # fmt: skip


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_model(find("llama-biases"), tmp_path / "dense")


@torch.no_grad()
def compensated(model: PreTrainedModel, scores: ImportanceScores, plan: Any) -> PreTrainedModel:
    """Zeroes the removed columns and adds their mean contribution to the biases, one product at a time."""
    family, means = find_family(model.config.model_type), scores.input_means
    assert means is not None
    for index, layer in enumerate(plan.layers):
        size = scores.shape.head_dim
        heads = [h * size + d for h in range(scores.shape.num_attention_heads) for d in range(size)
                 if h not in layer.query_heads]  # fmt: skip
        neurons = [n for n in range(scores.shape.intermediate_size) if n not in layer.neurons]
        prefix = family.layer_prefix.format(layer=index)
        for name, gone, mean in (
            (family.attention_output, heads, means[index].attention),
            (family.mlp_output, neurons, means[index].mlp),
        ):
            module: Any = model.get_submodule(prefix + name)
            weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
            for feature in gone:
                if module.bias is not None:
                    module.bias += float(mean[feature]) * weight[feature]
                weight[feature] = 0
    return model


@pytest.mark.parametrize("tiny", BIASED, ids=lambda tiny: tiny.id)
def test_biases_hold_the_mean_of_what_was_removed(tiny: Tiny, tmp_path: Path) -> None:
    model = make_model(tiny)
    model.save_pretrained(tmp_path / "dense")
    scores = made_scores(tmp_path / "dense")
    plan = make_plan(scores, ratio=0.15)
    result = apply_plan(tmp_path / "dense", plan, tmp_path / "out", scores=scores, bias_compensation=True)
    assert result.verification.passed
    assert "biases" in [check.name for check in result.verification.checks]
    assert verify(tmp_path / "out", dense=tmp_path / "dense").passed

    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        plain = prune_model(model, plan)(ids).logits
        expected = compensated(model, scores, plan)(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (found - plain).abs().max() > 1e-2 * expected.std()


def test_there_are_families_with_biases() -> None:
    assert {"gpt2", "gpt_neox", "gptj", "opt", "phi", "falcon", "starcoder2", "nemotron"} <= {
        t.model_type for t in BIASED
    }


def test_the_scores_of_flap_serve(dense: Path, tmp_path: Path) -> None:
    scores = score(dense, criterion="flap", calibration=CALIBRATION)
    result = apply_plan(dense, make_plan(scores, ratio=0.2), tmp_path / "out", scores=scores, bias_compensation=True)
    assert result.plan.compensated
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by the criterion flap." in card
    assert "Biases of the output projections make up for the mean of what was removed" in card
    assert "with the removed units masked and the same biases" in card


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_biases_are_stored_in_their_dtype_and_verified_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = save_model(find("gpt2-mha"), tmp_path / "dense", dtype=dtype)
    scores = made_scores(dense)
    plan = make_plan(scores, ratio=0.1)
    result = apply_plan(dense, plan, tmp_path / "out", scores=scores, bias_compensation=True)
    assert result.verification.logit_difference is not None
    assert result.verification.logit_difference < 1e-12
    output, wanted = read_checkpoint(tmp_path / "out"), compensated_biases(read_checkpoint(dense), plan, scores)
    assert list(wanted) == [f"transformer.h.{layer}.mlp.c_proj.bias" for layer in range(2)]
    for name, bias in wanted.items():
        assert bias.dtype == torch.float64
        assert output[name].dtype == dtype
        assert torch.equal(output[name], bias.to(dtype))


def test_without_the_option_biases_are_copied(dense: Path, tmp_path: Path) -> None:
    scores = made_scores(dense)
    result = apply_plan(dense, make_plan(scores, ratio=0.2), tmp_path / "out", scores=scores)
    before, after = read_checkpoint(dense), read_checkpoint(tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.bias"
    assert torch.equal(before[name], after[name])
    assert not result.plan.compensated
    assert "biases" not in [check.name for check in result.verification.checks]


def edited(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        weights = load_file(out / "model.safetensors")
        edit(weights)
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    return change


BIAS, OTHER = "model.layers.1.mlp.down_proj.bias", "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("edit", "failed"),
    [
        (edited(lambda weights: weights[BIAS][3].add_(0.01)), ["biases"]),
        (edited(lambda weights: weights[OTHER][3].add_(0.5)), ["tensors", "logits"]),
    ],
    ids=["a compensated bias", "another bias"],
)
def test_a_bias_changed_afterwards_is_noticed(
    edit: Callable[[Path], None], failed: list[str], dense: Path, tmp_path: Path
) -> None:
    scores = made_scores(dense)
    apply_plan(dense, make_plan(scores, ratio=0.2), tmp_path / "out", scores=scores, bias_compensation=True)
    edit(tmp_path / "out")
    report = verify(tmp_path / "out", dense=dense)
    assert [check.name for check in report.checks if not check.passed] == failed


def test_without_its_scores_an_output_cannot_be_verified(dense: Path, tmp_path: Path) -> None:
    scores = made_scores(dense)
    apply_plan(dense, make_plan(scores, ratio=0.2), tmp_path / "out", scores=scores, bias_compensation=True)
    (tmp_path / "out" / "amprune" / "scores.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"scores\.safetensors is missing, by which the biases were changed"):
        verify(tmp_path / "out", dense=dense)


def test_a_plan_that_asks_for_it_needs_the_scores_again(dense: Path, tmp_path: Path) -> None:
    scores = made_scores(dense)
    result = apply_plan(dense, make_plan(scores, ratio=0.2), tmp_path / "out", scores=scores, bias_compensation=True)
    kept = tmp_path / "out" / "amprune"
    assert json.loads((kept / "plan.json").read_text())["compensated"] is True
    with pytest.raises(PlanError, match="needs the scores that the plan was made from"):
        apply_plan(dense, kept / "plan.json", tmp_path / "again")
    with pytest.raises(PlanError, match="asks for bias compensation, which needs a checkpoint on disk; use apply_plan"):
        prune_model(AutoModelForCausalLM.from_pretrained(dense), result.plan)
    again = apply_plan(dense, kept / "plan.json", tmp_path / "again", scores=scores)
    first, second = (read_checkpoint(tmp_path / name)[BIAS] for name in ("out", "again"))
    assert torch.equal(first, second)
    assert again.verification.passed


REFUSED: dict[str, tuple[Callable[[ImportanceScores], Any], type[Exception], str]] = {
    "no scores": (lambda _: None, PlanError, "needs the scores that the plan was made from, with mean inputs"),
    "no means": (
        lambda scores: replace(scores, input_means=None, criterion="amp"), ScoresError,
        "made by the criterion amp, carry no mean inputs, .* score with the criterion flap",
    ),
    "other weights": (lambda scores: replace(scores, fingerprint="0" * 64), PlanError, "another model .*other weights"),
    "another shape": (
        lambda scores: replace(scores, shape=replace(scores.shape, hidden_size=64)), PlanError, "hidden_size 48 != 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_scores_that_do_not_serve_are_refused_and_nothing_is_written(
    given: Callable[[ImportanceScores], Any], error: type[Exception], message: str, dense: Path, tmp_path: Path
) -> None:
    scores = made_scores(dense)
    plan = make_plan(scores, ratio=0.2)
    with pytest.raises(error, match=message):
        apply_plan(dense, plan, tmp_path / "out", scores=given(scores), bias_compensation=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-gqa", "opt-unbiased"])
def test_a_model_without_such_biases_is_refused(name: str, tmp_path: Path) -> None:
    dense = save_model(find(name), tmp_path / "dense")
    scores = made_scores(dense)
    with pytest.raises(PlanError, match=r"this \w+ model has none .*; llama-like models without biases would need"):
        apply_plan(dense, make_plan(scores, ratio=0.1), tmp_path / "out", scores=scores, bias_compensation=True)
    with pytest.raises(PlanError, match="needs output projections with biases"):
        check_biases(read_checkpoint(dense).architecture)


def test_where_nothing_goes_in_front_of_a_bias_there_is_nothing_to_do(tmp_path: Path) -> None:
    tiny = Tiny("llama", "half", {**find("llama-gqa").entries, "attention_bias": True})
    dense = save_model(tiny, tmp_path / "dense")
    scores = made_scores(dense)
    neurons, both = make_plan(scores, ratio=0.1, only="neurons"), make_plan(scores, ratio=0.3)
    with pytest.raises(
        PlanError, match="nothing to do: no output projection that loses inputs by this plan has a bias"
    ):
        apply_plan(dense, neurons, tmp_path / "out", scores=scores, bias_compensation=True)
    assert apply_plan(dense, both, tmp_path / "out", scores=scores, bias_compensation=True).verification.passed


def test_whole_blocks_are_not_compensated(dense: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(dense)
    blocks = np.array([1, 0], np.float32)
    scores = ImportanceScores((), checkpoint.shape, checkpoint.fingerprint, "depth", {}, {}, blocks=blocks)
    plan = make_plan(scores, ratio=0.4, protect_first=0, protect_last=0)
    with pytest.raises(PlanError, match="the plan removes whole blocks"):
        apply_plan(dense, plan, tmp_path / "out", scores=scores, bias_compensation=True)
    with pytest.raises(PlanError, match="the plan removes whole blocks"):
        apply_plan(dense, replace(plan, compensated=True), tmp_path / "out", scores=scores)
