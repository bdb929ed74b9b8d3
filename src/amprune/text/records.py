"""Records of instructions, chats or plain text, from wherever they lie, as prompts and responses."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from amprune.errors import CalibrationError, reason
from amprune.records import read_text

ALPACA_DATASET = "yahma/alpaca-cleaned"
_SHIPPED = {"builtin": ("builtin.jsonl",), "mixed": ("builtin.jsonl", "mixed.jsonl")}
"""Sets that ship with the package, and their files."""
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

Record = tuple[str, Mapping[str, Any]]
"""Where a record stands, for messages, and its fields."""


def read_records(
    source: str | os.PathLike[str] | Sequence[str], *, option: str = "--calibration"
) -> tuple[str, list[Record]]:
    """Reads `alpaca`, `mixed`, `builtin`, a .json, .jsonl, .parquet or .txt file, or a sequence of texts.

    Returns its name and its records but for blank texts. `option` is how the command line calls the source.
    """
    records: Iterable[Record]
    if not isinstance(source, (str, os.PathLike)):
        name, records = "texts", [(f"text {number}", {"text": text}) for number, text in enumerate(source, 1)]
    elif source == "alpaca":
        name, records = "alpaca", _alpaca(option)
    elif source in _SHIPPED:
        name, folder = str(source), resources.files("amprune") / "data"
        files = [(file, (folder / file).read_text(encoding="utf-8")) for file in _SHIPPED[name]]
        records = [record for file, text in files for record in _json_lines(text, file)]
    else:
        name, records = Path(source).name, _file(source, option)
    return name, [one for one in records if not isinstance(text := one[1].get("text"), str) or text.strip()]


def file_of(source: object) -> tuple[Path, ...]:
    """Returns the file that a set is read from, where it is one."""
    named = isinstance(source, str | os.PathLike) and source != "alpaca" and source not in _SHIPPED
    return (Path(str(source)).expanduser(),) if named else ()


def _file(source: str | os.PathLike[str], option: str) -> list[Record]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError(
            f"no {option.lstrip('-')} set {str(source)!r}: give alpaca, mixed, builtin or the path of a "
            f"{', '.join(_SUFFIXES)} file"
        )
    if (kind := path.suffix.lower()) not in _SUFFIXES:
        raise CalibrationError(f"{path}: unknown type of file; expected one of {', '.join(_SUFFIXES)}")
    if kind == ".parquet":
        records = _parquet(path)
    else:
        text = read_text(path, error=CalibrationError, encoding="utf-8-sig", most=None)
        if kind == ".txt":
            records = [(place, {"text": line}) for place, line in _lines(text)]
        else:
            records = _json_lines(text, str(path)) if kind == ".jsonl" else _json(text, path)
    if not records:
        raise CalibrationError(f"{path} is empty; {option} needs at least one sample")
    return records


def _lines(text: str) -> Iterable[tuple[str, str]]:
    """Yields the place and content of each line that is not blank; `str.splitlines` would also cut at form feeds."""
    return ((f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _json_lines(text: str, where: str) -> list[Record]:
    records = []
    for place, line in _lines(text):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{where}, {place}: broken JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # numbers and depths out of bounds
            raise CalibrationError(f"{where}, {place}: broken JSON ({error})") from None
        records.append((place, _as_record(record, f"{where}, {place}")))
    return records


def _as_record(record: object, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: a {type(record).__name__}, expected an object with named fields")
    return record


def _json(text: str, path: Path) -> list[Record]:
    try:
        content = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); is it JSON lines? "
                               "Then name it .jsonl") from None  # fmt: skip
    except (ValueError, RecursionError) as error:  # numbers and depths out of bounds
        raise CalibrationError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, list):
        raise CalibrationError(
            f"{path} holds a {type(content).__name__}, expected a list of records; if it is JSON lines, name it .jsonl"
        )
    return [(f"record {n}", _as_record(record, f"{path}, record {n}")) for n, record in enumerate(content, 1)]


def _parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _alpaca(option: str) -> Iterable[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(ALPACA_DATASET, split="train")
    except Exception as error:  # network failures come in many types
        raise CalibrationError(
            f"the set alpaca is {ALPACA_DATASET} on the hub, which cannot be reached ({reason(error)}); use {option} "
            f"mixed or builtin, which ship with amprune, or {option} PATH for a file of your own"
        ) from error
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


@dataclass(frozen=True)
class Rendered:
    """A record as text."""

    prompt: str
    """Empty of plain text."""
    response: str
    add_special_tokens: bool
    """Whether the tokenizer puts its own around it; a chat template has put them in."""


def render(record: Mapping[str, Any], tokenizer: Any, where: str, *, prompts_only: bool = False) -> Rendered:
    """Writes a record in Alpaca's template, by the tokenizer's chat template, or as the plain text that it is.

    With `prompts_only` an Alpaca record needs no output.
    """
    if "messages" in record:
        return _chat(tokenizer, record["messages"], where)
    if "instruction" in record:
        instruction, context = _field(record, "instruction", where), _field(record, "input", where, default="")
        template = _ALPACA_WITH_INPUT if context.strip() else _ALPACA_WITHOUT_INPUT
        output = "" if prompts_only else _field(record, "output", where)
        return Rendered(template.format(instruction=instruction, input=context), output, True)
    if "text" in record:
        return Rendered("", _field(record, "text", where), True)
    raise CalibrationError(
        f"{where}: has the fields {sorted(record)}, expected instruction and output (Alpaca), text, or messages"
    )


def _field(record: Mapping[str, Any], name: str, where: str, *, default: str | None = None) -> str:
    value = record.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        found = f"is {kind}" if name in record else "is missing"
        raise CalibrationError(f"{where}: field {name!r} {found}, expected text")
    return value


def _chat(tokenizer: Any, messages: object, where: str) -> Rendered:
    """Renders a chat; the response is its last turn where that is the assistant's."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise CalibrationError(f"{where}: messages is no list of objects with role and content, each a text")
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where}: has messages, but the model's tokenizer has no chat template; use text instead"
        )
    answered = messages[-1].get("role") == "assistant"
    turns = messages[:-1] if answered else messages
    try:
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)) if turns else ""
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False)) if answered else prompt
    except Exception as error:  # templates raise what they like
        raise CalibrationError(f"{where}: the chat template refuses these messages: {error}") from error
    if not whole.startswith(prompt):  # a template may write the last turn otherwise than it opens it
        prompt = prompt[: next(i for i, pair in enumerate(zip(prompt, whole + "\0", strict=False)) if len({*pair}) > 1)]
    return Rendered(prompt, whole[len(prompt) :], False)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
