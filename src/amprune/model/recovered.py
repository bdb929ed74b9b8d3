"""What the records of a model that was trained after pruning tell: as values, and in words."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from amprune.errors import CheckpointError, RecoveryError
from amprune.model.writer import RECORDS
from amprune.records import MOST, check_readable, parse, read, read_object

Validated = Literal["loss", "divergence"]
"""What was measured on held-out samples: the loss of the data, or the divergence from the teacher."""
RECORD, LOG = "recovery.json", "training.jsonl"
_LICENCES = {
    "alpaca": "the original Alpaca data is CC BY-NC 4.0, not for commercial use; its cleaned copy names CC BY 4.0",
    "builtin": "it ships with amprune, under Apache 2.0",
    "self": "what the dense model wrote itself, under that model's licence",
}
_AGAIN = "the record is damaged: recover the model again"


class TrainingData(TypedDict):
    """What a model was trained on; the record holds more, which nothing depends on."""

    name: str
    training: int
    tokens: int
    validation: int


class _LaterSettings(TypedDict, total=False):
    """What records of before the preset `best` lack."""

    batch_tokens: int | None
    schedule: str


class TrainingSettings(_LaterSettings):
    """How a model was trained, as far as it is told; the record holds all settings."""

    full: bool
    load_in_4bit: bool
    lora_rank: int
    lora_alpha: float
    learning_rate: float
    epochs: float
    max_steps: int | None
    batch_size: int
    gradient_accumulation: int | None
    max_length: int
    packing: bool
    temperature: float
    teacher_weight: float


@dataclass(frozen=True)
class Recovery:
    """The content of `recovery.json`."""

    source: str = field(metadata={"entry": "recovered_from"})
    """What was trained."""
    data: TrainingData
    settings: TrainingSettings
    teacher: str | None
    steps: int
    before: float | None = field(metadata={"entry": "validation_before"})
    """Validation loss before the training; None without samples held out."""
    after: float | None = field(metadata={"entry": "validation_after"})
    rounding: float
    """What storing the trained weights moved the logits by: a root mean square, in standard deviations."""
    validation: Validated = "loss"
    dense: str | None = None
    """The MODEL that was pruned."""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """The records of the trainings before this one, in their order."""
    sha256: dict[str, str] | None = None
    """Of each tensor that was stored; None of a record that was written before there were any."""


def is_recovered(folder: Path) -> bool:
    """Tells whether a checkpoint says that it was trained after pruning."""
    return (folder / RECORDS / RECORD).is_file()


def read_recovery(folder: Path) -> Recovery:
    """Reads the record that a recovered checkpoint carries; raises RecoveryError where it is missing or damaged."""
    return read(Recovery, folder / RECORDS / RECORD, error=RecoveryError, remedy=_AGAIN, format=1)


def earlier(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of the trainings that a checkpoint went through, in their order, without hashes."""
    if not is_recovered(folder):
        return []
    read_recovery(folder)
    record = read_object(folder / RECORDS / RECORD)
    return [*record.pop("earlier", []), {name: value for name, value in record.items() if name != "sha256"}]


@dataclass(frozen=True)
class TrainingLog:
    """The content of `training.jsonl`: losses by step."""

    training: tuple[tuple[int, float], ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    tokens_per_second: float | None = None
    """The median over the logged steps."""


def read_training_log(folder: Path) -> TrainingLog:
    """Reads the log that a recovered checkpoint carries."""
    entries = read_log(folder / RECORDS / LOG)
    training, validation = (
        tuple(sorted((int(entry["step"]), float(entry[name])) for entry in entries if _is_number(entry.get(name))))
        for name in ("loss", "validation_loss")
    )
    speeds = [float(entry["tokens_per_second"]) for entry in entries if _is_number(entry.get("tokens_per_second"))]
    return TrainingLog(training, validation, statistics.median(speeds) if speeds else None)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads a training log but for lines that are damaged or half-written; empty where there is none."""
    entries = []
    try:
        check_readable(path, error=CheckpointError, most=MOST)
        text = path.read_text(encoding="utf-8", errors="replace")
    except (CheckpointError, OSError):
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and _is_number(entry.get("step")):
            entries.append(entry)
    return entries


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def training_sentences(recovery: Recovery) -> tuple[str, ...]:
    """Says how a model was trained, what it did to the validation, and what storing the result cost."""
    said = list(recipe(recovery))
    if recovery.before is not None and recovery.after is not None:
        held, taught = recovery.data["validation"], recovery.validation == "divergence"
        samples = f"{held:,} sample{'' if held == 1 else 's'} held out"
        what = "Divergence from the teacher" if taught else "Validation loss"
        said.append(f"{what}: {recovery.before:#.4g} before the training, {recovery.after:#.4g} after it ({samples}).")
    amount = f"{recovery.rounding:.1e} of their standard deviation, root mean square" if recovery.rounding else "0"
    if recovery.settings["full"]:
        said.append(f"Rounding the trained weights to the checkpoint's dtype moved the logits by {amount}.")
    else:
        said.append(
            "The adapters are merged into the weights: the logits equal those of the model with its adapters but for "
            f"rounding to the checkpoint's dtype ({amount})."
        )
    return tuple(said)


def recipe(recovery: Recovery) -> tuple[str, ...]:
    """Says how a model was trained, how often before, and by whom it was taught."""
    settings, data, teacher = recovery.settings, recovery.data, recovery.teacher
    passes = "" if settings["max_steps"] is not None else f" ({settings['epochs']:g} passes over the data)"
    samples = "packed sequences" if settings["packing"] else "samples"
    falls = "a twentieth" if settings.get("schedule") == "cosine" else "0"
    steps = f"{recovery.steps:,} step{'' if recovery.steps == 1 else 's'}"
    tokens = settings.get("batch_tokens")
    batch = (
        f"{settings['batch_size']} x {settings['gradient_accumulation'] or 1} on each device"
        if tokens is None else f"about {tokens:,} tokens"
    )  # fmt: skip
    origin = "" if recovery.dense else f" from {recovery.source}"  # else the card says it, and what lay between is gone
    trained = (
        f"Trained{origin} by {method(recovery)} on {data['training']:,} {samples} of {data['name']} "
        f"({data['tokens']:,} tokens, at most {settings['max_length']:,} in one): {steps} of "
        f"{batch}{passes}, at a learning rate of {settings['learning_rate']:g} that falls to {falls}."
    )
    said = [*_before(recovery), trained]
    if teacher is not None:
        if Path(teacher).expanduser().is_absolute():  # where on this machine a model lies is left out: cards are shared
            teacher = Path(teacher).name
        said.append(
            f"Taught by {teacher}: {100 * settings['teacher_weight']:g} % of the loss is the divergence from its "
            f"next-token distributions, at a temperature of {settings['temperature']:g}; the rest is that of the data."
            if settings["teacher_weight"] < 1
            else f"Taught by {teacher}: the loss is the divergence from its next-token distributions and nothing else."
        )
    return tuple(said)


def _before(recovery: Recovery) -> list[str]:
    """Says which trainings came before this one."""
    told = []
    for record in recovery.earlier:
        before = parse(Recovery, record, where="earlier", error=RecoveryError, remedy=_AGAIN, format=1)
        told.append(
            f"Before that: {method(before)} on {before.data['training']:,} samples of {before.data['name']}, "
            f"{before.steps:,} steps."
        )
    return told


def method(recovery: Recovery) -> str:
    """Says what was trained: adapters, or every weight."""
    settings = recovery.settings
    if settings["full"]:
        return "full fine-tuning"
    bits = ", frozen weights in four bits" if settings["load_in_4bit"] else ""
    return f"LoRA (rank {settings['lora_rank']}, alpha {settings['lora_alpha']:g}{bits})"


def data_sentence(recovery: Recovery) -> str:
    """Says that the licence of the training data holds for the model as well."""
    names = str(recovery.data["name"]).split(", ")
    notes = [f"{name}: {_LICENCES[name]}" if names[1:] else _LICENCES[name] for name in names if name in _LICENCES]
    told, apply = " and ".join(names), "licences apply" if names[1:] else "licence applies"
    known = f" ({'; '.join(notes)})" if notes else ""
    return f"It was trained on {told}, whose {apply} to it as well{known}."
