"""Which files of a checkpoint folder go to the hub, and which of a repository an earlier push left."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from amprune.model.files import weight_files
from amprune.model.writer import RECORDS, WEIGHT_SUFFIXES
from amprune.prove.card import CARD

_LICENCES = ("license*", "licence*", "copying*", "notice*", "use_policy*")
_KINDS: dict[str, tuple[str, ...]] = {
    "": ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "*.gguf", CARD.lower(), *_LICENCES),
    "additional_chat_templates": ("*.jinja",),
    RECORDS: ("*.json", "*.jsonl", "recipe.yaml", "scores.safetensors", "report.md", "report.html"),
    f"{RECORDS}/figures": ("*.svg", "*.png"),
}
"""By folder, the names in lower case of what goes beside the weights."""
_INDICES = ("*.index*.json",)
"""Of weights; one goes only where it is read."""
_TRAINING = ("trainer_state.json",)


def what_goes(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the paths of the files that go, and of those that do not; hidden ones are in neither.

    Of the weights those go that transformers loads, with their index.

    Raises:
        CheckpointError: the folder holds no weights.
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
    return [
        path
        for path in remote
        if path not in sent
        and not _is_hidden(path)
        and (_is_known(path) or _is_weight(path))
        and not _matches(path, _LICENCES)
    ]


def _weights(folder: Path) -> set[str]:
    found = weight_files(folder)
    first, names = found[0]
    index = "model.safetensors.index.json" if first.suffix == ".safetensors" else "pytorch_model.bin.index.json"
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
