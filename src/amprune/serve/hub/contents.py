"""What goes to the hub: files of a folder, without paths of this machine; and what an earlier push left there."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from amprune.errors import PushError
from amprune.model.files import WEIGHT_INDEX, weight_files
from amprune.model.writer import LOADED, RECORDS, WEIGHT_SUFFIXES
from amprune.prove.card import CARD
from amprune.records import parse_yaml, read_text, resolved

_LICENCES = ("license*", "licence*", "copying*", "notice*", "use_policy*")
_KINDS: dict[str, tuple[str, ...]] = {
    "": (
        "config.json", *LOADED, "tokenizer*.json", "chat_template*", "vocab*.json", "normalizer.json", "*.tiktoken",
        "sentencepiece*.model", "*.bpe.model", "preprocessor_config.json", "processor_config.json",
        "quantize_config.json", "modules.json", "config_sentence_transformers.json", "*.jinja", "tokenization_*.py",
        "configuration_*.py", "modeling_*.py", "*.gguf", CARD.lower(), *_LICENCES,
    ),
    "additional_chat_templates": ("*.jinja",),
    RECORDS: (
        "plan.json", "verification.json", "reconstruction.json", "recovery.json", "training.jsonl", "quantization.json",
        "evaluation.json", "recipe.yaml", "scores.safetensors", "report.md", "report.html",
    ),
    f"{RECORDS}/figures": ("*.svg", "*.png"),
}  # fmt: skip
"""By folder, the names in lower case of what goes beside the weights: nothing else does, whatever lies there."""
_INDICES = ("*.index*.json",)
"""Of weights; one goes only where it is read."""
_TRAINING = ("trainer_state.json",)


def what_goes(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the paths of the files that go, and of those that do not; hidden ones are in neither.

    Of the weights those go that transformers loads, with their index.
    """
    weights = _weights(folder)
    paths = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    shown = [path for path in paths if not _is_hidden(path)]
    kept = [path for path in shown if path in weights or _is_known(path)]
    return kept, [path for path in shown if path not in kept]


def left_behind(remote: Sequence[str], sent: Collection[str]) -> list[str]:
    """Returns the files of a repository that belong to another model than the one that is sent.

    These are weights, indices, config, tokenizer and records under other names; licences and whatever else lies there
    are none of them.
    """
    known = [path for path in remote if not _is_hidden(path) and (_is_known(path) or _is_weight(path))]
    return [path for path in known if path not in sent and not _matches(path, _LICENCES)]


def _weights(folder: Path) -> set[str]:
    found = weight_files(folder)
    first, names = found[0]
    index = WEIGHT_INDEX if first.suffix == ".safetensors" else "pytorch_model.bin.index.json"
    return {file.name for file, _ in found} | ({index} if names is not None else set())


def _is_known(path: str) -> bool:
    return _matches(path, _KINDS.get(path.rpartition("/")[0], ())) and not _matches(path, (*_INDICES, *_TRAINING))


def _is_weight(path: str) -> bool:
    """Tells whether loaders would take the file for weights, or for where weights lie."""
    return "/" not in path and (Path(path).suffix in WEIGHT_SUFFIXES or _matches(path, _INDICES))


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _matches(path: str, patterns: Sequence[str]) -> bool:
    name = path.rpartition("/")[2].lower()
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# Paths of this machine

_TAIL = r"(?:/[^\s\"'`<>()|\\]*|(?!\w))"
"""The rest of a path in running text."""


def shortened_files(folder: Path, paths: Iterable[str]) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Returns what names a path of this machine, of card, records and configs, with the last name in its place.

    Beside each content stand the fields, or the lines, that differ from the file on disk. A path is one of this
    machine if it is the whole value of a field, such as `source` in `evaluation.json`, or lies in the folder of the
    user, of OUT or of the process. Files of which nothing differs are left out.
    """
    texts = {path: _read(folder / path) for path in paths if _speaks_of_places(path)}
    fields = {path: list(_fields_of(path, text)) for path, text in texts.items()}
    whole = {value for found in fields.values() for _, value in found if _is_absolute(value)}
    pattern = _pattern(folder, whole)
    changed = {}
    for path, text in texts.items():
        where = tuple(field for field, value in fields[path] if pattern.search(value))
        content = pattern.sub(_last_name, text)
        if content != text:
            changed[path] = content.encode(), where
    return changed


def _speaks_of_places(path: str) -> bool:
    """Tells whether a file says how a model was made: card, records and configs, but no vocabulary and no code."""
    record = path.startswith(f"{RECORDS}/") and path.endswith((".json", ".jsonl", ".yaml", ".md", ".html"))
    return record or path == CARD or ("/" not in path and path.endswith("config.json"))


def _read(file: Path) -> str:
    return read_text(file, error=PushError, hint="; make it again, or remove it")


def _fields_of(path: str, text: str) -> Iterator[tuple[str, str]]:
    """Yields the strings of a JSON file by field, and those of any other by line."""
    if path.endswith(".yaml"):
        try:
            yield from _strings(parse_yaml(text), "")
        except ValueError as error:
            raise PushError(f"{path} is damaged ({error}); make it again, or remove it") from error
        return
    if not path.endswith((".json", ".jsonl")):
        yield from ((f"line {number}", line) for number, line in enumerate(text.splitlines(), 1))
        return
    documents = [text] if path.endswith(".json") else text.splitlines()
    for number, document in enumerate(documents, 1):
        try:
            content = json.loads(document) if document.strip() else None
        except (ValueError, RecursionError) as error:
            if path.endswith(".jsonl"):
                continue  # a log may end in half a line
            raise PushError(f"{path} is damaged ({error}); make it again, or remove it") from error
        yield from _strings(content, "" if path.endswith(".json") else f"line {number}")


def _strings(content: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield where, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _strings(value, f"{where}.{name}".lstrip("."))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _strings(value, f"{where}[{index}]")


def _is_absolute(value: str) -> bool:
    """Tells whether a value is a path with folders in front of its last name."""
    path = Path(value)
    return value.startswith(("/", "~/")) and "\n" not in value and len(path.parts) > 2


def _pattern(folder: Path, whole: Iterable[str]) -> re.Pattern[str]:
    """Matches the given paths, and every path in the folders that this process is at home in."""
    near = (folder.absolute(), folder.absolute().parent, Path.cwd())
    found = [place for path in near for place in (path, resolved(path)) if len(place.parts) > 2]
    places = {str(place) for place in (*found, Path.home()) if place != Path("/")}
    for value in whole:
        places |= {value.rstrip("/"), json.dumps(value.rstrip("/"))[1:-1]}  # as it stands in a JSON file, too
    options = "|".join(_option(place) for place in sorted(places, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{options}){_TAIL}")


def _option(place: str) -> str:
    """A single name such as /root is a path of this machine only with something behind it."""
    return re.escape(place) + (r"(?=/\w)" if place.count("/") == 1 else "")


def _last_name(found: re.Match[str]) -> str:
    return found[0].rstrip("/").rpartition("/")[2]
