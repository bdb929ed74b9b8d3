"""PRUNED -> OUT: data, training, merge, comparison, in order. START HERE in this folder."""

import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from amprune import __version__
from amprune.cut.refit.record import RECORD as RECONSTRUCTION
from amprune.errors import RecoveryError
from amprune.model.architecture import make_config
from amprune.model.loading import load_tokenizer
from amprune.model.reader import Checkpoint, digests, open_model, read_checkpoint
from amprune.model.recovered import LOG, RECORD, earlier, read_log
from amprune.model.source import Source
from amprune.model.writer import RECORDS, check_output, parse_size, staged_folder
from amprune.plan.artefact import PruningPlan
from amprune.prove.card import write_card
from amprune.records import alone, write
from amprune.recovery.fitting import batched, fitted
from amprune.recovery.merging import write_recovered
from amprune.recovery.models import (
    check_device,
    check_teacher,
    dense_of,
    find_teacher,
    on_accelerator,
    processes,
    teaching_model,
    trainable_model,
)
from amprune.recovery.runs import (
    EPOCHS,
    begin_run,
    best_checkpoint,
    is_finished,
    last_checkpoint,
    nothing_left,
    settings_before,
    steps_done,
    write_log,
)
from amprune.recovery.training import check_training, total_steps, train, validated
from amprune.running import Progress, no_progress, release_memory
from amprune.settings import PathLike, RecoverySettings, Training, part, settle, with_preset, write_recipe
from amprune.text.records import file_of
from amprune.text.training import TrainingData, load_training_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecoveredModel:
    """What `recover` returns."""

    folder: Path
    log: tuple[dict[str, Any], ...]
    """The content of `amprune/training.jsonl`."""
    record: dict[str, Any]
    """The content of `amprune/recovery.json`: settings, data, steps, validation losses before and after, rounding."""
    epochs: tuple[Path, ...] = ()
    """The models of all epochs, in their order, where they are kept; the last is `folder` once more."""


def recover(
    model: PathLike, out: PathLike, settings: RecoverySettings | None = None, *, progress: Progress = no_progress,
    **options: Any,
) -> RecoveredModel | None:  # fmt: skip
    """Recovers a pruned model by training (Algorithm 1, line 9) and writes an ordinary checkpoint.

    Runs unchanged under `torchrun` or `accelerate launch`; then the first process writes OUT, and the others return
    None. Training keeps its checkpoints and log in `OUT.training`, which is removed once OUT is there.

    Args:
        model: a pruned checkpoint; a dense one is allowed.
        out: the folder to write; it appears whole or not at all.
        settings: what is left open, the preset says: `best`, distillation, or `paper`. Weights that are frozen while
            training are of `dtype`: auto is the checkpoint's, but never float16.
        progress: told how far it is.
        options: of `RecoverySettings`, such as `epochs=1` or `data="builtin"`; they count before `settings`.

    Raises:
        RecoveryError: settings or data make no sense, a loss is not finite, or the merged model differs.
        CheckpointError: the model cannot be read, or OUT not written.
    """
    asked = settle(RecoverySettings, settings, options)
    check_training(asked)
    check_device(asked)
    parse_size(asked.max_shard_size)
    source, base = open_model(model, revision=asked.revision, dtype=asked.dtype)
    # Of the processes that `torchrun` or `accelerate launch` started, the first writes.
    first, folder = os.environ.get("RANK", "0") == "0", Path(out).expanduser()
    training = folder.with_name(f"{folder.name}.training")
    whole = with_preset(asked)
    teacher, dense = find_teacher(whole, source)
    source = replace(source, protected=(*source.protected, *_other_sources(teacher, whole)))
    if first:
        _check_early(folder, source, whole)
    tokenizer = _tokenizer(source, trust_remote_code=asked.trust_remote_code)
    check_teacher(teacher, base, tokenizer)
    watch = progress if first else no_progress
    settled = fitted(whole, base, dense, before=settings_before(training) if asked.resume else {})
    with PartialState(cpu=not on_accelerator(asked.device)).main_process_first() if processes() > 1 else nullcontext():
        found = _data(settled, tokenizer, base, dense, progress=watch)
    settled = _check_data(found, base, source, settled, batch_given=whole.batch_size is not None)
    if first and not (source.folder / RECORDS / "plan.json").is_file():
        logger.info("%s was not pruned by amprune; it is trained as it is", source.name)
    request = {
        "model": base.fingerprint, "data": found.to_dict(), "settings": asdict(part(Training, settled)),
        "dtype": asked.dtype, "teacher": None if teacher is None else str(asked.teacher or teacher.name),
        "keep_epochs": asked.keep_epochs, "processes": processes(),
    }  # fmt: skip
    lock = training.with_name(f"{training.name}.lock")
    with alone(lock, str(training), error=RecoveryError) if first else nullcontext():
        if first:
            begin_run(training, request, resume=asked.resume, overwrite=asked.overwrite)
        if processes() > 1:  # none looks into the folder of the run before the first has put it in order
            PartialState(cpu=not on_accelerator(asked.device)).wait_for_everyone()
        with nothing_left(training) if first else nullcontext():
            trained = _trained(base, dense, tokenizer, found, settled, training, progress=watch)
        if not first:
            return None
        of_what = dense_of(source) or (teacher and teacher.again)
        told = {**request, "validation": validated(settled, taught=teacher is not None), "dense": of_what}
        result = _finished(source, base, told, asked, trained, folder, training, progress=progress)
        shutil.rmtree(training)
    return result


def _finished(
    source: Source, base: Checkpoint, told: Mapping[str, Any], asked: RecoverySettings, trained: Path, folder: Path,
    training: Path, *, progress: Progress,
) -> RecoveredModel:  # fmt: skip
    """Writes the models of all epochs that are kept, and OUT."""
    log = tuple(read_log(training / LOG))
    finish = partial(_write, source, base, told, progress=progress)
    kept = sorted((training / EPOCHS).iterdir(), key=steps_done) if asked.keep_epochs else ()
    epochs = tuple(folder.with_name(f"{folder.name}.{epoch.name}") for epoch in kept)
    for epoch, place in zip(kept, epochs, strict=True):
        until = [entry for entry in log if entry["step"] <= steps_done(epoch)]
        finish(until, replace(asked, overwrite=True), epoch, place)
    return RecoveredModel(folder, log, finish(log, asked, trained, folder), epochs)


def _data(
    settings: RecoverySettings, tokenizer: Any, base: Checkpoint, dense: Checkpoint | None, *, progress: Progress
) -> TrainingData:
    """Reads what is trained on; text of its own the dense model writes, where it is asked for."""
    length = min(settings.max_length or 1, base.positions or sys.maxsize)
    return load_training_data(settings, tokenizer, max_length=length, author=dense, progress=progress)


def _check_data(
    found: TrainingData, base: Checkpoint, source: Source, settled: RecoverySettings, *, batch_given: bool
) -> RecoverySettings:
    """Refuses fewer samples than a batch, unless batches were not asked for, and tokens that the model does not know.

    Returns the settings with a batch that there are enough samples for, and a learning rate for it.
    """
    known, rows = int(make_config(base.config, where=source.name).vocab_size), settled.batch_size or 1
    if not batch_given:
        rows = max(1, min(rows, len(found.training) // processes()))
    if len(found.training) < (batch := rows * processes()):
        raise RecoveryError(
            f"{found.name} leaves {len(found.training)} samples to train on, fewer than a batch of {batch}; give more "
            "samples or a smaller --batch-size"
        )
    largest = max(max(sample["input_ids"]) for sample in (*found.training, *found.validation))
    if largest >= known:
        raise RecoveryError(
            f"{found.name} holds token id {largest:,}, but {source.name} embeds the ids 0 to {known - 1:,}; use the "
            "tokenizer of this very model"
        )
    tokens = sum(len(sample["input_ids"]) for sample in found.training)
    return batched(replace(settled, batch_size=rows), hidden_size=base.shape.hidden_size, tokens=tokens)


def _other_sources(teacher: Source | None, asked: RecoverySettings) -> Iterator[Path]:
    """Yields what is read beside the model, which no output may replace either."""
    yield from () if teacher is None else teacher.protected
    yield from file_of(asked.data, option="--data")


def _check_early(folder: Path, source: Source, asked: RecoverySettings) -> None:
    """Refuses before the training what would be in the way after it: places that are taken, a plan that is damaged."""
    if (plan := source.folder / RECORDS / "plan.json").is_file():
        PruningPlan.load(plan)
    check_output(folder, overwrite=asked.overwrite, protected=source.protected)
    for number in range(1, math.ceil(asked.epochs or 1) + 1 if asked.keep_epochs else 1):
        place = folder.with_name(f"{folder.name}.epoch-{number}")
        check_output(place, overwrite=asked.overwrite or asked.resume, protected=source.protected)


def _tokenizer(source: Source, *, trust_remote_code: bool) -> Any:
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise RecoveryError(f"the tokenizer in {source.folder} has neither a padding nor an end-of-sequence token")
    tokenizer.padding_side = "right"  # so that padding moves no position
    return tokenizer


def _trained(
    base: Checkpoint, dense: Checkpoint | None, tokenizer: Any, data: TrainingData, settings: RecoverySettings,
    training: Path, *, progress: Progress,
) -> Path:  # fmt: skip
    """Trains, unless an interrupted run had come to its end; returns the checkpoint of the last or the best step."""
    start, chosen = last_checkpoint(training), bool(settings.patience and data.validation)
    if start is not None and is_finished(start):
        return best_checkpoint(training, chosen=chosen) or start
    transformers.set_seed(settings.seed)
    with (
        trainable_model(base, settings) as model,
        teaching_model(dense, settings) as teacher,
        progress("Training", total_steps(data, settings)) as advance,
    ):
        advance(steps_done(start) if start is not None else 0)
        train(
            model, tokenizer, data, settings, training, teacher=teacher, resume_from=start, advance=advance
        ).accelerator.wait_for_everyone()
    release_memory()
    if (end := best_checkpoint(training, chosen=chosen)) is None:
        raise RecoveryError(f"{training} holds no checkpoint although the training ended; is the disk sound?")
    return end


def _write(
    source: Source, base: Checkpoint, request: Mapping[str, Any], log: Sequence[dict[str, Any]],
    settings: RecoverySettings, trained: Path, place: Path, *, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Writes a merged checkpoint, with how it was made until then: plan and scores of the pruned model, record, log.

    Returns the record.
    """
    steps = steps_done(trained)
    losses = [one["validation_loss"] for one in log if one["step"] <= steps and "validation_loss" in one]
    with staged_folder(place, overwrite=settings.overwrite, protected=source.protected) as staged:
        rounding = write_recovered(base, trained, staged, max_shard_size=settings.max_shard_size, progress=progress)
        base.check_unchanged()
        stored = read_checkpoint(staged)
        record = {
            "format": 1, "recovered_from": source.name, **request, "steps": steps,
            "validation_before": losses[0] if losses else None, "validation_after": losses[-1] if losses else None,
            "rounding": rounding, "earlier": earlier(source.folder), "sha256": digests(stored),
            "versions": {"amprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip
        before, records = source.folder / RECORDS, staged / RECORDS
        for name in ("plan.json", "scores.safetensors", RECONSTRUCTION):
            if (before / name).is_file():
                shutil.copyfile(before / name, records / name)
        write(records / RECORD, record)
        write_log(records / LOG, log)
        write_card(staged, source=source)
        write_recipe(records / "recipe.yaml", "recover", settings)
    return record
