"""PRUNED -> OUT: data, training, merge, comparison, in order. START HERE in this folder."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from amprune import __version__
from amprune.architecture import quiet_transformers
from amprune.checkpoint import (
    RECORDS,
    Checkpoint,
    Source,
    check_output,
    open_source,
    read_checkpoint,
    staged_folder,
    write_json,
)
from amprune.checkpoint.loading import load_tokenizer, loaded_model, vocabulary_size
from amprune.errors import MissingDependencyError, RecoveryError
from amprune.evaluation import Evaluation, evaluate
from amprune.memory import release_memory
from amprune.progress import Progress, no_progress
from amprune.recovery.adapters import with_adapters
from amprune.recovery.merging import write_recovered
from amprune.recovery.samples import TrainingData, load_training_data
from amprune.recovery.settings import RecoverySettings
from amprune.recovery.training import EPOCHS, LOG, bfloat16_works, last_checkpoint, read_log, total_steps, train

logger = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]
RECORD = "recovery.json"
_REQUEST, _DONE = "request.json", "done.json"


@dataclass(frozen=True)
class RecoveredModel:
    """What `recover` returns."""

    folder: Path
    log: tuple[dict[str, Any], ...]
    """The content of `amprune/training.jsonl`."""
    record: dict[str, Any]
    """The content of `amprune/recovery.json`: settings, data, steps, validation losses before and after, rounding."""


def recover(
    model: PathLike,
    out: PathLike,
    *,
    data: PathLike | Sequence[str] = "alpaca",
    samples: int | None = None,
    settings: RecoverySettings | None = None,
    teacher: PathLike | None = None,
    resume: bool = False,
    keep_epochs: bool = False,
    device: str | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> RecoveredModel | None:
    """Recovers a pruned model by fine-tuning (Algorithm 1, line 9) and writes an ordinary checkpoint.

    Runs unchanged under `accelerate launch`; then the first process writes OUT, and the others return None. Training
    keeps its checkpoints and log in `OUT.training`, which is removed once OUT is there.

    Args:
        model: a pruned checkpoint; a dense one is allowed.
        out: the folder to write; it appears whole or not at all.
        data: `alpaca`, `builtin`, a file, or a list of texts.
        samples: how many to draw; None for all.
        settings: the paper's recipe unless told otherwise.
        teacher: the dense model; its next-token distributions become part of the loss.
        resume: go on from the last checkpoint of an interrupted run.
        keep_epochs: write the merged model of every epoch, too, as `OUT.epoch-1` and so on.
        device: cpu or cuda; under `accelerate launch` its own configuration decides.
        dtype: of the frozen weights while training; auto is the checkpoint's, but never float16.
        max_shard_size: such as 200MB or 5GB.
        overwrite: replace an OUT that is a checkpoint.
        revision: of a hub id.
        trust_remote_code: lets a tokenizer's own code run; model code never does.
        progress: told how far it is.

    Raises:
        RecoveryError: settings or data make no sense, a loss is not finite, or the merged model differs.
        CheckpointError: the model cannot be read, or OUT not written.
    """
    chosen = settings or RecoverySettings()
    chosen.check()
    source = open_source(model, revision=revision, dtype=dtype)
    folder = Path(out).expanduser()
    if _is_first():
        check_output(folder, overwrite=overwrite, protected=source.protected)
    base = read_checkpoint(source.folder)
    tokenizer = _tokenizer(source, trust_remote_code=trust_remote_code)
    watch = progress if _is_first() else no_progress
    found = load_training_data(
        data, tokenizer, samples=samples, max_length=_length(chosen, base), packing=chosen.packing,
        validation_share=chosen.validation_share, seed=chosen.seed, progress=watch,
    )  # fmt: skip
    _check_batch(found, chosen)
    if not (source.folder / RECORDS / "plan.json").is_file() and _is_first():
        logger.info("%s was not pruned by amprune; it is trained as it is", source.name)
    request = {
        "model": base.fingerprint, "data": found.to_dict(), "settings": chosen.to_dict(), "dtype": dtype,
        "teacher": str(teacher) if teacher is not None else None,
    }  # fmt: skip
    training = folder.with_name(f"{folder.name}.training")
    start = _prepare(training, request, resume=resume, overwrite=overwrite)
    trained, steps = _trained(
        source, tokenizer, found, chosen, training, start,
        teacher=teacher, device=device, dtype=dtype, each_epoch=keep_epochs, progress=watch,
    )  # fmt: skip
    if not _is_first():
        return None
    log = tuple(read_log(training / LOG))
    losses = [entry["validation_loss"] for entry in log if "validation_loss" in entry]

    def write(weights: Path, place: Path, *, replace: bool) -> dict[str, Any]:
        with staged_folder(place, overwrite=replace, protected=source.protected) as partial:
            difference = write_recovered(base, weights, partial, max_shard_size=max_shard_size, progress=progress)
            record = _record(request, source, steps, losses, difference)
            _write_records(source.folder, partial, training, record)
            # CARD
        return record

    if keep_epochs:
        for epoch in sorted((training / EPOCHS).iterdir()):
            write(epoch, folder.with_name(f"{folder.name}.{epoch.name}"), replace=True)
    record = write(trained, folder, replace=overwrite)
    shutil.rmtree(training)
    return RecoveredModel(folder, log, record)


def _is_first() -> bool:
    """Tells whether this is the process that writes, of those that `accelerate launch` started."""
    return int(os.environ.get("RANK", "0")) == 0


def _tokenizer(source: Source, *, trust_remote_code: bool) -> Any:
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise RecoveryError(f"the tokenizer in {source.folder} has neither a padding nor an end-of-sequence token")
    return tokenizer


def _length(settings: RecoverySettings, base: Checkpoint) -> int:
    return min(settings.max_length, base.positions or settings.max_length)


def _check_batch(data: TrainingData, settings: RecoverySettings) -> None:
    batch = settings.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    if len(data.training) < batch:
        raise RecoveryError(
            f"{data.name} leaves {len(data.training)} samples to train on, fewer than a batch of {batch}; give more "
            "samples or a smaller --batch-size"
        )


def _prepare(training: Path, request: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Makes the folder of the run; returns the checkpoint to go on from."""
    if not _is_first():
        return last_checkpoint(training) if resume else None
    request = json.loads(json.dumps(request))
    if training.exists() and not resume:
        ours = (training / _REQUEST).is_file() or not any(training.iterdir())
        if not (ours and overwrite):
            step = last_checkpoint(training)
            found = f"an interrupted run, last checkpoint {step.name}" if step else "a run without a checkpoint yet"
            raise RecoveryError(
                f"{training} holds {found if ours else 'something else'}; go on with --resume, or remove it"
            )
        shutil.rmtree(training)
    if resume and (training / _REQUEST).is_file():
        before = json.loads((training / _REQUEST).read_text(encoding="utf-8"))
        if different := sorted(key for key in request if before.get(key) != request[key]):
            raise RecoveryError(
                f"the interrupted run in {training} was asked for with another {', '.join(different)}; ask for the "
                "same again, or remove the folder and start anew"
            )
        start = last_checkpoint(training)
        logger.info("going on from %s", start.name if start else "the start: there is no checkpoint yet")
        return start
    training.mkdir(parents=True, exist_ok=True)
    write_json(training / _REQUEST, request)
    return None


def _trained(
    source: Source,
    tokenizer: Any,
    data: TrainingData,
    settings: RecoverySettings,
    training: Path,
    start: Path | None,
    *,
    teacher: PathLike | None,
    device: str | None,
    dtype: str,
    each_epoch: bool,
    progress: Progress,
) -> tuple[Path, int]:
    """Trains, unless an interrupted run had come to its end; returns what was trained, and after how many steps."""
    final, done = training / "final", training / "final" / _DONE
    if done.is_file():
        return final, int(json.loads(done.read_text(encoding="utf-8"))["steps"])
    transformers.set_seed(settings.seed)
    with (
        _trainable(source.folder, settings, dtype=dtype, device=device) as model,
        _teacher(teacher, model, dtype=dtype) as wise,
        progress("Training", total_steps(data, settings, processes=_processes())) as advance,
    ):
        if start is not None:
            advance(int(start.name.rpartition("-")[2]))
        trainer = train(
            model, tokenizer, data, settings, training,
            teacher=wise, device=device, resume_from=start, each_epoch=each_epoch, advance=advance,
        )  # fmt: skip
        trainer.save_model(str(final))
        steps = int(trainer.state.global_step)
        if _is_first():
            write_json(done, {"steps": steps})
        trainer.accelerator.wait_for_everyone()
        del trainer
    release_memory()
    return final, steps


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _trainable(folder: Path, settings: RecoverySettings, *, dtype: str, device: str | None) -> Iterator[Any]:
    """Loads the model to train, with its adapter unless it is trained in full."""
    if settings.load_in_4bit:
        yield with_adapters(_in_four_bits(folder), settings)
        return
    with loaded_model(folder, dtype=_training_dtype(folder, settings, dtype, device), device="cpu") as model:
        model.config.use_cache = False
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        yield model if settings.full else with_adapters(model, settings)


def _training_dtype(folder: Path, settings: RecoverySettings, dtype: str, device: str | None) -> str:
    """Full fine-tuning keeps its weights in float32; float16 would overflow, and is never trained in."""
    if settings.full:
        return "float32"
    stored = str(read_checkpoint(folder).dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if stored in ("float16", "bfloat16"):
        wanted = "bfloat16" if bfloat16_works(device) else "float32"
        if stored != wanted:
            logger.info("training in %s in place of %s", wanted, stored)
        return wanted
    return "float32"


def _in_four_bits(folder: Path) -> Any:
    try:
        import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError("--load-in-4bit needs bitsandbytes: `pip install bitsandbytes`") from error
    if not torch.cuda.is_available():
        raise RecoveryError("--load-in-4bit needs a CUDA device, and there is none here; leave it out")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32,
    )  # fmt: skip
    place = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    with quiet_transformers(bars_on_terminal=True):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=place)
    model.config.use_cache = False
    return model


@contextmanager
def _teacher(model: PathLike | None, student: Any, *, dtype: str) -> Iterator[PreTrainedModel | None]:
    """Loads the dense model that teaches.

    Raises:
        RecoveryError: its vocabulary is another.
    """
    if model is None:
        yield None
        return
    source = open_source(model, dtype=dtype)
    with loaded_model(source.folder, dtype=dtype, device="cpu") as teacher:
        ours, theirs = vocabulary_size(student), vocabulary_size(teacher)
        if ours != theirs:
            raise RecoveryError(
                f"the teacher {source.name} has a vocabulary of {theirs:,} tokens, the student one of {ours:,}; give "
                "the dense model that it was pruned from"
            )
        yield teacher.requires_grad_(False)


def _record(
    request: dict[str, Any], source: Source, steps: int, losses: Sequence[float], difference: float
) -> dict[str, Any]:
    return {
        "format": 1,
        "recovered_from": source.name,
        **request,
        "steps": steps,
        "validation_before": losses[0] if losses else None,
        "validation_after": losses[-1] if losses else None,
        "rounding": difference,
        "versions": {"amprune": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _write_records(source: Path, partial: Path, training: Path, record: dict[str, Any]) -> None:
    """Keeps how it was made: the plan and the scores of the pruned model, the record and the log of the training."""
    for name in ("plan.json", "scores.safetensors"):
        if (source / RECORDS / name).is_file():
            shutil.copyfile(source / RECORDS / name, partial / RECORDS / name)
    write_json(partial / RECORDS / RECORD, record)
    if (training / LOG).is_file():
        shutil.copyfile(training / LOG, partial / RECORDS / LOG)


def measure_epochs(
    pruned: PathLike,
    result: RecoveredModel,
    *,
    data_dir: PathLike | None = None,
    limit: int | None = None,
    windows: int | None = None,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measures the pruned model and that of every epoch (section IV-G) into OUT's `amprune/evaluation.json`.

    The models of all epochs but the last, which is OUT, are removed then.

    Raises:
        EvaluationError: the data cannot be read.
    """
    out = result.folder
    epochs = sorted(out.parent.glob(f"{out.name}.epoch-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    named = [f"{path.name.rpartition('.')[2]}={path}" for path in epochs[:-1]]
    found = evaluate(
        [f"pruned={pruned}", *named, f"{out.name}={out}"],
        out / RECORDS / "evaluation.json",
        measure=("perplexity", "zero_shot"),
        data_dir=data_dir,
        limit=limit,
        windows=windows,
        device=device,
        progress=progress,
    )
    for path in epochs:
        shutil.rmtree(path)
    return found
