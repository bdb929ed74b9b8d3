"""Records of instructions, chats or plain text, from wherever they lie, as prompts and responses."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from amprune.errors import CalibrationError, reason
from amprune.running import in_time
from amprune.text.files import Record, json_lines, read_file
from amprune.text.sources import parse_sources

ALPACA_DATASET = "yahma/alpaca-cleaned"
_SHIPPED = {"builtin": ("builtin.jsonl",), "mixed": ("builtin.jsonl", "mixed.jsonl")}
"""Sets that ship with the package, and their files."""
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


def read_records(
    source: str | os.PathLike[str] | Sequence[str], *, option: str = "--calibration"
) -> tuple[str, list[Record]]:
    """Reads `alpaca`, `mixed`, `builtin`, a file or folder of records (see files.py), or a sequence of texts.

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
        records = [record for file, text in files for record in json_lines(text, file)]
    else:
        name, records = Path(source).name, read_file(source, option)
    return name, [one for one in records if not is_blank(one[1])]


def is_blank(record: Mapping[str, Any]) -> bool:
    """Tells whether a record is a text without a letter."""
    return isinstance(text := record.get("text"), str) and not text.strip()


def file_of(value: object, *, option: str = "--calibration") -> tuple[Path, ...]:
    """Returns the files that the sources of an option are read from, of those that are files."""
    return tuple(file for source in parse_sources(value, option) for file in source.files)


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
    if "messages" in record or "conversations" in record:
        return _chat(tokenizer, _messages(record, where), where, record.get("tools"))
    if "prompt" in record and isinstance(record["prompt"], list):
        return _chat(tokenizer, [*record["prompt"], *_listed(record.get("completion"))], where, record.get("tools"))
    for question, answer, known in _PAIRS:
        if question in record and (answer in record or question == "instruction"):
            asked, context = _field(record, question, where), _field(record, "input", where, default="")
            template = "{instruction}" if known is None else _ALPACA_WITH_INPUT if context.strip() else known
            output = "" if prompts_only else _field(record, answer, where)
            return Rendered(template.format(instruction=asked, input=context), output, True)
    if "text" in record:
        return Rendered("", _field(record, "text", where), True)
    raise CalibrationError(
        f"{where}: has the fields {sorted(record)}, expected messages or conversations (a chat), instruction and "
        "output (Alpaca), prompt and completion, question and answer, or text"
    )


_PAIRS: tuple[tuple[str, str, str | None], ...] = (
    ("instruction", "output", _ALPACA_WITHOUT_INPUT),
    ("prompt", "completion", None),
    ("prompt", "response", None),
    ("question", "answer", _ALPACA_WITHOUT_INPUT),
)
"""Fields of a prompt and its response, and the template of the prompt: Alpaca's, or none where it is whole."""
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
"""What ShareGPT calls who speaks."""


def _messages(record: Mapping[str, Any], where: str) -> object:
    """Returns the turns of a chat, of which those of ShareGPT are called otherwise."""
    turns = record["messages"] if "messages" in record else record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        return turns
    return [{"role": _ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in turns]


def _listed(turns: object) -> list[object]:
    return turns if isinstance(turns, list) else []


def _field(record: Mapping[str, Any], name: str, where: str, *, default: str | None = None) -> str:
    value = record.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        found = f"is {kind}" if name in record else "is missing"
        raise CalibrationError(f"{where}: field {name!r} {found}, expected text")
    return value


def _chat(tokenizer: Any, messages: object, where: str, tools: object) -> Rendered:
    """Renders a chat; the response is its last turn where that is the assistant's."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise CalibrationError(f"{where}: messages is no list of objects with role and content, each a text")
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where}: has messages, but the model's tokenizer has no chat template; use text instead"
        )
    answered = messages[-1].get("role") == "assistant"
    turns = messages[:-1] if answered else messages
    known: dict[str, Any] = {"tokenize": False} | ({"tools": tools} if isinstance(tools, list) and tools else {})
    prompt = ""
    try:
        with in_time(_SECONDS, "it"):
            if turns:
                prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, **known))
            whole = str(tokenizer.apply_chat_template(messages, **known)) if answered else prompt
    except Exception as error:  # templates raise what they like
        raise CalibrationError(f"{where}: the chat template refuses these messages: {error}") from error
    if not whole.startswith(prompt):  # a template may write the last turn otherwise than it opens it
        prompt = prompt[: next(i for i, pair in enumerate(zip(prompt, whole + "\0", strict=False)) if len({*pair}) > 1)]
    return Rendered(prompt, whole[len(prompt) :], False)


_SECONDS = 10.0
"""A template that takes longer for one chat never ends."""


def _is_message(message: object) -> bool:
    """Tells whether it is a turn: the content of one that calls tools may be null."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
