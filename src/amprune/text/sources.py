"""What `--calibration` and `--data` name: one source of text or several, and how much of each is taken.

A source is `alpaca`, `mixed`, `builtin`, a file or folder, `self` (what the dense model writes, own.py) or
`hub:OWNER/SET[/CONFIG][:SPLIT]`; behind it may stand its weight, as in `self:0.5`.
"""

import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from amprune.errors import CalibrationError, reason
from amprune.text.files import Record
from amprune.text.own import Author
from amprune.text.records import file_of_one, read_records

logger = logging.getLogger(__name__)
SELF, HUB = "self", "hub:"
_BUFFER = 1000
"""Rows of a stream that are shuffled at a time."""
_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.\-\[\]%]+))?")

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class TextSource:
    """A source by its name, and its share of the text, against the weights of the others."""

    name: str
    weight: float = 1.0

    @property
    def endless(self) -> bool:
        """Whether there is always more of it, or more than anyone wants to read."""
        return self.name == SELF or self.name.startswith(HUB)


def parse_sources(given: object, option: str) -> tuple[TextSource, ...]:
    """Reads one source or a tuple of several; none of a list of texts."""
    if isinstance(given, str | os.PathLike):
        return (_parse_one(given, option),)
    if not isinstance(given, tuple):
        return ()
    found = tuple(_parse_one(one, option) for one in given)
    names = [source.name for source in found]
    if not found:
        raise CalibrationError(f"{option} names no set; give alpaca, mixed, builtin, self, hub:OWNER/SET or a file")
    if double := next((name for name in names if names.count(name) > 1), None):
        raise CalibrationError(f"{option} names {double} twice; give it once, with the sum of the weights")
    return found


def _parse_one(given: object, option: str) -> TextSource:
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else ""
    name, colon, weight = text.rpartition(":")
    if colon and not Path(text).expanduser().exists() and re.fullmatch(r"[-+]?[\d.]+(e-?\d+)?|nan|inf", weight):
        if not 0 < float(weight) < math.inf:
            raise CalibrationError(f"{option} gives {name} the weight {weight}, expected a positive number")
        text = name
    else:
        weight = "1"
    if not text.strip():
        raise CalibrationError(f"{option} names a set without a name; give alpaca, mixed, builtin, self or a file")
    if text.startswith(HUB) and not _HUB_NAME.fullmatch(text):
        raise CalibrationError(f"{option} is {text!r}, expected hub:OWNER/SET, hub:OWNER/SET/CONFIG:SPLIT at most")
    return TextSource(text, float(weight))


def names_of(sources: Iterable[TextSource]) -> str:
    """Returns what several sources are called together; of files without their folders."""
    return ", ".join(Path(one.name).name if file_of_one(one.name) else one.name for one in sources)


def files_of(given: object) -> tuple[Path, ...]:
    """Returns the files that sets are read from, where they are such."""
    one = isinstance(given, str | os.PathLike)
    sources = parse_sources(given, "the set") if one or isinstance(given, tuple) else ()
    return tuple(file for source in sources for file in file_of_one(source.name))


def check_sources(given: object, option: str) -> None:
    """Reads what can be read early, so that a missing or damaged file is told of before anything is computed."""
    if not (sources := parse_sources(given, option)):
        read_records(given, option=option)  # type: ignore[arg-type]
    for source in sources:
        if not source.endless:
            read_records(source.name, option=option)


def stream(source: TextSource, seed: int, author: Author | None, wanted: float, option: str) -> Iterator[Record]:
    """Yields the records of a source in a random order; of `self` and the hub as they are made or fetched.

    `wanted` is about how many tokens are, for the one who writes them.
    """
    if source.name == SELF:
        if author is None:
            raise CalibrationError(f"{option} self is text that the dense model writes, and none is named; give it by "
                                   "--teacher")  # fmt: skip
        yield from author.records(wanted)
    elif source.name.startswith(HUB):
        yield from _hub(source.name, seed, option)
    else:
        _, records = read_records(source.name, option=option)
        yield from random.Random(seed).sample(records, len(records))


def gather(
    sources: Sequence[TextSource],
    wanted: int | None,
    draw: Callable[[TextSource, float], Iterator[_Item]],
    size: Callable[[_Item], int],
    what: str,
) -> list[list[_Item]]:
    """Draws from sources, one after another, so much of each as its weight says.

    Each is asked for its share of what is still wanted; what it lacks, those after it give. Without `wanted` each gives
    all. `size` is that of an item, in `what`: tokens or samples. Warns where fewer came in all.
    """
    found: list[list[_Item]] = []
    left, weights = math.inf if wanted is None else float(wanted), [source.weight for source in sources]
    for index, source in enumerate(sources):
        share = left * weights[index] / sum(weights[index:])
        items, came = [], 0
        for item in draw(source, share) if share > 0 else ():
            items.append(item)
            came += size(item)
            if came >= share:
                break
        found.append(items)
        left -= came
    if wanted is not None and left > 0:
        counts = (f"{sum(map(size, items)):,} of {source.name}" for source, items in zip(sources, found, strict=True))
        logger.warning("%s %s were asked for, %s came: %s", f"{wanted:,}", what, f"{wanted - left:,.0f}",
                       ", ".join(counts))  # fmt: skip
    return found


def _hub(name: str, seed: int, option: str) -> Iterator[Record]:
    import datasets

    matched: Any = _HUB_NAME.fullmatch(name)
    owner, config, split = matched.groups()
    try:
        rows = datasets.load_dataset(owner, config, split=split or "train", streaming=True)
        for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=_BUFFER), 1):
            yield f"row {number}", row
    except Exception as error:  # network failures come in many types
        raise CalibrationError(
            f"{option} {name} cannot be read from the hub ({reason(error)}); its name is hub:OWNER/SET/CONFIG:SPLIT, "
            "of which CONFIG and SPLIT may be left out; without a network use mixed, self or a file of your own"
        ) from error
