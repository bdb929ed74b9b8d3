"""The preset `best`: a teacher from the records, every token, what fits, the best validated step, several trainings."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import find, make_model
from tiny_recovery import TOKENIZER, load, losses, save_chats, save_tiny, weights
from torch.nn.functional import kl_div, log_softmax

from amprune import AmpruneError, RecoveryError, prune, recover
from amprune.model.loading import vocabulary_size
from amprune.model.reader import read_checkpoint
from amprune.model.recovered import read_recovery
from amprune.model.shape import ModelShape
from amprune.recovery import fitting
from amprune.recovery import training as module
from amprune.recovery.fitting import Need, adapter_parameters, batched, fitted, need
from amprune.recovery.models import with_adapters
from amprune.recovery.run import RecoveredModel
from amprune.settings import RecoverySettings, with_preset
from amprune.text.training import load_training_data

QUICK = {"batch_tokens": 512, "epochs": 4.0, "learning_rate": 3e-3, "logging_steps": 1, "patience": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model that has learnt something, a pruned one, and chats."""
    folder = tmp_path_factory.mktemp("best")
    save_tiny(folder / "dense")
    chats = save_chats(folder, repeat=10)
    trained = recover(folder / "dense", folder / "wise", data=str(chats), preset="paper", full=True, learning_rate=1e-2,
                      epochs=10.0, batch_size=8, gradient_accumulation=1, device="cpu")  # fmt: skip
    assert trained is not None
    prune(folder / "wise", folder / "pruned", ratio=0.4, calibration=str(chats), tokens=300, preset="paper")
    return folder


def best(folder: Path, out: Path, **changes: Any) -> RecoveredModel:
    result = recover(
        folder / "pruned",
        out,
        **{"data": str(folder / "chats.jsonl"), "device": "cpu", "dtype": "float32", **QUICK, **changes},
    )
    assert result is not None
    return result


@torch.no_grad()
def apart(student: Path, teacher: Path, rows: Any) -> float:
    """The mean divergence over every token that predicts another, a row at a time."""
    found, wise, total, count = load(student), load(teacher), 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        ours, theirs = (log_softmax(model(ids).logits[0, :-1].double(), dim=-1) for model in (found, wise))
        total += float(kl_div(ours, theirs, reduction="sum", log_target=True)) / (len(row["input_ids"]) - 1)
        count += 1
    return total / count


def test_with_no_options_but_the_text_the_dense_model_of_the_records_teaches_every_token(
    folder: Path, tmp_path: Path
) -> None:
    result = best(folder, tmp_path / "out")
    record, settings = result.record, result.record["settings"]
    assert (record["dense"], record["validation"]) == (str((folder / "wise").resolve()), "divergence")
    assert (settings["full"], settings["packing"], settings["responses_only"]) == (True, True, False)
    wanted = with_preset(RecoverySettings(data=str(folder / "chats.jsonl")))
    rows = load_training_data(wanted, TOKENIZER, max_length=128).validation
    found = losses(result.log, "validation_loss")
    assert found[0] == (0, pytest.approx(apart(folder / "pruned", folder / "wise", rows), abs=1e-4))
    step, value = min(found[1:], key=lambda one: one[1])
    assert (record["steps"], record["validation_after"]) == (step, value)
    assert value < 0.8 * found[0][1]
    assert apart(result.folder, folder / "wise", rows) == pytest.approx(value, abs=1e-3)


def test_the_best_validated_step_is_kept_and_a_run_without_a_better_one_ends(folder: Path, tmp_path: Path) -> None:
    result = best(folder, tmp_path / "out", learning_rate=0.3, patience=2, epochs=20.0, validation_steps=1)
    found = losses(result.log, "validation_loss")
    (chosen, value) = min(found[1:], key=lambda one: one[1])
    assert found[-1][0] == chosen + 2  # validated at every step, and not better for two of them
    assert (result.record["steps"], result.record["validation_after"]) == (chosen, value)
    kept = best(folder, tmp_path / "kept", learning_rate=0.3, patience=0, epochs=20.0, validation_steps=1)
    assert losses(kept.log, "validation_loss")[-1][1] == kept.record["validation_after"] != value


def test_a_run_that_ended_early_is_finished_and_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"learning_rate": 0.3, "patience": 2, "epochs": 20.0, "validation_steps": 1}
    whole = best(folder, tmp_path / "whole", **changes)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("amprune.recovery.run.write_recovered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            best(folder, tmp_path / "out", **changes)
    with monkeypatch.context() as patch:
        patch.setattr("amprune.recovery.run.train", interrupted)
        result = best(folder, tmp_path / "out", **changes, resume=True)
    assert result.record["steps"] == whole.record["steps"]
    ours, theirs = weights(result.folder), weights(whole.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_was_settled_holds_when_a_run_goes_on_under_less_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = best(folder, tmp_path / "whole")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("amprune.recovery.run.write_recovered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            best(folder, tmp_path / "out")
    monkeypatch.setattr(fitting, "_free", lambda device: 0)
    result = best(folder, tmp_path / "out", resume=True)
    assert result.record["settings"] == whole.record["settings"]


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = best(folder, tmp_path / "plain", batch_size=4, batch_tokens=None, gradient_accumulation=1, epochs=2.0)
    real = module.summed_loss

    def full(logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if logits.requires_grad and len(logits) > 2 * 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(logits, *arguments)

    monkeypatch.setattr(module, "summed_loss", full)
    with caplog.at_level(logging.INFO):
        halved = best(folder, tmp_path / "halved", batch_size=4, batch_tokens=None, gradient_accumulation=1, epochs=2.0)
    assert caplog.text.count("a batch of 4 rows does not fit the memory; going on with 2 at a time") == 1
    assert dict(losses(halved.log)) == pytest.approx(dict(losses(plain.log)), abs=1e-3)
    monkeypatch.setattr(
        module, "summed_loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(RecoveryError, match=r"one row does not fit the memory .*--gradient-checkpointing, a smaller"):
        best(folder, tmp_path / "none", validation_share=0.0)


@pytest.mark.parametrize("damage", ["none", "moved", "other"])
def test_without_a_teacher_nothing_is_trained(damage: str, folder: Path, tmp_path: Path) -> None:
    prune(folder / "dense", tmp_path / "pruned", ratio=0.25, calibration=str(folder / "chats.jsonl"), samples=8,
          preset="paper")  # fmt: skip
    record = tmp_path / "pruned/amprune/verification.json"
    content = json.loads(record.read_text())
    content["dense"] = {"moved": str(tmp_path / "gone"), "other": str(folder / "wise")}.get(damage)
    record.write_text(json.dumps(content))
    expected = {
        "none": "the records of pruned do not say which model it was made from; give the dense model by --teacher",
        "moved": "pruned was made from .*gone, which cannot be opened here: no model .*; give the dense model by",
        "other": "wise is no longer the model that pruned was made from; give the dense model by --teacher",
    }[damage]
    with pytest.raises(Exception, match=expected):
        recover(tmp_path / "pruned", tmp_path / "out", data=str(folder / "chats.jsonl"), device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"pruned"}
    result = recover(
        tmp_path / "pruned", tmp_path / "out", data=str(folder / "chats.jsonl"), teacher_weight=0.0, max_steps=1,
        device="cpu",
    )  # fmt: skip
    assert result is not None
    assert (result.record["teacher"], result.record["validation"]) == (None, "loss")


def test_trainings_in_a_row_are_all_told_and_names_between_are_not(folder: Path, tmp_path: Path) -> None:
    first = best(folder, tmp_path / "between", epochs=1.0)
    second = recover(first.folder, tmp_path / "out", data=str(folder / "chats.jsonl"), full=False, lora_rank=2,
                     epochs=1.0, device="cpu")  # fmt: skip
    third = recover(tmp_path / "out", tmp_path / "last", data=str(folder / "chats.jsonl"), max_steps=1, device="cpu")
    assert second is not None
    assert third is not None
    assert [one["settings"]["full"] for one in third.record["earlier"]] == [True, False]
    assert third.record["earlier"][0]["validation_after"] == first.record["validation_after"]
    assert third.record["dense"] == first.record["dense"] == str((folder / "wise").resolve())
    assert "earlier" not in third.record["earlier"][1]
    assert read_recovery(tmp_path / "last").earlier == third.record["earlier"]
    card = (tmp_path / "last/README.md").read_text()
    assert card.count("Before that: ") == 2
    assert "LoRA (rank 2" in card
    assert "between" not in card
    assert "pruned." not in card.replace("was pruned.", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "--report-to is 'tensorbord'; did you mean tensorboard. expected tensorboard, wandb, trackio"),
        ("wandb", "--report-to wandb needs wandb, which is not installed: `pip install wandb`"),
    ],
)
def test_what_cannot_be_reported_to_is_refused_first(
    name: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amprune.recovery.models.find_spec", lambda name: None)
    with pytest.raises(AmpruneError, match=message):
        best(folder, tmp_path / "out", report_to=(name,))
    assert not list(tmp_path.iterdir())


# What fits.


def shape_of_7b() -> ModelShape:
    """LLaMA-2 7B's."""
    return ModelShape(
        model_type="llama", num_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32,
        head_dim=128, intermediate_size=11008, parameters=6_738_415_616, query_head_parameters=2 * 4096 * 128,
        key_value_head_parameters=2 * 4096 * 128, neuron_parameters=3 * 4096, query_head_counts=tuple(range(1, 33)),
    )  # fmt: skip


def asked(**changes: Any) -> RecoverySettings:
    return with_preset(RecoverySettings(device="cpu", **changes))


def test_a_7b_student_and_its_teacher_fit_80_gb_by_adapters_and_not_in_full() -> None:
    shape, teacher = shape_of_7b(), 2 * 6_738_415_616
    adapters, whole = (
        need(shape, 32_000, asked(), full=full, rows=4, checkpointing=False, dtype=torch.bfloat16, teacher=teacher)
        for full in (False, True)
    )
    assert adapter_parameters(shape, 64) == 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))  # 159.9 M, as PEFT counts
    assert adapters.weights == 2 * 6_738_415_616 + 4 * 159_907_840
    assert adapters.total < 80e9 < whole.total
    assert whole.weights + whole.gradients + whole.optimizer == 16 * 6_738_415_616
    assert "teacher 12.6 GiB" in str(adapters)


@pytest.mark.parametrize("tiny", ["llama-gqa", "llama-mha", "phi-mha", "opt-mha"])
def test_adapters_are_counted_as_peft_makes_them(tiny: str, tmp_path: Path) -> None:
    model = make_model(find(tiny))
    model.save_pretrained(tmp_path)
    shape = read_checkpoint(tmp_path).shape
    adapted = with_adapters(model, asked(lora_rank=3))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert adapter_parameters(shape, 3) == trained


def test_the_activations_that_are_counted_are_those_that_autograd_keeps(tmp_path: Path) -> None:
    model = load(save_tiny(tmp_path / "model"))
    shape, kept = read_checkpoint(tmp_path / "model").shape, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights_of = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    ids = torch.randint(vocabulary_size(model), (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    measured = sum(size for place, size in kept.items() if place not in weights_of) / (2 * 64 * 4)
    counted = shape.num_layers * fitting.activations(shape, adapters=False)
    assert hidden.requires_grad
    assert 0.7 * measured < counted < 1.5 * measured


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (2**40, (True, 4, False)),
        (1_400_000_000, (True, 4, False)),
        (0, (False, 1, True)),
    ],
)
def test_what_fits_is_trained_and_said(
    free: int, expected: tuple[bool, int, bool], folder: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(fitting, "_free", lambda device: free)
    base, dense = read_checkpoint(folder / "pruned"), read_checkpoint(folder / "wise")
    with caplog.at_level(logging.INFO):
        found = fitted(asked(), base, dense)
    assert (found.full, found.batch_size, found.gradient_checkpointing) == expected
    assert "teacher" in caplog.text
    assert ("this may be more than the device has" in caplog.text) == (free == 0)
    given = fitted(asked(full=True, batch_size=3, gradient_checkpointing=False, learning_rate=0.5), base, dense)
    given = batched(given, hidden_size=48, tokens=10_000)
    assert (given.full, given.batch_size, given.gradient_checkpointing, given.learning_rate) == (True, 3, False, 0.5)


def test_each_choice_is_the_first_that_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, dense = read_checkpoint(folder / "pruned"), read_checkpoint(folder / "wise")
    monkeypatch.setattr(fitting, "CHUNK_BYTES", 0)
    found = set()
    for free in range(0, 40_000_000, 100_000):
        monkeypatch.setattr(fitting, "_free", lambda device, free=free: free)
        chosen = fitted(asked(max_length=128), base, dense)
        found.add((chosen.full, chosen.batch_size, chosen.gradient_checkpointing))
    assert {(True, 4, False), (True, 2, False), (True, 1, False), (False, 1, True)} <= found


def test_a_need_is_the_sum_of_its_items() -> None:
    assert Need(1, 2, 3, 4, 5, 6).total == 21


@pytest.mark.parametrize(
    ("tokens", "epochs", "batch", "share"),
    [
        (2_600_000, 1.0, 8192, 1.0),
        (200_000, 1.0, 2048, 0.5),
        (400_000, 1.5, 6000, (6000 / 8192) ** 0.5),
        (10, 1.0, 2048, 0.5),
    ],
)
def test_batch_and_learning_rate_follow_the_text_and_the_width(
    tokens: int, epochs: float, batch: int, share: float
) -> None:
    full, adapters, wide = (
        batched(asked(full=full, epochs=epochs), hidden_size=width, tokens=tokens)
        for full, width in ((True, 576), (False, 48), (True, 4096))
    )
    assert full.batch_tokens == adapters.batch_tokens == batch
    assert full.learning_rate == pytest.approx(fitting.RATE * share, rel=0.02)
    assert adapters.learning_rate == pytest.approx(fitting.RATE * fitting.ADAPTER_RATE * share, rel=0.05)
    assert wide.learning_rate == pytest.approx(fitting.RATE * share * 576 / 4096, rel=0.05)
    by_samples = batched(asked(full=True, gradient_accumulation=4, batch_size=1), hidden_size=48, tokens=tokens)
    assert by_samples.batch_tokens is None


# Several processes, and what is killed.


def started(folder: Path, out: Path, *more: object, processes: int = 1) -> list[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "amprune"]
    asked = [
        "recover", folder / "pruned", out, "--data", folder / "chats.jsonl", "--data", "self", "--tokens", 4000,
        "--batch-size", 1, "--batch-tokens", 256, "--learning-rate", 3e-3, "--logging-steps", 1, "--device", "cpu",
        "--dtype", "float32", "--save-steps", 2, *more,
    ]  # fmt: skip
    return [sys.executable, "-m", *(launch if processes > 1 else ["amprune"]), *map(str, asked)]


@pytest.mark.process
def test_two_processes_distil_as_one_and_the_first_writes_the_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMPRUNE_CACHE", str(tmp_path / "cache"))
    for name, processes in (("two", 2), ("one", 1)):
        done = subprocess.run(
            started(folder, tmp_path / name, processes=processes), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    two, one = (json.loads((tmp_path / name / "amprune/recovery.json").read_text()) for name in ("two", "one"))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["data"] == one["data"]
    assert [source["name"] for source in one["data"]["sources"]] == ["chats.jsonl", "self"]
    assert two["validation_after"] == pytest.approx(one["validation_after"], abs=2e-4)
    assert one["validation_after"] < one["validation_before"]
    ours, theirs, before = (weights(place) for place in (tmp_path / "two", tmp_path / "one", folder / "pruned"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=0)
    assert max(float((theirs[name] - before[name]).abs().max()) for name in theirs) > 2e-3


@pytest.mark.process
def test_a_killed_distillation_is_gone_on_with_bit_by_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMPRUNE_CACHE", str(tmp_path / "cache"))
    assert subprocess.run(started(folder, tmp_path / "whole"), capture_output=True, check=False).returncode == 0
    process = subprocess.Popen(started(folder, tmp_path / "out"), stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out.training").glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    done = subprocess.run(started(folder, tmp_path / "out", "--resume"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-" in done.stderr
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
