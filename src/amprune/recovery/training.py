"""The training run, by the transformers Trainer: loss, log, checkpoints."""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
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

from amprune.errors import RecoveryError, reason, required
from amprune.model.architecture import quiet_transformers
from amprune.model.recovered import LOG, Validated, read_log
from amprune.recovery.distillation import Teaching, summed_loss, teacher_hidden
from amprune.recovery.models import bfloat16_works, on_accelerator, processes
from amprune.recovery.runs import EPOCHS, last_checkpoint, mark_whole, steps_done, where_to_go_on, write_log
from amprune.running import Advance, out_of_memory, release_memory
from amprune.settings import RecoverySettings, Training, with_preset
from amprune.text.training import IGNORED, TrainingData

logger = logging.getLogger(__name__)
_LEAST_RATE = 0.05
"""Of the peak, where a cosine ends."""


def train(
    model: Any, tokenizer: Any, data: TrainingData, settings: RecoverySettings, folder: Path, *,
    teacher: PreTrainedModel | None = None, resume_from: Path | None = None, advance: Advance | None = None,
) -> Trainer:  # fmt: skip
    """Trains a model, with checkpoints and the log in `folder`, and returns the Trainer.

    Where epochs are kept, the weights of each are in `folder/epochs`. Where a loss is not finite, or the disk is full,
    the error says where the last good checkpoint is.
    """
    if "tensorboard" in settings.report_to:  # else its files lay in the folder of the run, which is removed
        place = folder.with_name(f"{folder.name.removesuffix('.training')}.runs")
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(place))
    training, validation = (
        [{**sample, "attention_mask": [1] * len(sample["input_ids"])} for sample in samples]
        for samples in (data.training, data.validation)
    )
    trainer = _Recovery(
        settings=settings, teacher=teacher, model=model,
        args=_arguments(settings, folder, data, anew=resume_from is None),
        train_dataset=training, eval_dataset=validation or None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )  # fmt: skip
    if teacher is not None:
        teacher.to(trainer.args.device)  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    with quiet_transformers(), _disk_errors(folder):
        trainer.add_callback(_Log(folder / LOG, trainer, resume_from, advance))
        if settings.patience and validation:
            trainer.add_callback(_Best(settings.patience))
        if settings.keep_epochs:
            trainer.add_callback(_EachEpoch(trainer, folder / EPOCHS))
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    trainer.check_weights()
    return trainer


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns failures of the disk into one clear error; torch reports them as runtime errors of its zip writer."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_disk = ("PytorchStreamWriter", "inline_container", "unexpected pos")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in of_disk):
            raise
        again = "go on with --resume" if last_checkpoint(folder) else "run again"
        raise RecoveryError(
            f"cannot write to {folder}: {reason(error)}; {where_to_go_on(folder)}. Free some space and {again}"
        ) from error


_LEAST = {
    "lora_rank": 1, "batch_size": 1, "batch_tokens": 1, "gradient_accumulation": 1, "max_length": 2, "save_steps": 1,
    "logging_steps": 1, "max_steps": 1, "validation_steps": 1, "tokens": 1, "patience": 0,
}  # fmt: skip
_SHARES = ("lora_dropout", "validation_share", "warmup_share", "adam_beta2")


def check_training(settings: Training) -> None:
    """Refuses what cannot be trained with, whatever the preset is."""
    settings = with_preset(settings)
    expected = {name: f"{smallest} or more" for name, smallest in _LEAST.items()}
    expected |= dict.fromkeys(("lora_alpha", "learning_rate", "epochs", "temperature"), "a positive number")
    expected |= dict.fromkeys(_SHARES, "0 or more and below 1")
    expected["teacher_weight"] = "0 to 1"
    for name, words in expected.items():
        value = getattr(settings, name)
        if name in _LEAST:
            good = value is None or value >= _LEAST[name]
        elif words == "a positive number":
            good = value is None or 0 < value < math.inf
        else:
            good = 0 <= value < 1 or (name == "teacher_weight" and value == 1)
        if not good:
            raise RecoveryError(f"--{name.replace('_', '-')} is {value}, expected {words}")
    if settings.full and settings.load_in_4bit:
        raise RecoveryError("weights in four bits cannot be trained in full; leave out --full or --load-in-4bit")
    required("LoRA", "" if settings.full else "peft")


def total_steps(data: TrainingData, settings: Training) -> int:
    """Returns how many optimizer steps a run takes, on all devices together."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(len(data.training) / (_batch_size(settings) * processes()))
    return math.ceil((settings.epochs or 1) * max(1, math.ceil(batches / accumulation(data, settings))))


def accumulation(data: TrainingData, settings: Training) -> int:
    """Returns how many forward passes make an optimizer step, so that it is of as many tokens as asked for."""
    if settings.gradient_accumulation is not None or settings.batch_tokens is None:
        return settings.gradient_accumulation or 1
    tokens = sum(len(sample["input_ids"]) for sample in data.training) / len(data.training)
    return max(1, round(settings.batch_tokens / (tokens * _batch_size(settings) * processes())))


def _batch_size(settings: Training) -> int:
    return settings.batch_size or 1


def _arguments(settings: RecoverySettings, folder: Path, data: TrainingData, *, anew: bool) -> TrainingArguments:
    steps, accelerated = total_steps(data, settings), on_accelerator(settings.device)
    falling: dict[str, Any] = {"lr_scheduler_type": "linear"}
    if settings.schedule == "cosine":
        falling = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": _LEAST_RATE}}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=_batch_size(settings), per_device_eval_batch_size=1,
        gradient_accumulation_steps=accumulation(data, settings), learning_rate=settings.learning_rate or 0.0,
        adam_beta2=settings.adam_beta2 or 0.0, warmup_steps=round((settings.warmup_share or 0) * steps), **falling,
        num_train_epochs=settings.epochs or 1, max_steps=settings.max_steps or -1,
        logging_steps=settings.logging_steps, logging_nan_inf_filter=False, disable_tqdm=True,
        report_to=list(settings.report_to), save_steps=settings.save_steps, save_total_limit=2,
        eval_strategy="steps" if data.validation else "no",
        # A Trainer that evaluates before it trains takes the model as it is then, and never averages gradients.
        eval_on_start=anew and bool(data.validation),
        eval_steps=settings.validation_steps or max(1, steps // (10 if settings.patience else 5)),
        prediction_loss_only=True,
        bf16=bool(settings.full) and settings.dtype != "float32" and bfloat16_works(settings.device),
        use_cpu=not accelerated, torch_compile=settings.compile,
        seed=settings.seed, data_seed=settings.seed, dataloader_pin_memory=accelerated,
        remove_unused_columns=False, label_names=["labels"], ddp_find_unused_parameters=False,
    )  # fmt: skip
    arguments._n_gpu = min(1, arguments.n_gpu)  # else one process would spread each batch over all devices
    return arguments


def validated(settings: Training, *, taught: bool) -> Validated:
    """Tells what is measured on held-out samples: the divergence from the teacher, where nothing else is learnt."""
    return "divergence" if taught and settings.teacher_weight == 1 else "loss"


class _Recovery(Trainer):
    """The Trainer with our loss: that of the tokens with a label, the divergence from a teacher, or both."""

    def __init__(self, *, settings: RecoverySettings, teacher: PreTrainedModel | None, **options: Any) -> None:
        super().__init__(**options)
        self.settings, self.teacher = settings, teacher
        self.tokens, self.folder = 0, Path(str(self.args.output_dir))
        self.most_rows = sys.maxsize
        """What fitted the memory so far."""
        # Ours sums over the tokens of all batches of a step, on all devices, and divides by their number.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the mean loss over the tokens that count; in evaluation see `validated`."""
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        teaching = self._teaching(ids, mask, training=model.training)  # of all tokens, in one row
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        counted = torch.cat([labels[:, 1:] != IGNORED, torch.zeros_like(labels[:, :1], dtype=torch.bool)], dim=1)
        targets = torch.cat([labels[:, 1:].clamp(min=0), torch.zeros_like(labels[:, :1])], dim=1)
        number = int(counted.sum())
        if 2 * number < counted.numel():  # gathering costs less than what is computed for nothing
            logits, targets, where = logits[counted], targets[counted], None
            teaching = teaching and teaching.at(counted.flatten())
        else:
            logits, targets, where = logits.flatten(0, 1), targets.flatten(), counted.flatten()
        total = summed_loss(logits, targets, teaching, where)
        if model.training:
            self.tokens += int(mask.sum())
        # A validation loss is the mean over samples, in whatever batches and on however many devices.
        shared = num_items_in_batch if model.training else None
        loss = total / (number if shared is None else shared)
        if not bool(torch.isfinite(loss)):
            what, step = ("loss", 1) if model.training else ("validation loss", 0)
            self._stop(f"the {what} is {float(loss.detach())} at step {self.state.global_step + step}")
        if shared is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over devices
        return (loss, {}) if return_outputs else loss

    def _teaching(self, ids: torch.Tensor, mask: torch.Tensor, *, training: bool) -> Teaching | None:
        """Asks the teacher; a validation does so where nothing but the teacher is learnt from."""
        if self.teacher is None or not (training or validated(self.settings, taught=True) == "divergence"):
            return None
        hidden = teacher_hidden(self.teacher, ids, mask).flatten(0, 1)
        return Teaching(self.teacher, hidden, self.settings.teacher_weight or 0.0, self.settings.temperature)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Trains on a batch, in halves where it does not fit: what each adds to the gradient is the same."""
        rows = len(inputs["input_ids"])
        if rows <= self.most_rows:
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            except Exception as error:
                if not out_of_memory(error) or self.accelerator.num_processes > 1:
                    raise
                if rows == 1:
                    self._too_large(error)
            self.most_rows = rows // 2
            logger.warning("a batch of %d rows does not fit the memory; going on with %d at a time", rows, rows // 2)
            release_memory()
        halves = [{name: tensor[part] for name, tensor in inputs.items()} for part in _halves(rows)]
        return sum((self.training_step(model, half, num_items_in_batch) for half in halves), torch.tensor(0.0))

    def _too_large(self, error: Exception) -> NoReturn:
        raise RecoveryError(
            f"one row does not fit the memory ({reason(error)}); give --gradient-checkpointing, a smaller "
            "--max-length, --no-full or --load-in-4bit"
        ) from error

    def check_weights(self) -> None:
        """Raises RecoveryError if the last step, whose loss nothing has seen, broke the weights."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                self._stop(f"{name} is not finite after step {self.state.global_step}")

    def _stop(self, what: str) -> NoReturn:
        """Raises the error, and removes a checkpoint that holds the weights that failed."""
        shutil.rmtree(self.folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
        first = f"remove {self.folder} and " if last_checkpoint(self.folder) else ""
        raise RecoveryError(
            f"{what}; {where_to_go_on(self.folder)}; {first}start anew with a lower --learning-rate, or with --dtype "
            "float32"
        )


def _halves(rows: int) -> tuple[slice, slice]:
    return slice(0, (rows + 1) // 2), slice((rows + 1) // 2, rows)


class _Best(TrainerCallback):
    """Saves each validated step that is better than all before it, and ends a run that has long found no better."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """Compares a validation with the best; that before the training is not among them, since nothing is saved."""
        if (step := state.global_step) == 0:
            return
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            state.best_metric, state.best_global_step, control.should_save = metrics["eval_loss"], step, True
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{step}")
            return
        since = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
        if len([one for one in since if one > (state.best_global_step or 0)]) >= self.patience:
            logger.info("no better validation for %d in a row: stopping at step %d", self.patience, step)
            state.max_steps = step  # so that the checkpoint says that it is the last
            control.should_save = control.should_training_stop = True


class _Log(TrainerCallback):
    """Writes a JSON line for each logged step and each validation."""

    def __init__(self, path: Path, trainer: _Recovery, resume_from: Path | None, advance: Advance | None) -> None:
        self.path, self.trainer, self.advance = path, trainer, advance
        self.since = (time.perf_counter(), 0)
        if trainer.is_world_process_zero():  # what came after the step that training goes on from is left out
            done = steps_done(resume_from) if resume_from else -1
            write_log(path, [entry for entry in read_log(path) if entry["step"] <= done])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begins to take the time."""
        self.since = (time.perf_counter(), self.trainer.tokens)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tells that an optimizer step is done; of the last, everything is logged and kept."""
        if state.global_step >= state.max_steps:
            control.should_save, control.should_evaluate = True, self.trainer.eval_dataset is not None
        # The Trainer averages losses since the last line; a run that goes on from a checkpoint knows none before it.
        control.should_log = control.should_log or control.should_save
        if self.advance is not None and state.is_world_process_zero:
            self.advance(1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keeps the hashes of a checkpoint."""
        if state.is_world_process_zero:
            mark_whole(self.path.parent / f"checkpoint-{state.global_step}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Appends what the Trainer logs, under our names."""
        logs = logs or {}
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        if "eval_loss" in logs:
            entry["validation_loss"] = logs["eval_loss"]
        elif "loss" in logs:
            entry |= {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            now, tokens = time.perf_counter(), self.trainer.tokens
            (before, done), self.since = self.since, (now, tokens)
            everywhere = self.trainer.accelerator.num_processes * (tokens - done)
            entry["tokens_per_second"] = round(everywhere / (now - before), 1)
        else:
            return
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


class _EachEpoch(TrainerCallback):
    """Keeps the weights of every epoch, also of the last, shorter one."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves what was trained so far, before the step's checkpoint: a run that goes on from there would not."""
        epoch = state.epoch or 0.0
        if epoch.is_integer() or state.global_step >= state.max_steps:
            place = self.folder / f"epoch-{math.ceil(epoch)}"
            self.trainer.save_model(str(place))
            if state.is_world_process_zero:
                state.save_to_json(str(place / "trainer_state.json"))
                mark_whole(place)
