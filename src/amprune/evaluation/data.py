"""What models are measured on: texts and task files, from a folder or from the hub, checked before use."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amprune.errors import EvaluationError, reason
from amprune.records import check_readable


@dataclass(frozen=True)
class Text:
    """A text for perplexity."""

    name: str
    content: str
    sha256: str
    """Of `content`."""


@dataclass(frozen=True)
class TaskData:
    """A task's items as a JSON-lines file."""

    file: Path
    split: str
    sha256: str


@dataclass(frozen=True)
class _TaskFile:
    file: str
    split: str
    rows: int
    types: dict[str, type]
    answered: Callable[[dict[str, Any]], bool]
    """Tells whether a row has a right answer among its choices, which some splits keep secret."""


WIKITEXT = {
    "test": ("wiki.test.raw", "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"),
    "validation": ("wiki.valid.raw", "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7"),
}
"""The raw file of each split, and its SHA-256."""

_ARC: dict[str, type] = {"question": str, "choices": dict, "answerKey": str}


def _arc_answered(row: dict[str, Any]) -> bool:
    labels, texts = (row["choices"].get(name) for name in ("label", "text"))
    lists = isinstance(labels, list) and isinstance(texts, list)
    return lists and len(labels) == len(texts) and row["answerKey"] in labels


TASK_FILES = {
    "winogrande": _TaskFile(
        "winogrande_xl_validation.jsonl", "validation", 1267,
        {"sentence": str, "option1": str, "option2": str, "answer": str},
        lambda row: row["answer"] in ("1", "2") and "_" in row["sentence"],
    ),
    "hellaswag": _TaskFile(
        "hellaswag_validation.jsonl", "validation", 10042,
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
        lambda row: row["label"] in map(str, range(len(row["endings"]))),
    ),
    "arc_easy": _TaskFile("arc_easy_test.jsonl", "test", 2376, _ARC, _arc_answered),
    "arc_challenge": _TaskFile("arc_challenge_test.jsonl", "test", 1172, _ARC, _arc_answered),
    "piqa": _TaskFile(
        "piqa_validation.jsonl", "validation", 1838, {"goal": str, "sol1": str, "sol2": str, "label": int},
        lambda row: row["label"] in (0, 1),
    ),
}  # fmt: skip
"""Where a data folder keeps the paper's tasks, below `tasks/`; rows and fields are those of the hub's data sets."""


def load_wikitext(split: str = "test", *, data_dir: Path | None = None) -> Text:
    r"""Returns a split of WikiText-2 (raw) as the hub's rows joined by two newlines, the input of SliceGPT's procedure.

    The raw file in `data_dir/wikitext2` gives the same text: a row a line, an empty row for a blank line, every other
    row ending in its newline.
    """
    file, sha256 = WIKITEXT[split]
    rows = _hub_rows(split) if data_dir is None else _rows(data_dir / "wikitext2" / file, sha256)
    content = "\n\n".join(rows)
    return Text(f"wikitext2 {split}", content, _sha256(content.encode()))


def load_text(path: Path) -> Text:
    """Reads any text file, as it is."""
    try:
        content = _read(path).decode("utf-8")
    except UnicodeDecodeError:
        content = ""
    if not content.strip():
        raise EvaluationError(f"{path} is empty or no UTF-8 text; perplexity needs text")
    return Text(path.name, content, _sha256(content.encode()))


def find_task_data(task: str, splits: tuple[str, ...], data_dir: Path) -> TaskData | None:
    """Finds and checks a task's file in `data_dir/tasks`; None where it has none and the task is not of the paper.

    Of the splits on which the harness would evaluate the task, the first that is there counts.
    """
    folder = data_dir / "tasks"
    if (known := TASK_FILES.get(task)) is not None:
        path = folder / known.file
        content = _read(path)
        _check_fields(path, _json_lines(path, content), known)
        return TaskData(path, known.split, _sha256(content))
    for split in splits:
        if (path := folder / f"{task}_{split}.jsonl").is_file():
            content = _read(path)
            _json_lines(path, content)
            return TaskData(path, split, _sha256(content))
    return None


def _rows(path: Path, sha256: str) -> list[str]:
    content = _read(path)
    if (found := _sha256(content)) != sha256:
        raise EvaluationError(
            f"{path} is not the raw file of WikiText-2: {len(content):,} bytes with sha256 {found[:12]}..., expected "
            f"{sha256[:12]}...; fetch it again (wikitext-2-raw-v1), or measure it as any text with --text {path}"
        )
    lines = content.decode("utf-8").split("\n")
    return ["" if not line.strip() else f"{line}\n" for line in lines[:-1]]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hub_rows(split: str) -> list[str]:
    import datasets

    try:
        return list(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
    except Exception as error:  # network failures come in many types
        raise EvaluationError(
            f"WikiText-2 cannot be fetched from the hub ({reason(error)}); give --data-dir with a folder that holds "
            f"wikitext2/{WIKITEXT[split][0]}"
        ) from error


def _read(path: Path) -> bytes:
    if path.exists():
        check_readable(path, error=EvaluationError)
    try:
        return path.read_bytes()
    except OSError as error:
        beside = sorted(item.name for item in path.parent.iterdir()) if path.parent.is_dir() else []
        there = f"; {path.parent} holds {', '.join(beside[:8])}" if beside else f"; there is no folder {path.parent}"
        hint = "" if path.parent.is_dir() and beside else ", the folder that --data-dir names should hold it"
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}{there}{hint}") from error


def _json_lines(path: Path, content: bytes) -> dict[int, dict[str, Any]]:
    """Returns the rows by their line in the file."""
    rows = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}: not JSON ({error}); is the file truncated?") from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}, line {number}: a {type(row).__name__}, expected an object with fields")
        rows[number] = row
    if not rows:
        raise EvaluationError(f"{path} is empty")
    return rows


def _check_fields(path: Path, rows: dict[int, dict[str, Any]], known: _TaskFile) -> None:
    for number, row in rows.items():
        for name, kind in known.types.items():
            if name not in row:
                found = ", ".join(row)
                raise EvaluationError(f"{path}, line {number}: has no field {name!r}, only {found}")
            if not isinstance(row[name], kind):
                found, expected = type(row[name]).__name__, kind.__name__
                raise EvaluationError(f"{path}, line {number}: field {name!r} is a {found}, expected a {expected}")
        if not known.answered(row):
            raise EvaluationError(
                f"{path}, line {number}: has no right answer among its choices; is this the {known.split} split?"
            )
    if len(rows) != known.rows:
        raise EvaluationError(
            f"{path} has {len(rows):,} rows, the {known.split} split has {known.rows:,}; fetch it again, or use "
            "--limit on the whole file to evaluate fewer"
        )
