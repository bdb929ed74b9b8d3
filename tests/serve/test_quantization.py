"""Quantised checkpoints: what is stored, that stock transformers loads it, how it is measured, what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_evaluation import QUICK, text_file
from tiny_models import Tiny, save_model
from tiny_recovery import save_chats, train
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from amprune import (
    AmpruneError,
    CheckpointError,
    MissingDependencyError,
    QuantizationError,
    QuantizedModel,
    UnsupportedModelError,
    apply_plan,
    evaluate,
    prune,
    quantize,
    recover,
    score,
    verify,
    write_report,
)
from amprune.cli.options import app
from amprune.evaluation.size import measure_size
from amprune.model.quantization import read_quantization
from amprune.model.writer import RECORDS
from amprune.prove.card import CARD
from amprune.serve.hub.checks import check_folder
from amprune.serve.quantize import check

TYPES = ("int8", "int4")
# Rows of 64 and outputs in multiples of 32, as the libraries want them.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA = Tiny("llama", "quantised", {**SIZES, **GROUPED, "max_position_embeddings": 1024})
FAMILIES = {
    "grouped": LLAMA,
    "tied": Tiny("llama", "tied", {**SIZES, **GROUPED, "tie_word_embeddings": True}),
    "fused": Tiny("phi3", "fused", {**SIZES, **GROUPED, **ROPE}),
    "biases": Tiny("qwen2", "biases", {**SIZES, **GROUPED}),
    "renamed head": Tiny("gpt_neox", "renamed", SIZES),
}
UP = "model.layers.0.mlp.up_proj.weight"
# Of Gaussian weights: half a step of 255 in four standard deviations; the steps between 16 quantiles.
ERRORS = {"int8": 0.008, "int4": 0.1}


def save(folder: Path, tiny: Tiny = LLAMA, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Saves a model with a tokenizer, a chat template and a card."""
    save_model(tiny, folder, dtype=dtype)
    make_tokenizer().save_pretrained(folder)
    (folder / CARD).write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\n# Mine\n", encoding="utf-8")
    return folder


def load(folder: Path) -> Any:
    """Loads a folder as a user would."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def plain(weight: Any) -> torch.Tensor:
    """Returns what a loaded weight stands for, as its own library has it."""
    if hasattr(weight, "dequantize") and type(weight).__name__ == "Int8Tensor":
        return weight.dequantize().float()
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float()


def disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizedModel]:
    place = tmp_path_factory.mktemp("made")
    return {type: quantize(dense, place / type, type=type) for type in TYPES}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_quantised_and_everything_else_is_as_it_was(family: str, type: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "model", FAMILIES[family], dtype=torch.float32 if family == "biases" else torch.bfloat16)
    found = quantize(source, tmp_path / "out", type=type).record
    model, original = load(tmp_path / "out"), load(source)
    before = dict(original.named_parameters())
    quantised = 0
    for name, parameter in model.named_parameters():
        wanted = before[name].float()
        if name.endswith("weight") and wanted.dim() == 2 and ".layers." in name:
            quantised += wanted.numel()
            error = (plain(parameter) - wanted).norm() / wanted.norm()
            assert 0 < error < ERRORS[type], name
        else:
            assert torch.equal(parameter, before[name]), name
    assert found.quantized == quantised
    assert found.parameters == sum(parameter.numel() for parameter in original.parameters())
    assert max(found.errors.values()) < ERRORS[type]
    assert found.bytes_before == disk(source)
    assert found.bytes_after == disk(tmp_path / "out") < disk(source) + 4000  # torchao's header
    assert measure_size(model).weight_bytes < 0.8 * measure_size(original).weight_bytes


def test_the_record_says_how_far_the_logits_moved(dense: Path, made: dict[str, QuantizedModel]) -> None:
    ids = torch.arange(3, 120)[None]
    with torch.inference_mode():
        wanted = load(dense)(ids).logits.float()
        moved = {
            name: (load(out.folder)(ids).logits.float() - wanted).square().mean().sqrt() for name, out in made.items()
        }
    for name, out in made.items():
        found = float(moved[name] / wanted.std())
        assert out.record.logit_difference == pytest.approx(found, rel=0.3, abs=0.01)
        assert out.record.loaded_difference < 0.02 < out.record.tolerance
    assert made["int4"].record.logit_difference > 5 * made["int8"].record.logit_difference


@pytest.mark.parametrize("type", TYPES)
def test_the_files_are_those_that_transformers_writes(
    type: str, dense: Path, made: dict[str, QuantizedModel], tmp_path: Path
) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    skipped = ["lm_head"]
    config: Any = (
        TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
        if type == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skipped,
        )
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map={"": "cpu"})
    stock.save_pretrained(tmp_path / "stock")
    theirs, ours = (load_file(place / "model.safetensors") for place in (tmp_path / "stock", made[type].folder))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    headers, settings = [], []
    for place in (tmp_path / "stock", made[type].folder):
        with safe_open(place / "model.safetensors", framework="pt") as file:
            headers.append({name: text for name, text in file.metadata().items() if name != "tensor_names"})
        settings.append(json.loads((place / "config.json").read_text(encoding="utf-8")))
    assert headers[0] == headers[1]
    assert settings[0]["quantization_config"] == settings[1]["quantization_config"]


@pytest.mark.process
def test_a_fresh_process_with_nothing_but_transformers_loads_and_generates(made: dict[str, QuantizedModel]) -> None:
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    out = model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)\n"
        "    print(out.shape[1], type(model.model.layers[0].mlp.up_proj.weight).__name__, 'amprune' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *(str(out.folder) for out in made.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10", "Int8Tensor", "False", "10", "Params4bit", "False"]


@pytest.mark.parametrize("type", TYPES)
def test_shards_of_any_size_load(type: Any, dense: Path, made: dict[str, QuantizedModel], tmp_path: Path) -> None:
    out = quantize(dense, tmp_path / "out", type=type, max_shard_size="20KB").folder
    assert len(list(out.glob("*.safetensors"))) > 3
    assert torch.equal(plain(load(out).get_parameter(UP)), plain(load(made[type].folder).get_parameter(UP)))


def test_tokenizer_chat_template_generation_config_and_licence_survive(
    dense: Path, made: dict[str, QuantizedModel]
) -> None:
    for out in made.values():
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
            assert (out.folder / name).read_bytes() == (dense / name).read_bytes()
        card = (out.folder / CARD).read_text(encoding="utf-8")
        assert "license: apache-2.0" in card
        assert f"- quantized\n- {out.record.type}\n- {out.record.library}\n" in card
        assert f"# model, quantised to {out.record.type}" in card
        assert "Quantised: quality is below that of the dense model" in card
        check_folder(out.folder)


# Group sizes.


@pytest.mark.parametrize(("neurons", "asked", "settled"), [(128, None, 64), (96, None, 32), (128, 32, 32)])
def test_the_group_size_is_the_largest_common_default_or_as_asked(
    neurons: int, asked: int | None, settled: int, tmp_path: Path
) -> None:
    source = save(tmp_path / "model", Tiny("llama", "width", {**SIZES, **GROUPED, "intermediate_size": neurons}))
    assert quantize(source, tmp_path / "out", type="int4", group_size=asked).record.group_size == settled
    scales = load_file(tmp_path / "out" / "model.safetensors")[f"{UP}.absmax"]
    assert scales.numel() == neurons * 64 // settled
    assert torch.isfinite(load(tmp_path / "out")(torch.arange(3, 9)[None]).logits).all()


DOWN = "model.layers.0.mlp.down_proj.weight"
WIDTHS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "does not divide": (
        {}, {"group_size": 128},
        r"a group size of 128 does not divide the rows of model\.layers\.0\.self_attn\.q_proj\.weight, which are 64 "
        r"weights long; those that divide all rows: 32, 64",
    ),
    "none divides": (
        {"intermediate_size": 98}, {},
        rf"does not divide the rows of {DOWN}, which are 98 weights long; none of bitsandbytes's does\. Prune with "
        r"--neuron-multiple 64, or choose int8",
    ),
    "few outputs": (
        {"num_key_value_heads": 1, "head_dim": 16}, {},
        r"k_proj\.weight has 16 outputs, and bitsandbytes computes 32 at a time",
    ),
    "no such size": ({}, {"group_size": 48}, r"group size is 48, but bitsandbytes has groups of 32, 64, .*4096 alone"),
    "of int8": ({}, {"group_size": 64, "type": "int8"}, r"group size of 64 was asked for, but int8 has one scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDTHS)
def test_widths_that_do_not_fit_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    entries, options, message = WIDTHS[case]
    source = save(tmp_path / "model", Tiny("llama", "width", {**SIZES, **GROUPED, **entries}))
    with pytest.raises(QuantizationError, match=message):
        quantize(source, tmp_path / "out", **{"type": "int4", **options})
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_int8_takes_any_width(tmp_path: Path) -> None:
    entries = {**SIZES, **GROUPED, "intermediate_size": 99, "num_key_value_heads": 1, "head_dim": 10}
    quantize(save(tmp_path / "model", Tiny("llama", "odd", entries)), tmp_path / "out")
    assert torch.isfinite(load(tmp_path / "out")(torch.arange(3, 9)[None]).logits).all()


# What is refused.


def test_an_unknown_type_is_named_with_those_that_there_are(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="no type 'int5' to quantise to; choose int8 or int4"):
        quantize(dense, tmp_path / "out", type="int5")  # type: ignore[arg-type]


@pytest.mark.parametrize(("type", "library"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_a_library_that_is_missing_is_named_with_its_command(
    type: Any,
    library: str,
    dense: Path,
    made: dict[str, QuantizedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"needs {library}, which is not installed here: `pip install 'amprune\[quantize\]'`"
    with pytest.raises(MissingDependencyError, match=rf"type {type} {message}"):
        quantize(dense, tmp_path / "out", type=type)
    with pytest.raises(MissingDependencyError, match=rf"{type}, which is quantised, {message}"):
        evaluate([made[type].folder], tmp_path / "evaluation.json", measure=[])


def test_outputs_that_are_in_the_way_stay(dense: Path, made: dict[str, QuantizedModel], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        quantize(dense, made["int8"].folder)
    with pytest.raises(CheckpointError, match="overlap"):
        quantize(dense, dense / "out")
    shutil.copytree(made["int8"].folder, tmp_path / "out")
    assert quantize(dense, tmp_path / "out", type="int4", overwrite=True).record.type == "int4"


def test_a_full_disk_is_told_and_nothing_is_left(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("amprune.model.writer.shutil.disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match=r"needs \d\.\d+ GB, but only 0\.00 GB are free"):
        quantize(dense, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds a PEFT adapter alone; merge it into its base model first"):
        quantize(tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    "tiny",
    [
        Tiny("gpt2", "conv", {"n_head": 4, "n_embd": 64, "n_layer": 2, "n_positions": 128}),
        Tiny("falcon", "own", {"hidden_size": 64, "num_attention_heads": 4}),
    ],
    ids=lambda tiny: tiny.model_type,
)
def test_layers_that_the_libraries_do_not_quantise_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    message = f"projections of a {tiny.model_type} from layers of another kind .* `amprune export"
    with pytest.raises(QuantizationError, match=message):
        quantize(save(tmp_path / "model", tiny), tmp_path / "out")


def test_weights_of_a_dtype_that_no_library_quantises_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"weights are float64.*save the model in float32"):
        quantize(save(tmp_path / "model", dtype=torch.float64), tmp_path / "out")


STAGES: dict[str, Callable[[Path, Path], Any]] = {
    "quantize": lambda model, out: quantize(model, out),
    "prune": lambda model, out: prune(model, out, ratio=0.1),
    "score": lambda model, out: score(model, calibration=["a text"]),
    "apply": lambda model, out: apply_plan(model, plan_file(out.parent), out),
    "recover": lambda model, out: recover(model, out, data=["a text"]),
    "verify": lambda model, out: verify(model, dense=model),
}


def plan_file(folder: Path) -> Path:
    from amprune.plan.make import make_plan

    scores = score(save(folder / "to-plan"), criterion="random", calibration=[])
    make_plan(scores, ratio=0.1).save(folder / "plan.json")
    return folder / "plan.json"


@pytest.mark.parametrize("stage", STAGES)
def test_a_quantised_checkpoint_is_refused_and_its_source_named(
    stage: str, made: dict[str, QuantizedModel], tmp_path: Path
) -> None:
    model = shutil.copytree(made["int4"].folder, tmp_path / "int4")
    if stage == "verify":
        shutil.copyfile(plan_file(tmp_path), model / RECORDS / "plan.json")
    message = (
        r"int4: the checkpoint is quantised to nf4 \(bitsandbytes\), and its full-precision weights are needed here\. "
        r"Give model, which it was made from, in its place: prune and recover first, quantise last"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        STAGES[stage](model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What the proof notices.

DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "scale": ("int8", lambda stored: stored[f"{UP[:-7]}._weight_scale"].mul_(1.2), f"changed {UP} by 20"),
    "codes": ("int4", lambda stored: stored[UP].bitwise_not_(), f"changed {UP} by "),
    "head": (
        "int4",
        lambda stored: stored["lm_head.weight"][0, 0].add_(1),
        r"lm_head\.weight is not that of the source",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_the_sources_are_noticed(
    damage: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amprune.serve.quantize import run

    type, change, message = DAMAGES[damage]
    written = run.write_shards

    def damaged(folder: Path, *arguments: Any, metadata: dict[str, str], **options: Any) -> Any:
        found = written(folder, *arguments, metadata=metadata, **options)
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt", **metadata})
        return found

    monkeypatch.setattr(run, "write_shards", damaged)
    with pytest.raises(QuantizationError, match=message):
        quantize(dense, tmp_path / "out", type=type)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("type", TYPES)
def test_logits_of_another_model_are_noticed(
    type: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amprune.model.loading import loaded_model

    other = save(tmp_path / "other", FAMILIES["tied"])
    monkeypatch.setattr(check, "loaded_model", lambda folder, device: loaded_model(other, device=device))
    with pytest.raises(QuantizationError, match=r"logits that transformers computes .* differ .* by 1\.\de\+00"):
        quantize(dense, tmp_path / "out", type=type)


def test_weights_that_are_not_finite_are_not_quantised(tmp_path: Path) -> None:
    source = save(tmp_path / "model")
    stored = load_file(source / "model.safetensors")
    stored[UP][0, 0] = torch.nan
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=rf"changed {UP} by nan.*are its weights finite"):
        quantize(source, tmp_path / "out")


# After pruning and training.


@pytest.fixture(scope="module")
def recovered(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that lost a key-value head with its readers, and neurons, and was trained."""
    place = tmp_path_factory.mktemp("recovered")
    prune(
        dense, place / "pruned", ratio=0.2, preset="paper", calibration=["a text"] * 4, samples=4, heads_mode="groups",
        heads_ratio=0.5, neuron_multiple=32,
    )  # fmt: skip
    train(place / "pruned", save_chats(place), place / "smaller", max_steps=2)
    return place / "smaller"


def test_the_records_of_pruning_and_training_go_along(recovered: Path, tmp_path: Path) -> None:
    out = quantize(recovered, tmp_path / "out", type="int4").folder
    records = {path.name for path in (out / RECORDS).iterdir()}
    assert records == {"plan.json", "scores.safetensors", "recovery.json", "training.jsonl", "quantization.json"}
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["num_key_value_heads"] == 1
    for _ in range(2):
        card = (out / CARD).read_text(encoding="utf-8")
        assert "# model, " in card
        assert " % pruned and recovered, quantised to int4\n" in card
        assert "\n- pruned\n- amprune\n- recovered\n- quantized\n- int4\n- bitsandbytes\n" in card
        assert "Trained by LoRA" in card
        assert "Quantised from smaller to int4 (nf4, a scale for every 64 weights" in card
        assert "license: apache-2.0" in card
        write_report(out)  # draws the card anew
    report = (out / RECORDS / "report.md").read_text(encoding="utf-8")
    assert "removed, then trained, then quantised to int4" in report
    assert "the records of the pruning and of the training and of the quantisation" in report
    assert "Quantised from smaller to int4" in report
    assert "amprune verify" not in report


def test_a_dense_model_that_was_quantised_has_a_report_of_its_own(
    dense: Path, made: dict[str, QuantizedModel], tmp_path: Path
) -> None:
    out = shutil.copytree(made["int8"].folder, tmp_path / "int8")
    write_report(out)
    report = (out / RECORDS / "report.md").read_text(encoding="utf-8")
    assert "# int8: model, quantised to int8" in report
    assert "Quantised from model to int8 (int8, a scale for each output" in report
    assert "Quantised from model to int8" in (out / CARD).read_text(encoding="utf-8")


# Measuring.


@pytest.fixture(scope="module")
def measured(dense: Path, made: dict[str, QuantizedModel], tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("measured")
    models = [f"dense={dense}", *(f"{name}={out.folder}" for name, out in made.items())]
    text = text_file(place / "text.txt")
    found = evaluate(models, place / "evaluation.json", measure=["perplexity", "latency"], texts=[text], **QUICK)
    write_report(place)
    return found, (place / "report.md").read_text(encoding="utf-8")


def size(evaluation: Any, model: str, metric: str) -> float:
    return next(r.value for r in evaluation.of(model, "size") if r.metric == metric)


def test_weights_are_counted_one_by_one_and_bytes_as_they_are_packed(measured: Any) -> None:
    evaluation, _ = measured
    counts = {size(evaluation, name, "parameters") for name in ("dense", *TYPES)}
    assert counts == {evaluation.models["int4"].parameters}
    blocks, rows = 2 * (64 * (128 + 64 + 64 + 128) + 3 * 64 * 128), 2 * (128 + 64 + 64 + 64 + 128 + 128 + 64)
    others = 2 * (evaluation.models["dense"].parameters - blocks)
    assert size(evaluation, "dense", "weight_bytes") == 2 * blocks + others
    assert size(evaluation, "int8", "weight_bytes") == blocks + 5 * rows + others  # scale and zero point of an output
    codebooks = 14 * 16 * 4
    assert size(evaluation, "int4", "weight_bytes") == blocks / 2 + 4 * blocks / 64 + codebooks + others
    table = 160 * 64 * 2
    for name in ("dense", *TYPES):
        read = size(evaluation, name, "weight_bytes") - table + 64 * 2
        assert size(evaluation, name, "weight_bytes_per_token") == read


def test_what_does_not_depend_on_the_type_is_the_same(measured: Any) -> None:
    evaluation, _ = measured
    for metric in ("macs_per_token", "kv_cache_bytes_per_token"):
        assert len({size(evaluation, name, metric) for name in ("dense", *TYPES)}) == 1
    assert [entry.dtype for entry in evaluation.models.values()] == ["bfloat16", "int8 (torchao)", "nf4 (bitsandbytes)"]
    assert len({entry.sha256 for entry in evaluation.models.values()}) == 3


def test_perplexity_and_memory_are_those_of_the_quantised_model(measured: Any) -> None:
    evaluation, _ = measured
    values = {name: evaluation.of(name, "perplexity")[0].value for name in ("dense", *TYPES)}
    assert len(set(values.values())) == 3
    assert values["int8"] == pytest.approx(values["dense"], rel=0.02)
    assert values["int4"] == pytest.approx(values["dense"], rel=0.2)
    for name in TYPES:
        assert evaluation.of(name, "memory")[0].value > size(evaluation, name, "weight_bytes")


def test_the_report_sets_the_ideal_speedup_beside_the_measured_one(measured: Any) -> None:
    evaluation, report = measured
    for name in TYPES:
        read = [size(evaluation, model, "weight_bytes_per_token") for model in ("dense", name)]
        row = next(line for line in report.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {read[0] / read[1]:.2f}x |" in row


def test_weights_that_are_missing_are_not_drawn_at_random(made: dict[str, QuantizedModel], tmp_path: Path) -> None:
    for name, out in made.items():
        folder = shutil.copytree(out.folder, tmp_path / name)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            metadata = file.metadata()
        stored = load_file(folder / "model.safetensors")
        del stored["model.norm.weight"]
        save_file(stored, folder / "model.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=r"1 tensors are missing .* such as model\.norm\.weight"):
            evaluate([folder], tmp_path / "evaluation.json", measure=[])


# The command and the record.


def test_the_command_prints_what_the_record_says(dense: Path, tmp_path: Path) -> None:
    command = ["quantize", str(dense), str(tmp_path / "out"), "--type", "int4", "--group-size", "32"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    record = json.loads((tmp_path / "out" / RECORDS / "quantization.json").read_text(encoding="utf-8"))
    assert summary == {"out": str(tmp_path / "out"), **record}
    assert (record["type"], record["group_size"], record["library"]) == ("int4", 32, "bitsandbytes")
    assert set(record["versions"]) == {"amprune", "torch", "transformers", "bitsandbytes"}
    assert record["error_max"] == max(record["errors"].values()) >= record["error_mean"]
    assert list(record["errors"]) == ["model.layers.0", "model.layers.1"]
    shown = CliRunner().invoke(app, [*command, "--overwrite"])
    assert "Quantised from model to int4 (nf4, a scale for every 32 weights" in shown.stdout
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "exists; choose another folder" in again.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [("format", 2), ("type", 8), ("quantized_from", None), ("bytes_after", True), ("tolerance", float("nan")),
     ("group_size", "64"), ("errors", {}), ("errors", {"model.layers.0": None})],
)  # fmt: skip
def test_a_damaged_record_is_refused(field: str, value: Any, made: dict[str, QuantizedModel], tmp_path: Path) -> None:
    (tmp_path / RECORDS).mkdir()
    content = {**made["int4"].record.to_dict(), field: value}
    (tmp_path / RECORDS / "quantization.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(QuantizationError, match=rf"quantization\.json: {field}.* is .*: quantise the model again"):
        read_quantization(tmp_path)


def test_a_record_reads_back(made: dict[str, QuantizedModel]) -> None:
    for out in made.values():
        assert read_quantization(out.folder) == out.record


def test_every_error_is_one_of_amprune() -> None:
    assert issubclass(QuantizationError, AmpruneError)
