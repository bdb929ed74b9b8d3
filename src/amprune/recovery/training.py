"""The training run, by the transformers Trainer: loss, log, checkpoints."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from amprune.errors import RecoveryError, reason
from amprune.progress import Advance
from amprune.recovery.distillation import divergence, teacher_hidden
from amprune.recovery.samples import IGNORED, Sample, TrainingData
from amprune.recovery.settings import RecoverySettings

logger = logging.getLogger(__name__)
LOG = "training.jsonl"
EPOCHS = "epochs"
_CHUNK = 512


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run; the Trainer writes its state file last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found.append((int(state["global_step"]), path))
    return max(found)[1] if found else None


def train(
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    settings: RecoverySettings,
    folder: Path,
    *,
    teacher: PreTrainedModel | None = None,
    device: str | None = None,
    resume_from: Path | None = None,
    each_epoch: bool = False,
    advance: Advance | None = None,
) -> Trainer:
    """Trains a model, with checkpoints and the log in `folder`, and returns the Trainer.

    With `each_epoch`, the weights of every epoch are kept in `folder/epochs`.

    Raises:
        RecoveryError: a loss is not finite, or the disk is full; says where the last good checkpoint is.
    """
    trainer = _Recovery(
        settings=settings,
        teacher=teacher,
        model=model,
        args=_arguments(settings, folder, data, device),
        train_dataset=[_masked(sample) for sample in data.training],
        eval_dataset=[_masked(sample) for sample in data.validation] or None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    if teacher is not None:
        teacher.to(trainer.args.device)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    log = _Log(folder / LOG, trainer, resume_from, advance)
    trainer.add_callback(log)
    if each_epoch:
        trainer.add_callback(_EachEpoch(trainer, folder / EPOCHS))
    try:
        if resume_from is None and data.validation:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if data.validation and log.validated != trainer.state.global_step:
            trainer.evaluate()
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise RecoveryError(
            f"cannot write to {folder}: {reason(error)}; {_where(folder)}. Free some space and go on with --resume"
        ) from error
    return trainer


def _masked(sample: Sample) -> Sample:
    return {**sample, "attention_mask": [1] * len(sample["input_ids"])}


def total_steps(data: TrainingData, settings: RecoverySettings, *, processes: int = 1) -> int:
    """Returns how many optimizer steps a run takes."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(len(data.training) / (settings.batch_size * processes))
    return math.ceil(settings.epochs * max(1, math.ceil(batches / settings.gradient_accumulation)))


def _arguments(settings: RecoverySettings, folder: Path, data: TrainingData, device: str | None) -> TrainingArguments:
    steps = total_steps(data, settings)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if data.validation else "no",
        eval_steps=settings.validation_steps or max(1, steps // 5),
        prediction_loss_only=True,
        bf16=settings.full and bfloat16_works(device),
        use_cpu=device is not None and device.startswith("cpu"),
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
    )


def bfloat16_works(device: str | None) -> bool:
    """Tells whether a device computes in bfloat16; every CPU does."""
    on_cuda = torch.cuda.is_available() and not (device or "cuda").startswith("cpu")
    return torch.cuda.is_bf16_supported() if on_cuda else True


class _Recovery(Trainer):
    """The Trainer with our loss: response tokens alone, optionally with the divergence from a teacher."""

    def __init__(self, *, settings: RecoverySettings, teacher: PreTrainedModel | None, **options: Any) -> None:
        super().__init__(**options)
        self.settings, self.teacher = settings, teacher
        self.tokens, self.folder = 0, Path(str(self.args.output_dir))
        # Ours sums over the tokens of all batches of a step, on all devices, and divides by their number.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the mean loss over response tokens; in evaluation the data's alone."""
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wanted = labels[:, 1:] != IGNORED
        ours, targets = logits[:, :-1][wanted], labels[:, 1:][wanted]
        total: torch.Tensor = ours.new_zeros((), dtype=torch.float32)
        for part, target in zip(ours.split(_CHUNK), targets.split(_CHUNK), strict=True):
            total = total + cross_entropy(part.float(), target, reduction="sum")
        if model.training:
            self.tokens += int(mask.sum())
            if self.teacher is not None:
                weight, hidden = self.settings.teacher_weight, teacher_hidden(self.teacher, ids, mask)[:, :-1][wanted]
                apart = divergence(ours, hidden, self.teacher, temperature=self.settings.temperature)
                total = (1 - weight) * total + weight * apart
        loss = total / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise RecoveryError(
                f"the loss is {float(loss)} at step {self.state.global_step}; {_where(self.folder)}; try a lower "
                "--learning-rate, or --dtype float32"
            )
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over devices
        return (loss, {"logits": logits}) if return_outputs else loss


class _Log(TrainerCallback):
    """Writes a JSON line for each logged step and each validation."""

    def __init__(self, path: Path, trainer: _Recovery, resume_from: Path | None, advance: Advance | None) -> None:
        self.path, self.trainer, self.advance = path, trainer, advance
        self.since = (time.perf_counter(), 0)
        self.validated: int | None = None
        if trainer.is_world_process_zero():
            _cut(path, int(resume_from.name.rpartition("-")[2]) if resume_from else -1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tells that an optimizer step is done."""
        if self.advance is not None and state.is_world_process_zero:
            self.advance(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Appends what the Trainer logs, under our names."""
        if logs is None:
            return
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        if "eval_loss" in logs:
            entry["validation_loss"], self.validated = logs["eval_loss"], state.global_step
        elif "loss" in logs:
            entry |= {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            entry["tokens_per_second"] = self._speed()
        else:
            return
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _speed(self) -> float:
        now, tokens = time.perf_counter(), self.trainer.tokens
        (before, done), self.since = self.since, (now, tokens)
        return round((tokens - done) / (now - before), 1)


def _cut(path: Path, step: int) -> None:
    """Leaves out of the log what came after the checkpoint that training goes on from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


class _EachEpoch(TrainerCallback):
    """Keeps the weights of every epoch."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves what was trained so far."""
        self.trainer.save_model(str(self.folder / f"epoch-{round(state.epoch or 0)}"))


def _where(folder: Path) -> str:
    last = last_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads a training log; empty where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]
