"""Calibration sets: named, seeded, hashed samples of token ids.

`alpaca` is the set of the paper, from the hub; `builtin` ships with the package; a path is the user's own text.
"""

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from amprune.errors import CalibrationError, reason

logger = logging.getLogger(__name__)

ALPACA_DATASET = "yahma/alpaca-cleaned"
_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of token ids, in the order in which they were drawn."""

    name: str
    samples: tuple[tuple[int, ...], ...]
    seed: int | None = None
    max_length: int | None = None
    prompts_only: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(map(len, self.samples))

    @property
    def sha256(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(json.dumps(self.samples, separators=(",", ":")).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Returns what a score file records of the set."""
        return {
            "name": self.name,
            "samples": len(self.samples),
            "tokens": self.tokens,
            "seed": self.seed,
            "max_length": self.max_length,
            "prompts_only": self.prompts_only,
            "sha256": self.sha256,
        }


def load_calibration(
    source: str | os.PathLike[str] | Sequence[str],
    tokenizer: Any,
    *,
    samples: int = 50,
    max_length: int = 512,
    prompts_only: bool = False,
    seed: int = 0,
) -> CalibrationSet:
    """Draws a seeded random sample of a set and tokenises it.

    Args:
        source: `alpaca`, `builtin`, a .json, .jsonl, .parquet or .txt file, or a sequence of texts.
        tokenizer: the model's own, as transformers loads it.
        samples: how many to draw, without replacement.
        max_length: tokens kept of each sample.
        prompts_only: leave out the response, as the released code of the paper does.
        seed: of the draw.

    Raises:
        CalibrationError: the set cannot be read, is malformed, or holds fewer samples.
    """
    for name, value in (("samples", samples), ("max_length", max_length)):
        if value < 1:
            raise CalibrationError(f"{name} is {value}, expected at least 1")
    name, records = _read(source)
    render = _renderer(tokenizer, prompts_only=prompts_only)
    usable = [(where, record) for where, record in records if not _blank(record)]
    if len(usable) < samples:
        smaller = f"--samples {len(usable)} or " if usable else ""
        raise CalibrationError(
            f"{name} holds {len(usable)} samples, but {samples} were asked for; give {smaller}a larger set"
        )
    places = [(f"{name}, {where}", record) for where, record in random.Random(seed).sample(usable, samples)]
    tokens = tuple(_encode(tokenizer, render(record, where), max_length, where) for where, record in places)
    return CalibrationSet(name=name, samples=tokens, seed=seed, max_length=max_length, prompts_only=prompts_only)


def _encode(tokenizer: Any, text: tuple[str, bool], max_length: int, where: str) -> tuple[int, ...]:
    """Tokenises one text; a chat template has put in its own special tokens."""
    content, special = text
    try:
        ids = tokenizer(content, add_special_tokens=special, truncation=True, max_length=max_length)["input_ids"]
    except Exception as error:  # tokenizers raise many types, for a lone surrogate for instance
        raise CalibrationError(f"{where}: the tokenizer refuses this sample: {error}") from error
    if not ids:
        raise CalibrationError(f"{where}: the tokenizer makes no token of this sample")
    return tuple(ids[:max_length])  # some tokenizers do not truncate to fewer than their special tokens


_Record = tuple[str, Mapping[str, Any]]


def _read(source: str | os.PathLike[str] | Sequence[str]) -> tuple[str, list[_Record]]:
    if not isinstance(source, (str, os.PathLike)):
        return "texts", [(f"text {number}", {"text": text}) for number, text in enumerate(source, 1)]
    if source == "alpaca":
        return "alpaca", list(_alpaca())
    if source == "builtin":
        text = (resources.files("amprune") / "data" / "builtin.jsonl").read_text(encoding="utf-8")
        return "builtin", _parse_lines(text, "builtin")
    path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError(
            f"no calibration set {str(source)!r}: give alpaca, builtin or the path of a {', '.join(_SUFFIXES)} file"
        )
    readers: dict[str, Callable[[Path], list[_Record]]] = {
        ".jsonl": lambda file: _parse_lines(_text(file), str(file)),
        ".json": _read_json,
        ".txt": lambda file: [(place, {"text": line}) for place, line in _lines(_text(file))],
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise CalibrationError(f"{path}: unknown type of file; expected one of {', '.join(_SUFFIXES)}")
    records = readers[path.suffix.lower()](path)
    if not records:
        raise CalibrationError(f"{path} is empty; a calibration set needs at least one sample")
    return path.name, records


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _lines(text: str) -> Iterable[tuple[str, str]]:
    """Yields the place and content of each line that is not blank; `str.splitlines` would also cut at form feeds."""
    return ((f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _parse_lines(text: str, where: str) -> list[_Record]:
    records = []
    for place, line in _lines(text):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{where}, {place}: broken JSON ({error.msg}, column {error.colno})") from None
        records.append((place, _as_record(record, f"{where}, {place}")))
    return records


def _as_record(record: object, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: a {type(record).__name__}, expected an object with named fields")
    return record


def _read_json(path: Path) -> list[_Record]:
    text = _text(path)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); is it JSON lines? "
                               "Then name it .jsonl") from None  # fmt: skip
    if not isinstance(content, list):
        raise CalibrationError(
            f"{path} holds a {type(content).__name__}, expected a list of records; if it is JSON lines, name it .jsonl"
        )
    return [(f"record {n}", _as_record(record, f"{path}, record {n}")) for n, record in enumerate(content, 1)]


def _read_parquet(path: Path) -> list[_Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _alpaca() -> Iterable[_Record]:
    import datasets

    try:
        rows = datasets.load_dataset(ALPACA_DATASET, split="train")
    except Exception as error:  # network failures come in many types
        raise CalibrationError(
            f"the calibration set alpaca is {ALPACA_DATASET} on the hub, which cannot be reached ({reason(error)}); "
            "use --calibration builtin, which ships with amprune, or --calibration PATH for a file of your own"
        ) from error
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _blank(record: Mapping[str, Any]) -> bool:
    """Tells an empty line of a text from a sample."""
    return "text" in record and isinstance(record["text"], str) and not record["text"].strip()


def _renderer(tokenizer: Any, *, prompts_only: bool) -> Callable[[Mapping[str, Any], str], tuple[str, bool]]:
    """Returns a function from a record to its text and whether special tokens are to be added."""

    def render(record: Mapping[str, Any], where: str) -> tuple[str, bool]:
        if "messages" in record:
            return _chat(tokenizer, record["messages"], where, prompts_only=prompts_only), False
        if "instruction" in record:
            return _alpaca_text(record, where, prompts_only=prompts_only), True
        if "text" in record:
            if prompts_only:
                raise CalibrationError(f"{where}: prompts_only needs records with a prompt, but this one is plain text")
            return _field(record, "text", where), True
        raise CalibrationError(
            f"{where}: has the fields {sorted(record)}, expected instruction and output (Alpaca), text, or messages"
        )

    return render


def _field(record: Mapping[str, Any], name: str, where: str, *, default: str | None = None) -> str:
    value = record.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        found = f"is {kind}" if name in record else "is missing"
        raise CalibrationError(f"{where}: field {name!r} {found}, expected text")
    return value


def _alpaca_text(record: Mapping[str, Any], where: str, *, prompts_only: bool) -> str:
    instruction, context = _field(record, "instruction", where), _field(record, "input", where, default="")
    template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA_WITHOUT_INPUT
    prompt = template.format(instruction=instruction, input=context)
    return prompt if prompts_only else prompt + _field(record, "output", where)


def _chat(tokenizer: Any, messages: object, where: str, *, prompts_only: bool) -> str:
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise CalibrationError(f"{where}: messages is no list of objects with role and content, each a text")
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where}: has messages, but the model's tokenizer has no chat template; use text instead"
        )
    if prompts_only and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise CalibrationError(f"{where}: prompts_only leaves nothing of messages that are one assistant turn")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompts_only))
    except Exception as error:  # templates raise what they like
        raise CalibrationError(f"{where}: the chat template refuses these messages: {error}") from error


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
