"""`evaluation.json`: one record a measurement, kept by key, and the models that were measured."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from amprune.errors import EvaluationError
from amprune.records import Begun, Rule, parse, read_object, write_text

FORMAT = "amprune evaluation 1"
_COUNTED = Rule("a whole number of at least 0", lambda value: type(value) is int and value >= 0)


@dataclass(frozen=True)
class ModelEntry:
    """A model that was measured, as it was when it was measured."""

    name: str
    source: str
    """What the user called it: a folder, a hub id, an alias."""
    sha256: str
    """Of config.json and the weight files."""
    model_type: str
    dtype: str
    """Of most parameters on disk."""
    parameters: Annotated[int, _COUNTED]
    """Tied embeddings once."""
    weight_bytes: Annotated[int, _COUNTED]
    base_model: str | None = None
    license: str | None = None
    pruned: dict[str, Any] | None = None
    """Of a model that amprune pruned: `ratio_target`, `ratio_actual`, `shape_before`, `shape_after`, `provenance`."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured figure.

    Two records with the same `key` are the same measurement, of which the later one counts. A measurement leaves to the
    run that keeps its records what is common to them: `model`, `device`, `versions`, `time`.
    """

    model: str = field(default="", metadata={"needed": True})
    """The name of a `ModelEntry`."""
    measurement: str
    """perplexity, bits_per_byte, zero_shot, latency, memory, size or energy."""
    task: str
    """What was measured on: wikitext2, hellaswag, `batch 1, prompt 12, new 128`."""
    metric: str
    """perplexity, acc, acc_norm, total, prefill, decode, peak, parameters, ..."""
    value: Annotated[int | float, Rule("a number")]
    """Sizes are whole numbers, and written as such again."""
    unit: str
    n: int = 1
    """How many items (windows, questions, runs) the value is the mean of."""
    standard_error: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What decides the value beside model and data: part of the key."""
    seed: int | None = None
    items: tuple[float, ...] = ()
    """One figure an item, for paired comparisons: mean loss of a window, 0 or 1 of a question, seconds of a run."""
    items_hash: str | None = None
    """Identifies the items; two records are paired only where it is the same."""
    data: dict[str, Any] | None = None
    """Name and sha256 of the data."""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    time: str = ""
    """When it was measured, UTC, ISO 8601."""
    note: str | None = None
    """What a reader must know: a batch that was halved, how energy was estimated."""

    @property
    def key(self) -> str:
        """Identifies the measurement, whatever came of it."""
        settings = json.dumps(self.settings, sort_keys=True)
        return " | ".join((self.model, self.measurement, self.task, self.metric, self.device, settings))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; empty fields are left out."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), {}, "")}


@dataclass
class Evaluation:
    """The content of `evaluation.json`."""

    models: dict[str, ModelEntry] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    unfinished: Begun | None = None
    """A run that was interrupted: its `request`, and `done`, the tasks that it finished."""

    def add_model(self, entry: ModelEntry) -> None:
        """Adds a model, or finds it again.

        Raises:
            EvaluationError: another model has this name here.
        """
        known = self.models.get(entry.name)
        if known is not None and known.sha256 != entry.sha256:
            raise EvaluationError(
                f"the evaluation holds figures of another model named {entry.name!r} ({known.source}, sha256 "
                f"{known.sha256[:12]}..., now {entry.source}, {entry.sha256[:12]}...); give this one a name of its own "
                "(NAME=PATH), or write to another file"
            )
        self.models[entry.name] = entry

    def add(self, records: Iterable[Record]) -> None:
        """Adds records; one with the key of an older one takes its place."""
        for record in records:
            if not math.isfinite(record.value):
                raise EvaluationError(f"{record.key}: measured {record.value}, which is no figure")
            self.records[record.key] = record

    def of(self, model: str, measurement: str | None = None) -> list[Record]:
        """Returns the records of a model, in the order in which they were first measured."""
        found = (record for record in self.records.values() if record.model == model)
        return [record for record in found if measurement in (None, record.measurement)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return {
            "format": FORMAT,
            "models": [asdict(entry) for entry in self.models.values()],
            "records": [record.to_dict() for record in self.records.values()],
            "unfinished": self.unfinished,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all, a record a line: ten thousand items can still be compared by eye."""
        content = self.to_dict()
        lines = [f'{{"format": {json.dumps(FORMAT)},']
        for name in ("models", "records"):
            rows = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in content[name])
            lines.append(f'"{name}": [\n{rows}\n],')
        lines.append(f'"unfinished": {json.dumps(self.unfinished)}}}\n')
        write_text(Path(path), "\n".join(lines), error=EvaluationError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Reads a file.

        Raises:
            EvaluationError: it is missing, or no evaluation.
        """
        content = read_object(Path(path), error=EvaluationError)
        if (found := content.get("format")) != FORMAT:
            raise EvaluationError(f"{path} is no evaluation: its format is {found!r}, expected {FORMAT!r}")
        remedy = "the file is damaged: move it away, or write to another file"
        file = parse(_File, content, where=str(path), error=EvaluationError, remedy=remedy)
        return cls(
            models={entry.name: entry for entry in file.models},
            records={record.key: record for record in map(_as_now, file.records)},
            unfinished=_begun_as_now(file.unfinished),
        )


def _as_now(record: Record) -> Record:
    """Adds what a record of perplexity did not say before there was a choice."""
    if record.measurement != "perplexity" or "start_token" in record.settings:
        return record
    return replace(record, settings={**record.settings, "start_token": "first"})


def _begun_as_now(unfinished: Begun | None) -> Begun | None:
    if unfinished is None:
        return None
    return {"request": {"start_token": "first", **unfinished["request"]}, "done": unfinished["done"]}


@dataclass(frozen=True)
class _File:
    """What the file holds."""

    models: list[ModelEntry]
    records: list[Record]
    unfinished: Begun | None = None
