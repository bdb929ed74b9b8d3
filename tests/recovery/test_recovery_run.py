"""Whole runs of recovery: what comes out, what is refused before training, epochs, the command line."""

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, find, make_model
from tiny_recovery import (
    TOKENIZER,
    load,
    losses,
    mean_loss,
    save_chats,
    save_tiny,
    settings,
    train,
    training_data,
    weights,
)
from typer.testing import CliRunner

from amprune import AmpruneError, CalibrationSet, CheckpointError, MissingDependencyError, RecoveryError, prune
from amprune.cli.options import app
from amprune.model.writer import RECORDS
from amprune.pipeline import measure_epochs
from amprune.recovery import models
from amprune.recovery import run as module
from amprune.recovery.run import recover
from amprune.settings import RecoverCommandSettings, RecoverySettings, Training, part

CALIBRATION = CalibrationSet("random", tuple(tuple((i * 7 + j * 13) % VOCABULARY for j in range(20)) for i in range(3)))
SAME = ["The quick brown fox jumps over the lazy dog."] * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that gets as far as loading the model."""
    monkeypatch.setattr(module, "trainable_model", lambda *_, **__: pytest.fail("the model was loaded"))


# What comes out.


def test_a_model_learns_and_comes_out_as_an_ordinary_checkpoint(model: Path, tmp_path: Path) -> None:
    result = train(model, SAME, tmp_path / "out", max_steps=20, validation_share=0.2)
    before, after = result.record["validation_before"], result.record["validation_after"]
    assert after < before - 0.5
    held = training_data(SAME, TOKENIZER, validation_share=0.2).validation
    assert mean_loss(load(model), held) == pytest.approx(before, abs=1e-4)
    assert mean_loss(load(tmp_path / "out"), held) == pytest.approx(after, abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    out = result.folder
    assert weights(out).keys() == weights(model).keys()
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not [path for path in out.rglob("*") if "adapter" in path.name or path.suffix == ".bin"]


def test_the_records_tell_what_was_done(model: Path, tmp_path: Path) -> None:
    result = train(model, save_chats(tmp_path), tmp_path / "out", validation_share=0.2, max_steps=3)
    records = result.folder / RECORDS
    assert json.loads((records / "recovery.json").read_text()) == json.loads(json.dumps(result.record))
    log = [json.loads(line) for line in (records / "training.jsonl").read_text().splitlines()]
    assert log == list(result.log)
    assert [step for step, _ in losses(log)] == [1, 2, 3]
    assert [rate for _, rate in losses(log, "learning_rate")] == pytest.approx([0.01, 0.02 / 3, 0.01 / 3])
    assert all(speed > 0 for _, speed in losses(log, "tokens_per_second"))
    record = result.record
    assert (record["steps"], record["recovered_from"], record["processes"]) == (3, "model", 1)
    assert record["settings"] == asdict(part(Training, settings(validation_share=0.2, max_steps=3)))
    assert (record["data"]["name"], record["data"]["training"], record["data"]["validation"]) == ("chats.jsonl", 5, 1)


def test_a_pruned_model_keeps_its_plan_and_scores(tmp_path: Path) -> None:
    prune(save_tiny(tmp_path / "dense"), tmp_path / "pruned", ratio=0.1, calibration=CALIBRATION)
    out = train(tmp_path / "pruned", SAME, tmp_path / "out", teacher=tmp_path / "dense", max_steps=1).folder
    for name in ("config.json", f"{RECORDS}/plan.json", f"{RECORDS}/scores.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()
    load(out)


def test_a_dense_model_is_trained_as_it_is_and_said_to_be(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amprune")
    train(model, SAME, tmp_path / "out", max_steps=1)
    assert "model was not pruned by amprune; it is trained as it is" in caplog.text


def test_full_training_changes_every_matrix(model: Path, tmp_path: Path) -> None:
    result = train(
        model, SAME, tmp_path / "out", full=True, learning_rate=1e-2, max_steps=12, validation_share=0.2, save_steps=100
    )
    assert result.record["validation_after"] < result.record["validation_before"] - 1
    before, after = weights(model), weights(result.folder)
    assert before.keys() == after.keys()
    assert not [name for name in before if before[name].dim() > 1 and torch.equal(before[name], after[name])]
    assert result.record["rounding"] == 0


def test_full_training_of_bfloat16_weights_keeps_float32_until_the_end(tmp_path: Path) -> None:
    """Steps far below the last bit of a bfloat16 weight add up."""
    save_tiny(tmp_path / "model", "llama-tied", dtype=torch.bfloat16)
    result = train(tmp_path / "model", SAME, tmp_path / "out", full=True, learning_rate=1e-5, max_steps=6)
    assert losses(result.log)[-1][1] < losses(result.log)[0][1]
    assert {tensor.dtype for tensor in weights(result.folder).values()} == {torch.bfloat16}
    assert result.record["rounding"] > 0
    found = load(result.folder)
    assert found.lm_head.weight is found.model.embed_tokens.weight


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_gradient_checkpointing_changes_no_loss(full: bool, model: Path, tmp_path: Path) -> None:
    plain = train(model, SAME, tmp_path / "plain", full=full)
    thrifty = train(model, SAME, tmp_path / "thrifty", full=full, gradient_checkpointing=True)
    for name in ("loss", "grad_norm"):
        assert dict(losses(plain.log, name)) == pytest.approx(dict(losses(thrifty.log, name)), abs=1e-6)
    assert losses(plain.log, "grad_norm")[0][1] > 0.1
    ours, theirs = weights(plain.folder), weights(thrifty.folder)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_gradient_checkpointing_computes_layers_twice(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    layer = type(load(model).model.layers[0].mlp)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **o: (calls.append(1), forward(*a, **o))[1])
    train(model, SAME, tmp_path / "plain", max_steps=1)
    once = len(calls)
    train(model, SAME, tmp_path / "thrifty", max_steps=1, gradient_checkpointing=True)
    training = 2 * 2  # layers, batches
    assert len(calls) - once == once + training


def test_float16_is_trained_in_bfloat16_and_comes_out_as_float16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "amprune")
    save_tiny(tmp_path / "model", dtype=torch.float16)
    result = train(tmp_path / "model", SAME, tmp_path / "out", max_steps=10)
    assert "training in bfloat16 in place of float16" in caplog.text
    assert {tensor.dtype for tensor in weights(result.folder).values()} == {torch.float16}
    assert losses(result.log)[-1][1] < losses(result.log)[0][1] - 0.3
    assert 0 < result.record["rounding"] < 1e-2


@pytest.mark.parametrize("family", ["gpt2-mha", "opt-mha", "phi-mha", "phi3-gqa", "gemma2-gqa", "gpt_neox-mha"])
def test_other_families_learn_and_load(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", family)
    result = train(tmp_path / "model", SAME, tmp_path / "out", max_steps=8, teacher=tmp_path / "model")
    assert losses(result.log)[-1][1] < losses(result.log)[0][1]
    assert weights(result.folder).keys() == weights(tmp_path / "model").keys()
    load(result.folder)


def test_out_is_replaced_only_when_asked_to_be(model: Path, tmp_path: Path, untrainable: None) -> None:
    save_tiny(tmp_path / "out", "llama-mha")
    with pytest.raises(CheckpointError, match="out exists; choose another folder, or give --overwrite"):
        train(model, SAME, tmp_path / "out")
    with pytest.raises(CheckpointError, match="overlap"):
        train(model, SAME, model, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_can_be_replaced(model: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "out", "llama-mha")
    train(model, SAME, tmp_path / "out", overwrite=True, max_steps=1)
    assert weights(tmp_path / "out").keys() == weights(model).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


# What is refused before training.


BAD = {
    "lora_rank": (0, "1 or more"),
    "batch_size": (0, "1 or more"),
    "gradient_accumulation": (-1, "1 or more"),
    "max_length": (1, "2 or more"),
    "save_steps": (0, "1 or more"),
    "logging_steps": (0, "1 or more"),
    "max_steps": (0, "1 or more"),
    "validation_steps": (0, "1 or more"),
    "lora_alpha": (0, "a positive number"),
    "learning_rate": (float("nan"), "a positive number"),
    "epochs": (-1.0, "a positive number"),
    "temperature": (float("inf"), "a positive number"),
    "lora_dropout": (1.0, "0 or more and below 1"),
    "validation_share": (1.0, "0 or more and below 1"),
    "teacher_weight": (1.1, "0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_make_no_sense_are_named(name: str, model: Path, tmp_path: Path, untrainable: None) -> None:
    value, expected = BAD[name]
    with pytest.raises(RecoveryError, match=f"--{name.replace('_', '-')} is {value}, expected {expected}"):
        train(model, SAME, tmp_path / "out", **{name: value})
    assert not list(tmp_path.iterdir())


def refused() -> dict[str, tuple[dict[str, Any], type[AmpruneError], str]]:
    return {
        "full in four bits": ({"full": True, "load_in_4bit": True}, RecoveryError, "leave out --full or --load"),
        "four bits on a CPU": ({"load_in_4bit": True}, RecoveryError, "--load-in-4bit needs a CUDA device"),
        "unknown device": ({"device": "tpu"}, RecoveryError, "--device is 'tpu', expected cpu or cuda"),
        "second device": ({"device": "cuda:1"}, RecoveryError, "CUDA_VISIBLE_DEVICES"),
        "shard size": ({"max_shard_size": "big"}, CheckpointError, "max_shard_size is 'big'"),
        "fewer samples than a batch": ({"batch_size": 9}, RecoveryError,
                                       "texts leaves 8 samples to train on, fewer than a batch of 9; give more"),
        "more samples than there are": ({"samples": 9}, RecoveryError, "--samples 9"),
        "no such teacher": ({"teacher": "nowhere"}, CheckpointError, "no model 'nowhere'"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused())
def test_what_cannot_be_trained_leaves_nothing(case: str, model: Path, tmp_path: Path, untrainable: None) -> None:
    changes, error, message = refused()[case]
    with pytest.raises(error, match=message):
        train(model, SAME, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_a_teacher_with_as_many_but_other_tokens_is_refused(model: Path, tmp_path: Path, untrainable: None) -> None:
    teacher = shutil.copytree(model, tmp_path / "teacher")
    content = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecoveryError, match=r"the teacher teacher has other tokens than the student: 2 of \d+ have"):
        train(model, SAME, tmp_path / "out", teacher=teacher)
    assert not (tmp_path / "out.training").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(model: Path, tmp_path: Path, untrainable: None) -> None:
    with pytest.raises(RecoveryError, match="--device is cuda, but there is no CUDA device here"):
        train(model, SAME, tmp_path / "out", device="cuda")


def test_a_dtype_that_is_none_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype is 'int3', expected one of auto, float32"):
        train(model, SAME, tmp_path / "out", dtype="int3")
    assert not list(tmp_path.iterdir())


def test_four_bits_need_bitsandbytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"--load-in-4bit needs bitsandbytes, .* `pip install 'amprune\[quantize\]'`"
    with pytest.raises(MissingDependencyError, match=message):
        recover(model, tmp_path / "out", data=SAME, settings=RecoverySettings(load_in_4bit=True))
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, untrainable: None) -> None:
    make_model(find("llama-gqa")).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        train(tmp_path / "model", SAME, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# Epochs.


@pytest.mark.parametrize(("epochs", "kept"), [(2.0, [1, 2]), (2.5, [1, 2, 3]), (0.5, [1])])
def test_every_epoch_is_kept_and_the_last_is_out(epochs: float, kept: list[int], model: Path, tmp_path: Path) -> None:
    result = train(model, SAME[:4], tmp_path / "out", epochs=epochs, max_steps=None, keep_epochs=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(f"out.epoch-{number}" for number in kept)}
    folders = [tmp_path / f"out.epoch-{number}" for number in kept]
    values = [weights(folder) for folder in folders]
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(values[-1][name], weights(result.folder)[name])
    assert len({float(tensors[name].sum()) for tensors in values}) == len(kept)
    assert all(load(folder) for folder in folders)
    assert result.epochs == tuple(folders)
    records = [json.loads((folder / RECORDS / "recovery.json").read_text()) for folder in folders]
    assert [record["steps"] for record in records] == [*range(2, 2 * len(kept), 2), result.record["steps"]]
    for record, folder in zip(records, folders, strict=True):
        log = (folder / RECORDS / "training.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, record["steps"] + 1))


def test_an_epoch_of_another_run_is_kept(model: Path, tmp_path: Path, untrainable: None) -> None:
    save_tiny(tmp_path / "out.epoch-2")
    with pytest.raises(CheckpointError, match=r"out\.epoch-2 exists; choose another folder, or give --overwrite"):
        train(model, SAME, tmp_path / "out", epochs=1.5, keep_epochs=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.epoch-2"]


def test_epochs_are_measured_into_out_and_removed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(model, SAME[:4], tmp_path / "out", epochs=3.0, max_steps=None, keep_epochs=True)
    (tmp_path / "out.epoch-4").mkdir()  # of another run
    calls: list[Any] = []
    monkeypatch.setattr(
        "amprune.evaluation.run.evaluate", lambda *arguments, **options: calls.append((arguments, options)) or "found"
    )
    asked = RecoverCommandSettings(data_dir=tmp_path, limit=3, windows=2, device="cpu")
    assert measure_epochs(model, result, asked) == "found"
    (((named, place), options),) = calls
    assert named == [
        f"pruned={model}",
        f"epoch-1={tmp_path / 'out.epoch-1'}",
        f"epoch-2={tmp_path / 'out.epoch-2'}",
        f"out={tmp_path / 'out'}",
    ]
    assert place == tmp_path / "out" / RECORDS / "evaluation.json"
    assert (options["data_dir"], options["limit"], options["windows"], options["device"]) == (tmp_path, 3, 2, "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.epoch-4"}


# The command line.

QUICK = [
    "--preset",
    "paper",
    "--max-steps",
    2,
    "--gradient-accumulation",
    2,
    "--device",
    "cpu",
    "--save-steps",
    1,
    "--validation-share",
    0.2,
]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line_shows_what_happened(model: Path, tmp_path: Path) -> None:
    chats = save_chats(tmp_path)
    code, output, errors = run("recover", model, tmp_path / "out", "--data", chats, *QUICK)
    assert code == 0, errors
    assert "Validation loss" in output
    assert str(tmp_path / "out") in output
    code, output, errors = run("recover", model, tmp_path / "out", "--data", chats, *QUICK, "--overwrite", "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert found["out"] == str(tmp_path / "out")
    assert (found["steps"], found["data"]["name"]) == (2, "chats.jsonl")
    assert found["validation_after"] < found["validation_before"]


def test_the_command_line_passes_every_option_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("amprune.recover", lambda *arguments, **options: calls.append((arguments, options)))
    wanted = {
        "lora_rank": 3, "lora_alpha": 5.0, "lora_dropout": 0.25, "learning_rate": 0.5, "epochs": 3.5, "max_steps": 7,
        "batch_size": 9, "gradient_accumulation": 11, "max_length": 13, "validation_share": 0.125, "save_steps": 17,
        "logging_steps": 19, "temperature": 2.5, "teacher_weight": 0.75, "seed": 23,
    }  # fmt: skip
    options = [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags = ["--full", "--load-in-4bit", "--packing", "--gradient-checkpointing", "--resume", "--overwrite"]
    flags += ["--teacher", "t", "--samples", 29]
    code, _, errors = run("recover", model, tmp_path / "out", *options, *flags)
    assert code == 0, errors
    (((_, _, found), more),) = calls
    switched = {"full": True, "load_in_4bit": True, "packing": True, "gradient_checkpointing": True}
    others = {"teacher": "t", "samples": 29, "resume": True, "overwrite": True}
    assert found == RecoverySettings(**wanted, **switched, **others)
    assert more["keep_epochs"] is False


def test_an_interrupted_command_says_how_to_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats, arguments = (
        save_chats(tmp_path),
        ["recover", model, tmp_path / "out", "--data", tmp_path / "chats.jsonl", *QUICK],
    )

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_recovered", interrupted)
        code, output, errors = run(*arguments)
    assert (code, output) == (130, "")
    said = f"what was finished is in {tmp_path / 'out'}.training, the same command with --resume goes on from there"
    assert "".join(said.split()) in "".join(errors.split())  # lines break within long paths
    assert not (tmp_path / "out").exists()
    code, _, errors = run(*arguments)
    assert code == 1
    assert "lastcheckpointcheckpoint-2;goonwith--resume,orremoveit" in "".join(errors.split())
    assert run(*arguments, "--resume")[0] == 0
    assert chats.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "chats.jsonl"}


def test_a_command_interrupted_before_the_first_checkpoint_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "trainable_model", interrupted)
    code, _, errors = run("recover", model, tmp_path / "out", "--data", save_chats(tmp_path), *QUICK)
    assert code == 130
    assert "interrupted; nothing was left behind" in errors
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl"}


def test_errors_of_the_command_line_are_one_paragraph(model: Path, tmp_path: Path) -> None:
    code, output, errors = run("recover", model, tmp_path / "out", "--data", "builtin", "--lora-rank", 0)
    assert (code, output) == (1, "")
    assert "--lora-rank is 0, expected 1 or more" in errors
    assert "Traceback" not in errors


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(model: Path, tmp_path: Path, untrainable: None) -> None:
    wide = shutil.copytree(model, tmp_path / "wide")
    content = json.loads((wide / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 500, "content": "noise"})
    (wide / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecoveryError, match=r"texts holds token id \d+, but wide embeds the ids 0 to 159"):
        train(wide, ["a noise " * 4] * 8, tmp_path / "out")
    assert not (tmp_path / "out.training").exists()
