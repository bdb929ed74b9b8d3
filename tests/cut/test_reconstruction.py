"""The refit of whole models: against references computed with plain hooks, over every family, proved and recorded."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_calibration import architecture_of, random_samples
from tiny_models import ALL, GQA, Tiny, config_of, find, make_model, save_model
from tiny_reconstruction import CALIBRATION, LENGTH, harsh, plan_of, write
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from amprune import CalibrationSet, PlanError, PruningPlan, VerificationError, apply_plan, prune_model, verify
from amprune.cut.refit.record import read_record
from amprune.cut.refit.run import Reconstruction, digest, packed, reconstruct
from amprune.errors import AmpruneError, ReconstructionError
from amprune.model.architecture import Architecture
from amprune.model.families import has_norm_after_output
from amprune.model.reader import read_checkpoint
from amprune.settings import Compute

FRESH = torch.randint(160, (4, LENGTH), generator=torch.Generator().manual_seed(7))


def refit_of(model: PreTrainedModel, plan: PruningPlan, folder: Path, **options: Any) -> Reconstruction:
    model.save_pretrained(folder / "dense")
    calibration = options.pop("calibration", CALIBRATION)
    spill = folder / "spill"
    spill.mkdir(exist_ok=True)
    where = Compute(**{"device": "cpu", "batch_tokens": 512, **options})
    return reconstruct(read_checkpoint(folder / "dense"), plan, calibration, spill, where)


def with_tensors(model: PreTrainedModel, plan: PruningPlan, tensors: Any) -> PreTrainedModel:
    """Prunes a copy of a model and gives it refitted tensors."""
    pruned = prune_model(model, plan)
    assert not pruned.load_state_dict(dict(tensors), strict=False).unexpected_keys
    return pruned


def hidden(model: Any) -> Any:
    with torch.inference_mode():
        return model.base_model(FRESH).last_hidden_state.double()


Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def watched(model: PreTrainedModel, architecture: Architecture, layer: int) -> Iterator[Seen]:
    """Copies what a block, its attention projection and its MLP projection are given and give, in float64."""
    seen: Seen = {}
    block = model.get_submodule(architecture.block(layer))
    family = architecture.family
    modules = {
        "block": block,
        "attention": block.get_submodule(family.attention_output),
        "mlp": block.get_submodule(family.mlp_output),
    }

    def hook(name: str) -> Any:
        def look(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            gives = output[0] if isinstance(output, tuple) else output
            seen[name] = (given.double().clone().flatten(0, -2), gives.double().clone().flatten(0, -2))

        return look

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def observed(model: PreTrainedModel, architecture: Architecture, layer: int, ids: torch.Tensor) -> Seen:
    with watched(model, architecture, layer) as seen, torch.inference_mode():
        model(ids)
    return seen


# Against references


def expected_change(
    given: torch.Tensor, missing: torch.Tensor, strength: float, *, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solves the ridge problem in float64 from its stacked system; returns the changes of weight and bias."""
    inputs = given.shape[1]
    ridge = strength * given.square().sum(0).mean()
    rows = torch.eye(inputs, dtype=torch.float64) * ridge.sqrt()
    if bias:
        given = torch.cat([given, torch.ones_like(given[:, :1])], dim=1)
        rows = torch.cat([rows, torch.zeros(inputs, 1, dtype=torch.float64)], dim=1)
    target = torch.cat([missing, torch.zeros(inputs, missing.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(torch.cat([given, rows]), target).solution
    return change[:inputs], change[inputs:]


UNUSUAL = [
    Tiny("opt", "norm-last", {**find("opt-mha").entries, "do_layer_norm_before": False}),
    Tiny("hyperclovax", "no-post-norm", {**GQA, "head_dim": 16, "use_post_norm": False, "residual_multiplier": 0.3}),
    Tiny("gpt_neox", "sequential", {"num_attention_heads": 6, "use_parallel_residual": False}),
    Tiny("falcon", "sequential", {"num_attention_heads": 6, "parallel_attn": False}),
    Tiny("granite", "scaled", {**GQA, "head_dim": 16, "residual_multiplier": 0.3}),
]
REFERENCES = [
    *(find(name) for name in ("llama-gqa", "llama-biases", "gpt2-mha", "gemma2-gqa", "cohere-gqa", "opt-mha")),
    UNUSUAL[0],
    UNUSUAL[-1],
]


@pytest.mark.parametrize("tiny", REFERENCES, ids=lambda tiny: tiny.id)
def test_projections_are_refitted_as_a_reference_says(tiny: Tiny, tmp_path: Path) -> None:
    model, plan = make_model(tiny), harsh(tiny)
    done = refit_of(model, plan, tmp_path)
    for layer in range(2):
        for part in ("attention", "mlp"):
            check_projection(tiny, model, plan, done, layer, part)


def check_projection(
    tiny: Tiny, model: PreTrainedModel, plan: PruningPlan, done: Reconstruction, layer: int, part: str
) -> None:
    """Gives the pruned model all that was refitted before; what is missing then is computed with plain hooks."""
    architecture, errors = architecture_of(tiny), done.record["layers"][layer][part]
    family = architecture.family
    names = [f"{family.layer_prefix.format(layer=index)}{module}" for index in range(2)
             for module in (family.attention_output, family.mlp_output)]  # fmt: skip
    place = 2 * layer + (part == "mlp")
    name, later = names[place], tuple(names[place:])
    if errors["strength"] is None:
        assert f"{name}.weight" not in done.tensors
        assert errors["held_out_before"] == errors["held_out_after"]
        return
    cut = with_tensors(model, plan, {key: done.tensors[key] for key in done.tensors if not key.startswith(later)})
    rows = packed(CALIBRATION, longest=done.record["row_tokens"], eos=2)
    rows = rows[: errors["tokens"] // rows.shape[1]]
    dense, found = (observed(one, architecture, layer, rows) for one in (model, cut))
    missing = dense[part][1] - found[part][1]
    if not has_norm_after_output(family, config_of(tiny)):
        scale = config_of(tiny).get("residual_multiplier", 1.0)
        missing = missing + (dense["block"][0] - found["block"][0]) / scale
        if part == "mlp":
            missing = (dense["block"][1] - found["block"][1]) / scale
    kept: Any = cut.get_submodule(name)
    change, bias = expected_change(found[part][0], missing, errors["strength"], bias=kept.bias is not None)
    weight = done.tensors[f"{name}.weight"].double() - kept.weight.detach().double()
    added = found[part][0] @ (weight if isinstance(kept, Conv1D) else weight.T)
    wanted = found[part][0] @ change
    assert (f"{name}.bias" in done.tensors) == (kept.bias is not None)
    if kept.bias is not None:
        added = added + done.tensors[f"{name}.bias"].double() - kept.bias.detach().double()
        wanted = wanted + bias
    assert (added - wanted).norm() < 5e-3 * wanted.norm(), "but for the float32 of the sums"
    left = (missing - wanted).square().sum() / (missing + found[part][1]).square().sum()
    assert errors["after"] == pytest.approx(float(left), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-mha", "gemma2-gqa", "falcon-mqa", "llama-tied"])
def test_where_nothing_is_removed_nothing_changes(name: str, tmp_path: Path) -> None:
    done = refit_of(make_model(find(name)), plan_of(architecture_of(find(name)).shape), tmp_path)
    assert not done.tensors
    assert done.record["sha256"] == {}
    for layer in done.record["layers"]:
        assert layer["drift"] == 0
        assert {layer[part][of] for part in ("attention", "mlp") for of in ("before", "held_out_after")} == {0}


def test_a_duplicated_neuron_is_made_up_for(tmp_path: Path) -> None:
    """Two neurons give the same, and share what they add; without one of them the other has to give it all."""
    tiny = find("llama-gqa")
    model: Any = make_model(tiny)
    shape = architecture_of(tiny).shape
    with torch.no_grad():
        for layer in model.base_model.layers:
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[5] = projection.weight[3]
            layer.mlp.down_proj.weight[:, 3] *= 40  # so that it matters
            layer.mlp.down_proj.weight[:, 5] = layer.mlp.down_proj.weight[:, 3]
    plan = plan_of(shape, neurons=79)
    neurons = tuple(neuron for neuron in range(80) if neuron != 5)
    plan = replace(plan, layers=tuple(replace(layer, neurons=neurons) for layer in plan.layers if layer))
    done = refit_of(model, plan, tmp_path)
    with torch.inference_mode():
        expected = model(FRESH).logits
        plain, refitted = (
            (with_tensors(model, plan, tensors)(FRESH).logits - expected).abs().max() / expected.std()
            for tensors in ({}, done.tensors)
        )
    assert plain > 0.1
    assert refitted < 2e-4
    assert done.record["layers"][1]["drift"] < 1e-6


# Every family


def representative() -> list[Tiny]:
    """One variant of every family, with grouped attention where there is one, and those that differ in kind."""
    first = {tiny.model_type: tiny for tiny in reversed(ALL)} | {t.model_type: t for t in ALL if t.variant == "gqa"}
    return [*first.values(), *map(find, ("llama-tied", "stablelm-biases", "falcon-biases")), *UNUSUAL]


@pytest.mark.parametrize("tiny", representative(), ids=lambda tiny: tiny.id)
def test_the_refit_brings_every_family_nearer_to_the_dense_model(tiny: Tiny, tmp_path: Path) -> None:
    model, plan = make_model(tiny), harsh(tiny)
    done = refit_of(model, plan, tmp_path)
    for layer in done.record["layers"]:
        for part in ("attention", "mlp"):
            assert layer[part]["held_out_after"] <= layer[part]["held_out_before"]
    expected, pruned = hidden(model), prune_model(model, plan)
    plain = (hidden(pruned) - expected).norm()
    assert not pruned.load_state_dict(dict(done.tensors), strict=False).unexpected_keys
    assert (hidden(pruned) - expected).norm() < 0.98 * plain


@pytest.mark.parametrize("tiny", [*ALL, *UNUSUAL], ids=lambda tiny: tiny.id)
def test_it_is_known_where_a_norm_follows_the_projections(tiny: Tiny) -> None:
    """Where none does, what a block adds is the sum of what its two projections give, times the multiplier."""
    architecture = architecture_of(tiny)
    found = observed(make_model(tiny), architecture, 1, FRESH[:1, :16])
    given, gives = found["block"]
    added = config_of(tiny).get("residual_multiplier", 1.0) * (found["attention"][1] + found["mlp"][1])
    direct = float((gives - given - added).norm() / added.norm()) < 1e-5
    assert direct is not has_norm_after_output(architecture.family, config_of(tiny))


# What is written, and its proof


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    out, _ = write(find("llama-gqa"), folder, max_shard_size="100KB")
    assert verify(out, dense=folder / "dense").passed
    return out


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    """A copy of the output; the dense model stays where it is."""
    folder = tmp_path / "out"
    for file in written.rglob("*"):
        if file.is_file():
            copy = folder / file.relative_to(written)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return folder


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "amprune" / "reconstruction.json").read_text())
    return found


def change(out: Path, name: str, index: tuple[int, ...], factor: float) -> None:
    """Changes one stored value."""
    file = next(file for file in out.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name][index] = tensors[name][index] * factor + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-gqa", torch.bfloat16), ("gpt2-mha", torch.float32), ("falcon-biases", torch.float16)],
)
def test_what_is_stored_is_what_was_fitted(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    out, report = write(find(name), tmp_path, dtype=dtype)
    hashes, stored = record_of(out)["sha256"], read_checkpoint(out)
    assert hashes
    assert {tensor: digest(stored[tensor]) for tensor in hashes} == hashes
    assert {stored[tensor].dtype for tensor in hashes} == {dtype}
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert {tensor: digest(state[tensor]) for tensor in hashes} == hashes
    details = {check.name: check.detail for check in report.checks}
    assert details["refit"] == f"{len(hashes)} tensors of output projections are those that were fitted, byte by byte"
    assert "removed units masked and its output projections refitted" in details["logits"]


def test_the_record_says_what_was_done(written: Path) -> None:
    record, read = record_of(written), read_record(written)
    assert read is not None
    assert {name: record[name] for name in ("format", "rows", "row_tokens", "held_out_rows")} == {
        "format": 1, "rows": 20, "row_tokens": 128, "held_out_rows": 2,
    }  # fmt: skip
    assert record["calibration"] == CALIBRATION.to_dict()
    assert (record["dtype"], record["moments_dtype"], record["device"]) == ("float32", "float64", "cpu")
    assert len(read.projections) == 4
    for errors in read.projections:
        assert errors.tokens in (18 * 128, 9 * 128, 4 * 128)
        assert errors.strength is not None
        assert 0 <= errors.held_out_after <= errors.held_out_before
    assert [vars(layer.mlp) for layer in read.layers] == [layer["mlp"] for layer in record["layers"]]
    assert [layer.drift for layer in read.layers] == [layer["drift"] for layer in record["layers"]]


def test_the_same_input_gives_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = apply_plan(
        written.parent / "dense", harsh(find("llama-gqa")), tmp_path / "again",
        refit=CALIBRATION, device="cpu", batch_tokens=512,
    )  # fmt: skip
    assert record_of(again.folder) == record_of(written)


@pytest.mark.parametrize("size", [1, 300, 1024, 10**9])
def test_batches_change_nothing_but_rounding(size: int, tmp_path: Path) -> None:
    model, plan = make_model(find("qwen3-gqa")), harsh(find("qwen3-gqa"))
    one, other = (refit_of(model, plan, tmp_path / str(count), batch_tokens=count) for count in (512, size))
    assert [one.record[name] for name in ("rows", "held_out_rows")] == [
        other.record[name] for name in ("rows", "held_out_rows")
    ]
    for ours, theirs in zip(one.record["layers"], other.record["layers"], strict=True):
        for part in ("attention", "mlp"):
            assert ours[part]["tokens"] == theirs[part]["tokens"]
            assert ours[part]["strength"] == theirs[part]["strength"]
    for name, tensor in one.tensors.items():
        largest = float(tensor.abs().max())
        assert float((tensor - other.tensors[name]).abs().max()) < 1e-4 * largest, name


def test_one_value_changed_afterwards_is_noticed(out: Path, written: Path) -> None:
    """The logits are compared with what is stored, so that they tell of other tensors alone."""
    change(out, WEIGHT, (3, 4), -1.0)
    report = verify(out, dense=written.parent / "dense")
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert set(failed) == {"refit"}
    assert failed["refit"].startswith(f"{WEIGHT} is not what was fitted")
    change(out, "model.layers.1.mlp.up_proj.weight", (3, 4), -30.0)
    report = verify(out, dense=written.parent / "dense")
    assert {check.name for check in report.checks if not check.passed} == {"refit", "tensors", "logits"}


def test_a_tensor_that_the_record_leaves_out_is_held_to_the_dense_model(out: Path, written: Path) -> None:
    record = record_of(out)
    del record["sha256"][WEIGHT]
    (out / "amprune" / "reconstruction.json").write_text(json.dumps(record))
    report = verify(out, dense=written.parent / "dense")
    assert {check.name for check in report.checks if not check.passed} == {"records", "tensors", "logits"}
    (out / "amprune" / "reconstruction.json").unlink()
    with pytest.raises(VerificationError, match=r"reconstruction\.json is missing, which says what was refitted"):
        verify(out, dense=written.parent / "dense")


@pytest.mark.parametrize("name", ["model.layers.7.mlp.down_proj.weight", "nonsense"])
def test_a_record_that_names_an_unknown_tensor_fails(name: str, out: Path, written: Path) -> None:
    record = record_of(out)
    record["sha256"][name] = "ab" * 32
    (out / "amprune" / "reconstruction.json").write_text(json.dumps(record))
    report = verify(out, dense=written.parent / "dense")
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert failed.pop("records").endswith("was changed after the output was proven")
    assert failed == {"refit": f"reconstruction.json names {name}, which the dense model does not have"}


def test_a_record_excuses_no_tensor_but_output_projections(out: Path, written: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(out, name, (3, 4), -30.0)
    record = record_of(out)
    record["sha256"][name] = digest(read_checkpoint(out)[name])
    (out / "amprune" / "reconstruction.json").write_text(json.dumps(record))
    report = verify(out, dense=written.parent / "dense")
    assert {check.name for check in report.checks if not check.passed} == {"records", "logits"}


DAMAGES: dict[str, Any] = {
    "not JSON": "{",
    "a list": "[]",
    "another format": {"format": 2},
    "no hashes": {"sha256": None},
    "a hash is a number": {"sha256": {WEIGHT: 3}},
    "no rows": {"rows": -1},
    "rows are true": {"rows": True},
    "layers are no list": {"layers": {}},
    "a layer is no object": {"layers": [None]},
    "a layer lacks its MLP": {"layers": [{"attention": {}}]},
    "no calibration": {"calibration": []},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_an_error_that_names_it(damage: str, out: Path, written: Path) -> None:
    file, content = out / "amprune" / "reconstruction.json", DAMAGES[damage]
    file.write_text(content if isinstance(content, str) else json.dumps({**record_of(out), **content}))
    with pytest.raises(AmpruneError, match=r"amprune/reconstruction\.json"):
        verify(out, dense=written.parent / "dense")


@pytest.mark.parametrize("name", ["before", "held_out_after", "strength", "tokens"])
@pytest.mark.parametrize("value", ["1", -1, True, float("nan")])
def test_a_damaged_figure_is_named(name: str, value: Any, out: Path) -> None:
    record = record_of(out)
    record["layers"][1]["attention"][name] = value
    (out / "amprune" / "reconstruction.json").write_text(json.dumps(record))
    with pytest.raises(ReconstructionError, match=f"layer 1, attention: {name} is .*damaged"):
        read_record(out)


def test_a_plain_pruned_output_has_no_record(tmp_path: Path) -> None:
    out, report = write(find("llama-gqa"), tmp_path, refit=None)
    assert not (out / "amprune" / "reconstruction.json").exists()
    assert read_record(out) is None
    assert "refit" not in {check.name for check in report.checks}


# What cannot be done


def test_rows_are_cut_from_samples_joined_by_the_end_of_a_text() -> None:
    found = packed(CalibrationSet("made", ((5, 6, 2), (7, 8), tuple(range(30, 50)))), eos=2)
    assert found.shape == (9, 3)
    assert found.flatten().tolist() == [5, 6, 2, 7, 8, 2, *range(30, 50), 2]
    assert packed(CALIBRATION, longest=100).shape == (25, 100)


@pytest.mark.parametrize("lengths", [(15,), (5, 4, 4)])
def test_few_tokens_are_enough(lengths: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        done = refit_of(make_model(find("llama-gqa")), harsh(find("llama-gqa")), tmp_path,
                        calibration=random_samples(*lengths))  # fmt: skip
    assert (done.record["rows"], done.record["row_tokens"], done.record["held_out_rows"]) == (8, 2, 1)
    assert "a projection of 144 inputs sees 14 tokens" in caplog.text
    assert "give more --samples" in caplog.text


def test_enough_tokens_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        refit_of(make_model(find("llama-gqa")), harsh(find("llama-gqa")), tmp_path)
    assert not caplog.records


def refused(folder: Path, error: type[Exception], match: str, tiny: Tiny, **options: Any) -> None:
    """Expects an error, and nothing left of the output."""
    save_model(tiny, folder / "dense")
    options = {"plan": harsh(tiny), "refit": CALIBRATION, "device": "cpu", **options}
    with pytest.raises(error, match=match):
        apply_plan(folder / "dense", options.pop("plan"), folder / "out", **options)
    assert [path.name for path in folder.iterdir()] == ["dense"]


@pytest.mark.parametrize("length", [1, 14])
def test_too_few_tokens_are_refused(length: int, tmp_path: Path) -> None:
    refused(tmp_path, ReconstructionError, rf"'random' holds {length + 1} tokens, .* at least 16, .*--samples",
            find("llama-gqa"), refit=random_samples(length))  # fmt: skip


def test_whole_blocks_cannot_be_made_up_for(tmp_path: Path) -> None:
    tiny = find("llama-gqa")
    shape = architecture_of(tiny).shape
    after = shape.shrunk(
        query_heads=shape.num_attention_heads, key_value_heads=shape.num_key_value_heads,
        neurons=shape.intermediate_size, layers=1,
    )  # fmt: skip
    ratio = 1 - after.parameters / shape.parameters
    plan = PruningPlan(ratio, ratio, shape, after, (plan_of(shape).layers[0], None), {})
    refused(tmp_path, PlanError, "the plan removes whole blocks", tiny, plan=plan)


def test_biases_are_not_compensated_twice(tmp_path: Path) -> None:
    tiny = find("llama-biases")
    plan = replace(harsh(tiny), compensated=True)
    save_model(tiny, tmp_path / "dense")
    with pytest.raises(PlanError, match="leave out bias_compensation"):
        refit_of(make_model(tiny), plan, tmp_path)


def test_too_little_memory_is_refused_with_the_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amprune.cut.refit.run.free_memory", lambda device: 1000)
    refused(tmp_path, ReconstructionError,
            r"takes about \d.* of 144 inputs in float32\), but 1 KiB are free on cpu; give fewer --samples",
            find("llama-gqa"))  # fmt: skip


def test_float32_moments_serve_where_float64_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = make_model(find("llama-gqa")), harsh(find("llama-gqa"))
    wide = refit_of(model, plan, tmp_path)
    asked: list[int] = []
    need = 3 * 144 * (144 + 48)  # numbers of the moments

    def free(device: Any) -> int:
        asked.append(1)
        return 2560 * 48 * 4 * 4 + 2560 // 8 * (144 + 48) * 4 + 87792 * 4 + need * 6

    monkeypatch.setattr("amprune.cut.refit.run.free_memory", free)
    narrow = refit_of(model, plan, tmp_path)
    assert asked
    assert (wide.record["moments_dtype"], narrow.record["moments_dtype"]) == ("float64", "float32")
    assert narrow.record["layers"][1]["drift"] == pytest.approx(wide.record["layers"][1]["drift"], rel=0.02)


@pytest.mark.parametrize(("layer", "part"), [(0, "attention"), (0, "MLP"), (1, "attention"), (1, "MLP")])
def test_activations_that_are_not_finite_name_their_layer(layer: int, part: str, tmp_path: Path) -> None:
    model: Any = make_model(find("llama-gqa"))
    block = model.base_model.layers[layer]
    with torch.no_grad():
        (block.self_attn.v_proj if part == "attention" else block.mlp.up_proj).weight[:] = 3e38
    with pytest.raises(ReconstructionError, match=rf"layer {layer}: the \w+ gives activations that are not finite"):
        refit_of(model, harsh(find("llama-gqa")), tmp_path)
