"""Criteria: each held to a few-line reference that shares no code with it, over every family."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_calibration import CALIBRATION, architecture_of, random_samples
from tiny_models import ALL, Tiny, find, make_model, save_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from amprune import ScoresError, make_plan, score
from amprune.model.reader import read_checkpoint
from amprune.model.shape import ModelShape
from amprune.scoring.catalogue import CRITERIA, Needs, find_criterion
from amprune.scoring.run import score_criteria
from amprune.scoring.scores import ImportanceScores, LayerScores
from amprune.settings import Compute

KINDS = ("heads", "groups", "neurons")
UNITS = [name for name, criterion in CRITERIA.items() if not criterion.depth]


def _scored(folder: Path) -> dict[str, Any]:
    criteria = [CRITERIA[name] for name in UNITS]
    return score_criteria(read_checkpoint(folder), criteria, CALIBRATION, Compute(device="cpu"), seed=3)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], tuple[PreTrainedModel, dict[str, Any]]]:
    """Scores a tiny model by every criterion over units, once."""
    found: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {}

    def scores_of(tiny: Tiny) -> tuple[PreTrainedModel, dict[str, Any]]:
        if tiny.id not in found:
            folder = tmp_path_factory.mktemp("models") / tiny.id
            save_model(tiny, folder)
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            found[tiny.id] = model, _scored(folder)
        return found[tiny.id]

    return scores_of


# References: whole tensors, float64, one sample at a time, sliced by hand


def captured(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """Returns the inputs of modules, (tokens, features) float64 a sample."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keep(name: str, inputs: torch.Tensor) -> None:
        found[name].append(inputs.double().reshape(-1, inputs.shape[-1]))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs[0]))
        for name in names
    ]
    with torch.no_grad():
        for sample in CALIBRATION.samples:
            model(torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def read_weight(module: Any) -> torch.Tensor:
    """Returns (outputs, features) float64."""
    weight = module.weight.detach().double()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def by_head(values: torch.Tensor, heads: int) -> torch.Tensor:
    return torch.stack([chunk.sum() for chunk in values.chunk(heads)])


def projections(tiny: Tiny, layer: int) -> tuple[str, str]:
    """Returns the names of the attention's output projection and of the MLP's."""
    family = architecture_of(tiny).family
    prefix = family.layer_prefix.format(layer=layer)
    return prefix + family.attention_output, prefix + family.mlp_output


def expected_layer(
    name: str, model: PreTrainedModel, shape: ModelShape, out: str, down: str, inputs: dict[str, list[torch.Tensor]]
) -> list[torch.Tensor]:
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    attention, mlp = inputs[out], inputs[down]
    w_out, w_down = (read_weight(model.get_submodule(one)) for one in (out, down))

    def contributions(order: int) -> list[torch.Tensor]:
        found = []
        for count in (heads, groups):
            sizes = []
            for h in attention:
                added = [a @ w.T for a, w in zip(h.chunk(count, 1), w_out.chunk(count, 1), strict=True)]
                norms = torch.stack([torch.linalg.vector_norm(a.flatten(), ord=order) for a in added])
                sizes.append(norms / (len(h) if order == 1 else len(h) ** 0.5))
            found.append(torch.stack(sizes).mean(0))
        return found

    mean_square = [torch.stack([x.square().mean(0) for x in given]).mean(0) for given in (attention, mlp)]
    mean = [torch.stack([x.mean(0) for x in given]).mean(0) for given in (attention, mlp)]
    absolute = torch.stack([x.abs().mean(0) for x in mlp]).mean(0)
    root = torch.stack([x.square().mean(0).sqrt() for x in mlp]).mean(0)
    if name == "amp":
        return [*contributions(1), absolute]
    if name == "reversed":
        return [-values for values in (*contributions(1), absolute)]
    if name == "amp-l2":
        return [*contributions(2), root]
    if name == "amp-weighted":
        return [*contributions(1), absolute * w_down.norm(dim=0)]
    if name == "activation-l2":
        per_head = [by_head(mean_square[0], count).sqrt() for count in (heads, groups)]
        return [*per_head, mean_square[1].sqrt()]
    if name == "wanda-sp":
        columns = [(w.abs() * square.sqrt()).sum(0) for w, square in zip((w_out, w_down), mean_square, strict=True)]
        return [by_head(columns[0], heads), by_head(columns[0], groups), columns[1]]
    variance = [square - average**2 for square, average in zip(mean_square, mean, strict=True)]
    columns = [v * w.square().sum(0) for v, w in zip(variance, (w_out, w_down), strict=True)]
    columns = [(c - c.mean()) / c.std() for c in columns]
    per_head = [by_head(columns[0], count) / shape.head_dim for count in (heads, groups)]
    return [*per_head, columns[1]]


def owned_slices(tiny: Tiny, layer: int) -> dict[str, list[list[tuple[str, Any]]]]:
    """Lists, for each head, group and neuron, the (tensor name, index) of what it owns, counted out row by row."""
    architecture = architecture_of(tiny)
    shape = architecture.shape
    found: dict[str, list[list[tuple[str, Any]]]] = {"heads": [], "groups": [], "neurons": []}
    counts = {"query_head": shape.num_attention_heads, "key_value_head": shape.num_key_value_heads,
              "neuron": shape.intermediate_size}  # fmt: skip
    lists: dict[str, list[list[tuple[str, Any]]]] = {unit: [[] for _ in range(n)] for unit, n in counts.items()}
    for cut, name in architecture.layer_tensors(layer).items():
        position = 0
        for unit in cut.units:
            width = shape.head_dim if unit.value != "neuron" and not cut.one_row_per_head else 1
            for index in range(counts[unit.value]):
                rows = slice(position, position + width)
                lists[unit.value][index].append((name, rows if cut.axis == 0 else (slice(None), rows)))
                position += width
    size = shape.num_attention_heads // shape.num_key_value_heads
    found["heads"], found["neurons"] = lists["query_head"], lists["neuron"]
    found["groups"] = [
        sum((lists["query_head"][h] for h in range(g * size, (g + 1) * size)), lists["key_value_head"][g])
        for g in range(shape.num_key_value_heads)
    ]
    return found


def loss_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the gradient of the mean of the samples' mean losses, by plain backpropagation."""
    model.zero_grad()
    for sample in CALIBRATION.samples:
        ids = torch.tensor([sample])
        logits = model(ids, use_cache=False).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, ids[0, 1:]) / len(CALIBRATION.samples)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def assert_close(
    found: LayerScores, expected: Sequence[torch.Tensor], tolerance: float = 1e-5, *, at: str = ""
) -> None:
    for kind, values in zip(KINDS, expected, strict=True):
        scale = max(float(values.abs().max()), 1e-6)  # standardised scores of a single group are rounding alone
        np.testing.assert_allclose(
            getattr(found, kind), values.numpy(), rtol=tolerance, atol=tolerance * scale, err_msg=at
        )


FAMILIES = [tiny for tiny in ALL if tiny.variant in ("gqa", "mha", "mqa", "biases", "qk-norm", "tied")]
OVER_ACTIVATIONS = [name for name in UNITS if CRITERIA[name].needs is Needs.ACTIVATIONS]


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_criteria_over_activations_are_their_formulas(tiny: Tiny, scored: Any) -> None:
    model, scores = scored(tiny)
    shape = architecture_of(tiny).shape
    names = [projections(tiny, layer) for layer in range(shape.num_layers)]
    inputs = captured(model, [name for pair in names for name in pair])
    for name in OVER_ACTIVATIONS:
        assert len(scores[name].layers) == shape.num_layers
        for layer, (found, (out, down)) in enumerate(zip(scores[name].layers, names, strict=True)):
            assert_close(found, expected_layer(name, model, shape, out, down, inputs), at=f"{name}, layer {layer}")


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_magnitude_is_the_norm_of_what_a_unit_owns(tiny: Tiny, scored: Any) -> None:
    model, scores = scored(tiny)
    state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    for layer, found in enumerate(scores["magnitude"].layers):
        slices = owned_slices(tiny, layer)
        expected = [
            torch.tensor([sum(float(state[n][i].square().sum()) for n, i in owned) ** 0.5 for owned in slices[kind]])
            for kind in KINDS
        ]
        assert_close(found, expected)


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_taylor_is_what_plain_backpropagation_gives(tiny: Tiny, scored: Any) -> None:
    model, scores = scored(tiny)
    gradients = loss_gradients(model)
    state = model.state_dict()
    for layer, found in enumerate(scores["taylor"].layers):
        slices = owned_slices(tiny, layer)
        expected = [
            torch.tensor(
                [sum(float((state[n][i] * gradients[n][i]).abs().sum()) for n, i in owned) for owned in slices[kind]]
            )
            for kind in KINDS
        ]
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("tiny", [find("llama-gqa"), find("gpt2-mha"), find("falcon-gqa")], ids=lambda tiny: tiny.id)
def test_blocks_score_by_the_gradients_of_all_that_they_own(tiny: Tiny, scored: Any, tmp_path: Any) -> None:
    model, _ = scored(tiny)
    gradients, architecture = loss_gradients(model), architecture_of(tiny)
    save_model(tiny, tmp_path)
    found = score(tmp_path, criterion="depth-taylor", calibration=CALIBRATION, device="cpu")
    assert found.layers == ()
    assert found.blocks is not None
    for layer, value in enumerate(found.blocks):
        names = architecture.layer_tensors(layer).values()
        expected = sum(float((model.state_dict()[name] * gradients[name]).abs().sum()) for name in names)
        assert value == pytest.approx(expected, rel=1e-5)


# What a criterion is asked for


def test_one_pass_serves_all_criteria_that_need_the_same(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = find("llama-gqa")
    _, together = scored(tiny)
    passes = []
    monkeypatch.setattr(
        "amprune.scoring.run.measure_activations", lambda *a, **k: passes.append("forward") or real(*a, **k)
    )
    from amprune.scoring.activations import measure_activations as real

    alone = score_of(tiny, "wanda-sp")
    assert passes == ["forward"]
    for one, other in zip(alone.layers, together["wanda-sp"].layers, strict=True):
        assert all(np.array_equal(getattr(one, kind), getattr(other, kind)) for kind in KINDS)


def score_of(tiny: Tiny, criterion: str, **options: Any) -> ImportanceScores:
    with tempfile.TemporaryDirectory() as folder:
        save_model(tiny, Path(folder))
        return score(folder, preset="paper", criterion=criterion, calibration=CALIBRATION, device="cpu", **options)


@pytest.mark.parametrize("name", [name for name in UNITS if not CRITERIA[name].calibrated])
def test_no_calibration_set_is_read_for_a_criterion_that_needs_none(name: str, tmp_path: Path) -> None:
    folder = save_model(find("llama-gqa"), tmp_path)
    found = score(folder, criterion=name, calibration="/no/such/file.txt")
    assert found.calibration == {}
    assert found.criterion == name


def test_random_scores_follow_the_seed_and_differ_by_layer() -> None:
    one, again, other = (score_of(find("llama-gqa"), "random", seed=seed).layers for seed in (1, 1, 2))
    assert np.array_equal(one[0].neurons, again[0].neurons)
    assert not np.array_equal(one[0].neurons, other[0].neurons)
    assert not np.array_equal(one[0].neurons, one[1].neurons)


@pytest.mark.parametrize("name", UNITS)
def test_scores_of_every_criterion_survive_their_file(name: str, scored: Any, tmp_path: Path) -> None:
    _, scores = scored(find("phi-gqa"))
    scores[name].save(tmp_path / "one.safetensors")
    read = ImportanceScores.load(tmp_path / "one.safetensors")
    read.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert (read.input_means is not None) == (name == "flap")
    plan = make_plan(read, ratio=0.2)
    assert plan.provenance["criterion"] == name


def test_the_reversed_criterion_keeps_what_the_reversed_order_keeps(scored: Any) -> None:
    _, scores = scored(find("llama-gqa"))
    one, other = make_plan(scores["reversed"], ratio=0.3), make_plan(scores["amp"], ratio=0.3, order="reversed")
    assert one.layers == other.layers


@pytest.mark.parametrize(
    ("asked", "near"), [("wanda", "wanda-sp"), ("tailor", "taylor"), ("AMP-L2", "amp-l2"), ("zzz", None)]
)
def test_an_unknown_criterion_is_refused_with_the_nearest(asked: str, near: str | None) -> None:
    with pytest.raises(ScoresError, match="unknown criterion") as error:
        find_criterion(asked)
    assert ("did you mean" in str(error.value)) == (near is not None)
    assert near is None or f"did you mean {near}?" in str(error.value)
    assert all(name in str(error.value) for name in CRITERIA)


def test_gradients_that_do_not_fit_are_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(find("llama-gqa"), tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    monkeypatch.setattr("amprune.scoring.run.loaded_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        ScoresError, match=r"takes about [\d.]+ MiB here \(weights \d+ KiB, .*, logits .*\), but 98 KiB are free on cpu"
    ):
        score(folder, criterion="taylor", calibration=CALIBRATION, device="cpu")


def test_gradients_are_refused_for_a_model_that_is_spread_or_streamed(tmp_path: Path) -> None:
    folder = save_model(find("llama-gqa"), tmp_path)
    with pytest.raises(ScoresError, match="needs the whole model on one device"):
        score(folder, criterion="taylor", calibration=CALIBRATION, device_map="disk")


def test_gradients_need_a_next_token(tmp_path: Path) -> None:
    folder = save_model(find("llama-gqa"), tmp_path)
    with pytest.raises(ScoresError, match=r"no sample .* has two tokens"):
        score(folder, criterion="taylor", calibration=random_samples(1, 1), device="cpu")


def test_gradients_that_are_not_finite_name_their_layer(tmp_path: Path) -> None:
    model = make_model(find("llama-gqa"))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(ScoresError, match="layer 1: a gradient is not finite"):
        score(tmp_path, criterion="taylor", calibration=CALIBRATION, device="cpu")


def test_batches_change_no_gradient_score(monkeypatch: pytest.MonkeyPatch) -> None:
    together = score_of(find("cohere-qk-norm"), "taylor")
    monkeypatch.setattr("amprune.scoring.gradients._BATCH_TOKENS", 1)
    alone = score_of(find("cohere-qk-norm"), "taylor")
    for one, other in zip(together.layers, alone.layers, strict=True):
        assert_close(one, [torch.tensor(getattr(other, kind)) for kind in KINDS])


def test_a_backward_pass_holds_the_gradients_of_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the weights that ask for a gradient whenever a block is scored."""
    from amprune.scoring import gradients

    asking: list[int] = []
    real = gradients._block_gradients

    def spy(block: Any, weights: Any, passed: Any) -> Any:
        asking.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        assert all(p.grad is None for p in model.parameters())
        return real(block, weights, passed)

    monkeypatch.setattr(gradients, "_block_gradients", spy)
    tiny = find("llama-gqa")
    model, architecture = make_model(tiny), architecture_of(tiny)
    gradients.score_gradients(model, architecture, CALIBRATION)
    shape = architecture.shape
    one = (shape.attention_parameters + shape.mlp_parameters) // shape.num_layers
    assert asking == [one] * shape.num_layers
    assert all(p.requires_grad for p in model.parameters())
