"""Recovery that is killed, interrupted or out of disk: what stays, and that going on changes nothing."""

import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_recovery import load, losses, save_chats, save_tiny, train, weights
from typer.testing import CliRunner

from amprune import CheckpointError, RecoveryError
from amprune.cli.options import app
from amprune.model import writer
from amprune.model.recovered import LOG, read_log
from amprune.recovery import run as module
from amprune.recovery import training
from amprune.recovery.run import RecoveredModel
from amprune.recovery.runs import last_checkpoint
from amprune.running import Advance

# 6 chats, 1 held out: 3 steps an epoch, the third of a single batch. Nothing falls on the same step all the time.
STEPS = {"lora_dropout": 0.1, "max_steps": 8, "save_steps": 2, "logging_steps": 3, "validation_steps": 3,
         "validation_share": 0.2}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chats(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> RecoveredModel:
    """A run that nothing interrupts."""
    return train(model, chats, tmp_path_factory.mktemp("whole") / "out", keep_epochs=True, **STEPS)


@pytest.fixture(scope="module")
def brief(model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> RecoveredModel:
    """A run of six steps that nothing interrupts."""
    return train(model, chats, tmp_path_factory.mktemp("brief") / "out", max_steps=6)


@pytest.fixture(autouse=True)
def without_handlers() -> Iterator[None]:
    """Removes what the command line logs to: a stream of its test."""
    yield
    logging.getLogger().handlers[:] = []


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "trainable_model", lambda *_, **__: pytest.fail("the model was loaded"))


def interrupted_at(step: int) -> Callable[[str, int], Any]:
    """A progress that interrupts the training when a step is done, before it is logged or saved."""

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Advance]:
        done = [0]

        def advance(steps: int) -> None:
            done[0] += steps
            if description == "Training" and done[0] == step:
                raise KeyboardInterrupt

        yield advance

    return progress


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def timeless(log: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in log]


def assert_same(found: RecoveredModel, expected: RecoveredModel) -> None:
    """Holds losses, weights and record to be the same, bit by bit, whether or not epochs were kept."""
    assert timeless(found.log) == timeless(expected.log)
    ours, theirs = weights(found.folder), weights(expected.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {**found.record, "keep_epochs": None} == {**expected.record, "keep_epochs": None}


def test_the_log_of_a_run_has_every_step_once(whole: RecoveredModel) -> None:
    assert [step for step, _ in losses(whole.log)] == [2, 3, 4, 6, 8]
    assert [step for step, _ in losses(whole.log, "validation_loss")] == [0, 3, 6, 8]
    assert [entry["step"] for entry in whole.log] == sorted(entry["step"] for entry in whole.log)


# Interrupted, and gone on with.


@pytest.mark.parametrize("step", [1, 3, 5, 7])  # from the start, within an epoch, and from the end of one
def test_a_run_that_goes_on_ends_as_if_nothing_had_been(
    step: int, model: Path, chats: Path, whole: RecoveredModel, tmp_path: Path
) -> None:
    options = {**STEPS, "keep_epochs": True}
    with pytest.raises(KeyboardInterrupt):
        train(model, chats, tmp_path / "out", progress=interrupted_at(step), **options)
    assert not (tmp_path / "out").exists()
    last = last_checkpoint(tmp_path / "out.training")
    saved = (step - 1) // 2 * 2
    assert last == (tmp_path / "out.training" / f"checkpoint-{saved}" if saved else None)
    assert (tmp_path / "out.training").exists() == bool(saved)
    assert_same(train(model, chats, tmp_path / "out", resume=True, **options), whole)
    epochs = [f"out.epoch-{number}" for number in (1, 2, 3)]
    assert {path.name for path in tmp_path.iterdir()} == {"out", *epochs}
    for name in epochs:
        ours, theirs = weights(tmp_path / name), weights(whole.folder.with_name(name))
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


def test_no_epoch_is_lost_between_its_last_checkpoint_and_the_next(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**STEPS, "save_steps": 3, "max_steps": 6, "keep_epochs": True}
    with monkeypatch.context() as patch:
        patch.setattr(training._Log, "on_save", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(model, chats, tmp_path / "out", **options)
    assert last_checkpoint(tmp_path / "out.training") == tmp_path / "out.training" / "checkpoint-3"
    found = train(model, chats, tmp_path / "out", resume=True, **options)
    assert [path.name for path in found.epochs] == ["out.epoch-1", "out.epoch-2"]


def test_full_training_with_a_teacher_goes_on_as_well(model: Path, chats: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"full": True, "learning_rate": 1e-3, "max_steps": 4, "teacher": model}
    expected = train(model, chats, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(model, chats, tmp_path / "out", progress=interrupted_at(3), **options)
    assert_same(train(model, chats, tmp_path / "out", resume=True, **options), expected)


def test_a_run_interrupted_twice_goes_on_twice(model: Path, chats: Path, whole: RecoveredModel, tmp_path: Path) -> None:
    for step, resume in ((4, False), (7, True)):
        with pytest.raises(KeyboardInterrupt):
            train(model, chats, tmp_path / "out", progress=interrupted_at(step), resume=resume, **STEPS)
    assert_same(train(model, chats, tmp_path / "out", resume=True, **STEPS), whole)


def test_what_was_trained_is_merged_without_training_again(
    model: Path, chats: Path, whole: RecoveredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**STEPS, "keep_epochs": True}
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_recovered", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(model, chats, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"out.training"}
    monkeypatch.setattr(module, "trainable_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert_same(train(model, chats, tmp_path / "out", resume=True, **options), whole)


def command(model: Path, chats: Path, out: Path, *more: object) -> list[str]:
    arguments = [
        "recover", model, out, "--preset", "paper", "--data", chats, "--max-steps", 40, "--save-steps", 3,
        "--logging-steps", 2, "--gradient-accumulation", 2, "--validation-share", 0.2, "--device", "cpu", *more,
    ]  # fmt: skip
    return [str(argument) for argument in arguments]


@pytest.mark.parametrize(
    "file", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "sha256.json", "scheduler.pt"]
)
def test_a_damaged_checkpoint_is_left_out_and_changes_nothing(
    file: str, model: Path, chats: Path, whole: RecoveredModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit is enough: what was saved is known by its hash, or by its own sums."""
    options = {**STEPS, "keep_epochs": True}
    with pytest.raises(KeyboardInterrupt):
        train(model, chats, tmp_path / "out", progress=interrupted_at(5), **options)
    damaged = tmp_path / "out.training" / "checkpoint-4" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    result = train(model, chats, tmp_path / "out", resume=True, **options)
    assert f"checkpoint-4 is damaged ({file}) and removed; going on from the one before" in caplog.text
    assert_same(result, whole)


def test_a_killed_process_is_gone_on_with_bit_by_bit(model: Path, chats: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "out.training"
    process = subprocess.Popen(
        [sys.executable, "-m", "amprune", *command(model, chats, out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while last_checkpoint(folder) is None:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = last_checkpoint(folder)
    assert last is not None
    assert last.name != "checkpoint-40"
    assert not out.exists()
    seen = timeless(entry for entry in read_log(folder / LOG) if entry["step"] <= 2)
    for arguments in (command(model, chats, out, "--resume"), command(model, chats, tmp_path / "whole")):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    log, expected = (timeless(read_log(place / "amprune" / LOG)) for place in (out, tmp_path / "whole"))
    assert log == expected
    assert log[: len(seen)] == seen
    ours, theirs = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def cut_short(model: Path, chats: Path, out: Path, **changes: Any) -> Path:
    """Leaves a run that was interrupted at its fifth step; returns its folder."""
    with pytest.raises(KeyboardInterrupt):
        train(model, chats, out, progress=interrupted_at(5), **{**STEPS, **changes})
    return out.with_name(f"{out.name}.training")


@pytest.mark.parametrize("state", [None, '{"global_step": 6, "max', "[]"])
def test_a_checkpoint_that_was_being_written_is_left_out(
    state: str | None, model: Path, chats: Path, whole: RecoveredModel, tmp_path: Path
) -> None:
    folder = cut_short(model, chats, tmp_path / "out")
    half = shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
    (half / "adapter_model.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").unlink()
    if state is not None:
        (half / "trainer_state.json").write_text(state)
    with (folder / LOG).open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert_same(train(model, chats, tmp_path / "out", resume=True, **STEPS), whole)


# What is refused.


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "setting": ({"learning_rate": 0.5}, "settings.learning_rate"),
    "two settings": ({"lora_rank": 2, "packing": False, "lora_alpha": 2}, "settings.lora_alpha, settings.lora_rank"),
    "samples": ({"samples": 5}, "data.sources, data.tokens, data.training"),
    "teacher": ({"teacher": True}, "teacher"),
    "dtype": ({"dtype": "bfloat16"}, "dtype"),
    "epochs kept": ({"keep_epochs": True}, "keep_epochs"),
}


@pytest.mark.parametrize("other", OTHER)
def test_a_run_goes_on_only_with_what_it_was_asked_for(
    other: str, model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut_short(model, chats, tmp_path / "out")
    changes, named = OTHER[other]
    changes = {name: model if value is True and name == "teacher" else value for name, value in changes.items()}
    monkeypatch.setattr(module, "trainable_model", interrupt)
    with pytest.raises(RecoveryError, match=f"was asked for with another {named}; ask for the same"):
        train(model, chats, tmp_path / "out", resume=True, **{**STEPS, **changes})
    assert last_checkpoint(folder) == folder / "checkpoint-4"


def test_a_run_does_not_go_on_with_another_model(model: Path, chats: Path, tmp_path: Path) -> None:
    cut_short(model, chats, tmp_path / "out")
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(RecoveryError, match="was asked for with another model; "):
        train(other, chats, tmp_path / "out", resume=True, **STEPS)


def test_a_run_is_not_begun_over_another(
    model: Path, chats: Path, whole: RecoveredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut_short(model, chats, tmp_path / "out", learning_rate=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(module, "trainable_model", interrupt)
        with pytest.raises(
            RecoveryError, match=r"holds an interrupted run, last checkpoint checkpoint-4; go on with --r"
        ):
            train(model, chats, tmp_path / "out", **STEPS)
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    assert_same(train(model, chats, tmp_path / "out", overwrite=True, **STEPS), whole)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
def test_a_folder_of_somebody_else_is_kept(
    options: dict[str, bool], model: Path, chats: Path, tmp_path: Path, untrainable: None
) -> None:
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "thesis.txt").write_text("mine")
    with pytest.raises(RecoveryError, match=r"out\.training is in the way and was not made by amprune; move it"):
        train(model, chats, tmp_path / "out", **STEPS, **options)
    assert (tmp_path / "out.training" / "thesis.txt").read_text() == "mine"


def test_a_request_that_was_being_written_is_named(model: Path, chats: Path, tmp_path: Path, untrainable: None) -> None:
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "request.json").write_text('{"mod')
    with pytest.raises(
        RecoveryError,
        match=r"request\.json cannot be read: .*not JSON.* damaged: remove .*out\.training and start anew",
    ):
        train(model, chats, tmp_path / "out", resume=True, **STEPS)


def test_resuming_what_never_began_begins(
    model: Path, chats: Path, whole: RecoveredModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "amprune")
    assert_same(train(model, chats, tmp_path / "out", resume=True, **STEPS), whole)
    assert "holds no interrupted run; training starts anew" in caplog.text


# Losses that are not finite.


def test_a_loss_that_is_not_finite_before_any_checkpoint_leaves_nothing(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        RecoveryError, match=r"the loss is (nan|inf) at step 2; there is no checkpoint yet; .*lower --le"
    ):
        train(model, chats, tmp_path / "out", learning_rate=1e30, save_steps=10)
    assert not list(tmp_path.iterdir())


def broken_at(step: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks a trained weight when a step is done, before its checkpoint is written."""
    callback: Any = training._Log
    on_step_end = callback.on_step_end

    def end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        on_step_end(self, args, state, control, **options)
        if state.global_step == step:
            with torch.no_grad():
                next(p for p in self.trainer.model.parameters() if p.requires_grad)[0, 0] = value

    monkeypatch.setattr(callback, "on_step_end", end)


@pytest.mark.parametrize(
    ("step", "value", "said"),
    [
        (3, math.inf, r"the loss is nan at step 4; the last good checkpoint is \S+out\.training/checkpoint-2; remove "),
        (4, math.nan, r"the loss is nan at step 5; the last good checkpoint is \S+out\.training/checkpoint-2; remove "),
        (5, math.nan, r"the loss is nan at step 6; the last good checkpoint is \S+out\.training/checkpoint-4; remove "),
        (
            6,
            math.inf,
            r"lora_A\S+ is not finite after step 6; the last good checkpoint is \S+out\.training/checkpoint-4; rem",
        ),
    ],
    ids=["between checkpoints", "in a checkpoint", "after two", "in the last step"],
)
def test_weights_that_break_stop_the_run_and_no_checkpoint_holds_them(
    step: int,
    value: float,
    said: str,
    model: Path,
    chats: Path,
    brief: RecoveredModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        broken_at(step, value, patch)
        with pytest.raises(RecoveryError, match=said):
            train(model, chats, tmp_path / "out", max_steps=6)
    assert not (tmp_path / "out").exists()
    assert_same(train(model, chats, tmp_path / "out", max_steps=6, resume=True), brief)


def test_a_validation_loss_that_is_not_finite_is_named(chats: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    stored = weights(tmp_path / "model")
    stored["model.norm.weight"][:] = math.nan
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecoveryError, match="the validation loss is nan at step 0; there is no checkpoint yet"):
        train(tmp_path / "model", chats, tmp_path / "out", validation_share=0.2)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# A full disk.


def full_disk(what: str, when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the file of a kind be written as often as told, and fails from then on, half-way."""
    owner: Any = torch if what != "adapter" else peft.peft_model
    name = "save" if what != "adapter" else "safe_save_file"
    save, saved = getattr(owner, name), []
    error: dict[str, Exception] = {
        "optimizer": OSError(28, "No space left on device"),
        "rng": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        "adapter": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    }
    wanted = {"optimizer": "optimizer.pt", "rng": "rng_state.pth", "adapter": "adapter_model.safetensors"}[what]

    def write(content: Any, file: Any, *arguments: Any, **options: Any) -> Any:
        if Path(file).name == wanted:
            saved.append(file)
            if len(saved) > when:
                Path(file).write_bytes(b"half")
                raise error[what]
        return save(content, file, *arguments, **options)

    monkeypatch.setattr(owner, name, write)


@pytest.mark.parametrize("what", ["optimizer", "rng", "adapter"])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_how_to_go_on(
    what: str, model: Path, chats: Path, brief: RecoveredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = r"cannot write to \S+out\.training: .*; the last good checkpoint is \S+checkpoint-2\. Free some .* --resume$"
    with monkeypatch.context() as patch:
        full_disk(what, 1, patch)
        with pytest.raises(RecoveryError, match=said) as failed:
            train(model, chats, tmp_path / "out", max_steps=6)
    assert re.search("No space left on device|unexpected pos", str(failed.value))
    assert not (tmp_path / "out").exists()
    assert_same(train(model, chats, tmp_path / "out", max_steps=6, resume=True), brief)


def test_a_disk_that_is_full_from_the_first_leaves_nothing(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk("optimizer", 0, monkeypatch)
    with pytest.raises(
        RecoveryError, match=r"cannot write to .*there is no checkpoint yet\. Free some space and run ag"
    ):
        train(model, chats, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_while_merging_keeps_the_training(
    model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot write \S+out\.partial: .*No space"):
            train(model, chats, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out.training"}
    monkeypatch.setattr(module, "trainable_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert train(model, chats, tmp_path / "out", resume=True).record["steps"] == 4


# Two processes.


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs amprune under `accelerate launch` in two processes; its own option --cpu would start one alone."""
    launch = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
        "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m", "amprune",
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", *launch, *map(str, arguments), "--device", "cpu"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_two_processes_do_what_one_does_that_accumulates_two_batches(model: Path, chats: Path, tmp_path: Path) -> None:
    arguments = ["--data", chats, "--max-steps", 5, "--save-steps", 2, "--logging-steps", 1, "--lora-dropout", 0,
                 "--validation-share", 0.4, "--learning-rate", 0.01]  # fmt: skip
    process = launched(
        "recover", model, tmp_path / "two", "--preset", "paper", *arguments, "--gradient-accumulation", 1, "--json"
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert (found["processes"], found["steps"], found["out"]) == (2, 5, str(tmp_path / "two"))
    one = train(
        model, chats, tmp_path / "one", max_steps=5, validation_share=0.4, validation_steps=None,
        gradient_accumulation=2,
    )  # fmt: skip
    log = read_log(tmp_path / "two" / "amprune" / LOG)
    for name in ("loss", "validation_loss", "learning_rate", "grad_norm"):
        assert dict(losses(log, name)) == pytest.approx(dict(losses(one.log, name)), abs=2e-5)
    assert losses(log)[-1][1] < losses(log)[0][1] - 0.05
    ours, theirs, before = weights(tmp_path / "two"), weights(one.folder), weights(model)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=0)
    assert max(float((theirs[name] - before[name]).abs().max()) for name in theirs) > 1e-3
    load(tmp_path / "two")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are those of Unix")
def test_a_log_that_is_a_pipe_is_refused_at_once(model: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(model, chats, tmp_path / "out", progress=interrupted_at(4), **STEPS)
    log = tmp_path / "out.training" / "training.jsonl"
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(RecoveryError, match=r"training\.jsonl cannot be read: it is a device or a pipe.*; remove it"):
        train(model, chats, tmp_path / "out", resume=True, **STEPS)
