"""The property that everything rests on, for every family: sliced equals masked, and the result reloads."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from tiny_models import ALL, NEURONS_ONLY, PRUNABLE_HEADS, VOCABULARY, Tiny, config_of, find, make_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from amprune import CalibrationSet, PlanError, UnsupportedModelError, apply_plan, make_plan, prune_model, score
from amprune.model.architecture import config_with_heads, describe
from amprune.model.families import FAMILIES, REFUSED, find_family, supported_model_types
from amprune.plan.artefact import PruningPlan

TOLERANCE = 1e-4  # of the standard deviation of the logits, in float32
CALIBRATION = CalibrationSet("random", tuple(tuple((i * 7 + j * 13) % VOCABULARY for j in range(20)) for i in range(3)))


def masked_logits(dense: PreTrainedModel, plan: PruningPlan, ids: torch.Tensor) -> torch.Tensor:
    """Computes the dense model's logits with removed columns of the output projections zeroed, written out by hand."""
    family, shape = find_family(plan.shape_before.model_type), plan.shape_before
    model = copy.deepcopy(dense).requires_grad_(False)
    for index, layer in enumerate(plan.layers):
        prefix = family.layer_prefix.format(layer=index)
        gone_heads = [head for head in range(shape.num_attention_heads) if head not in layer.query_heads]
        gone = [head * shape.head_dim + d for head in gone_heads for d in range(shape.head_dim)]
        gone_neurons = [n for n in range(shape.intermediate_size) if n not in layer.neurons]
        for name, columns in ((family.attention_output, gone), (family.mlp_output, gone_neurons)):
            module = model.get_submodule(prefix + name)
            if type(module).__name__ == "Conv1D":
                module.weight[columns] = 0
            else:
                module.weight[:, columns] = 0
    return model(ids).logits


def pruned_pairs() -> list[ParameterSet]:
    return list(_pairs())


def _pairs() -> Iterator[ParameterSet]:
    for tiny in PRUNABLE_HEADS:
        for mode in ("groups", "within"):
            if not (mode == "within" and tiny.variant == "mha") and not (mode == "groups" and tiny.variant == "mqa"):
                yield pytest.param(tiny, mode, id=f"{tiny.id}-{mode}")
    for tiny in NEURONS_ONLY:
        yield pytest.param(tiny, None, id=tiny.id)


@pytest.mark.parametrize(("tiny", "mode"), pruned_pairs())
def test_sliced_equals_masked_and_reloads(tiny: Tiny, mode: str | None, tmp_path: Path) -> None:
    dense = make_model(tiny)
    dense.save_pretrained(tmp_path / "dense")
    scores = score(tmp_path / "dense", calibration=CALIBRATION, preset="paper")
    shape = scores.shape
    request = {"ratio": 0.1} if mode is None else {"heads_mode": mode, "heads_ratio": 0.34, "neurons_ratio": 0.3}
    plan = make_plan(scores, **request)
    if mode is not None:
        assert plan.shape_after.num_attention_heads < shape.num_attention_heads
    assert plan.shape_after.intermediate_size < shape.intermediate_size
    result = apply_plan(tmp_path / "dense", plan, tmp_path / "out")
    assert result.verification.passed

    ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = masked_logits(dense, plan, ids)
        reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        found = reloaded(ids).logits
        in_memory = prune_model(dense, plan)(ids).logits
    assert not any(info.values())
    assert (found - expected).abs().max() < TOLERANCE * expected.std()
    assert (in_memory - expected).abs().max() < TOLERANCE * expected.std()
    assert sum(p.numel() for p in reloaded.parameters()) == plan.shape_after.parameters
    if mode is not None:
        assert (expected - dense(ids).logits).abs().max() > 10 * TOLERANCE * expected.std()


def test_every_listed_type_has_a_tiny_model() -> None:
    assert {tiny.model_type for tiny in ALL} == set(supported_model_types())


@pytest.mark.parametrize("tiny", ALL, ids=lambda tiny: tiny.id)
def test_heads_are_prunable_where_the_tables_say_so(tiny: Tiny) -> None:
    shape = describe(config_of(tiny)).shape
    assert (shape.heads_refused is None) == (tiny in PRUNABLE_HEADS)


@pytest.mark.parametrize("tiny", NEURONS_ONLY, ids=lambda tiny: tiny.id)
def test_heads_are_refused_where_removing_them_is_not_masking(tiny: Tiny, tmp_path: Path) -> None:
    make_model(tiny).save_pretrained(tmp_path / "dense")
    scores = score(tmp_path / "dense", calibration=CALIBRATION, preset="paper")
    with pytest.raises(PlanError, match="cannot be removed"):
        make_plan(scores, ratio=0.05, only="heads")


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_types_with_a_fixed_width_are_refused_because_stock_transformers_ignores_the_config(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="fixes its MLP width"):
        find_family(model_type)
    config = CONFIG_MAPPING[model_type](hidden_size=48, n_head=6, n_layer=1, vocab_size=64, expansion_ratio=2)
    config.intermediate_size = config.n_inner = config.ffn_dim = 96
    with torch.device("meta"):
        sizes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    width = next(size[0] for name, size in sizes.items() if name.endswith(("dense_h_to_4h.weight", "up_proj.weight")))
    assert width == 4 * config.hidden_size


def test_no_type_is_listed_twice() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))


def test_llama_with_a_head_count_that_its_config_refuses_is_written_as_mistral(tmp_path: Path) -> None:
    tiny = find("llama-mha")
    make_model(tiny).save_pretrained(tmp_path / "dense")
    plan = make_plan(
        score(tmp_path / "dense", calibration=CALIBRATION, preset="paper"), heads_ratio=1 / 6, neurons_ratio=0.1
    )
    assert 48 % plan.shape_after.num_attention_heads != 0
    result = apply_plan(tmp_path / "dense", plan, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(result.folder).config.model_type == "mistral"


def test_what_an_equivalent_config_says_does_not_depend_on_the_installed_release() -> None:
    raw = config_of(find("llama-mha"))
    fewer = describe(raw).shape.shrunk(query_heads=5, key_value_heads=5, neurons=80)
    written = config_with_heads(raw, find_family("llama"), fewer)
    assert written["model_type"] == "mistral"
    assert "transformers_version" not in written
    assert config_with_heads({**raw, "transformers_version": "5.0"}, find_family("llama"), fewer) == {
        **written,
        "transformers_version": "5.0",
    }


def test_the_same_config_is_measured_once_wherever_it_stands() -> None:
    raw = config_of(find("llama-mha"))
    assert describe(raw, where="here") is describe(dict(reversed(raw.items())), where="there")
    for where in ("here", "there"):
        with pytest.raises(UnsupportedModelError, match=f"^{where}: transformers refuses"):
            describe({**raw, "vocab_size": "many"}, where=where)


def test_head_counts_that_no_architecture_accepts_are_not_planned(tmp_path: Path) -> None:
    shape = describe(config_of(find("arcee-mha"))).shape
    assert shape.query_head_counts == (1, 2, 3, 4, 6)
