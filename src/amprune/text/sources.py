"""What `--calibration` and `--data` name: one source of text or several, each with a weight. Nothing is read here.

alpaca  mixed  builtin  self  hub:OWNER/SET[/CONFIG][:SPLIT]  PATH      and of each, behind a colon, its weight
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amprune.errors import CalibrationError

OWN = "self"
"""Text that the dense model writes."""
HUB = "hub:"
NAMED = ("alpaca", "mixed", "builtin", OWN)
"""Sources that are no files."""
_KINDS = "alpaca, mixed, builtin, self, hub:OWNER/SET or the path of a file"
_HUB = re.compile(r"hub:(?P<set>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/:]+))?(?::(?P<split>[^:]+))?")


@dataclass(frozen=True)
class TextSource:
    """A set by its name, and how much of it is taken against the weights of the others."""

    name: str
    weight: float = 1.0

    @property
    def shown(self) -> str:
        """What it is called where a person reads it: of a path, the file's name."""
        return self.name if self.name in NAMED or self.from_hub else Path(self.name).name

    @property
    def from_hub(self) -> bool:
        """Whether it is a data set of the hub, read as a stream."""
        return self.name.startswith(HUB)

    @property
    def is_endless(self) -> bool:
        """Whether somebody has to say how much of it is taken."""
        return self.name == OWN or self.from_hub

    @property
    def files(self) -> tuple[Path, ...]:
        """The file or folder that it is read from, where it is one."""
        return () if self.name in NAMED or self.from_hub else (Path(self.name).expanduser(),)


@dataclass(frozen=True)
class Amount:
    """How much text is wanted; None is without a limit of that kind."""

    samples: int | None = None
    tokens: int | None = None

    def share(self, part: float) -> "Amount":
        """Returns a part of it; numbers are rounded up, so that a source of any weight is asked for something."""
        wanted = (self.samples, self.tokens)
        return Amount(*(None if value is None else math.ceil(value * part - 1e-9) for value in wanted))

    def less(self, samples: int, tokens: int) -> "Amount":
        """Returns what is left of it."""
        left = ((self.samples, samples), (self.tokens, tokens))
        return Amount(*(None if value is None else max(0, value - taken) for value, taken in left))

    def met_by(self, samples: int, tokens: int) -> bool:
        """Tells whether so much is enough."""
        pairs = ((self.samples, samples), (self.tokens, tokens))
        return any(value is not None and taken >= value for value, taken in pairs)


def parse_sources(value: object, option: str) -> tuple[TextSource, ...]:
    """Reads a source or a tuple of several, as an option or a recipe gives them; of anything else there are none.

    What stands behind the last colon is a weight where it is a number and no file is called so.
    """
    if isinstance(value, str | os.PathLike):
        return (_parsed(value, option),)
    if not isinstance(value, tuple):
        return ()
    if not value:
        raise CalibrationError(f"{option} names no source of text; give {_KINDS}")
    found = tuple(_parsed(one, option) for one in value)
    names = [source.name for source in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CalibrationError(f"{option} names {twice[0]} twice; give it once, with the sum of the weights")
    return found


def parse_hub(name: str, option: str) -> tuple[str, str | None, str]:
    """Returns the id of a data set, its configuration where one is named, and its split."""
    if (found := _HUB.fullmatch(name)) is None:
        raise CalibrationError(
            f"{option} {name}: expected hub:OWNER/SET, with /CONFIG or :SPLIT behind it where the set has several"
        )
    return found["set"], found["config"], found["split"] or "train"


def shares(sources: Sequence[TextSource]) -> list[float]:
    """Returns which part of what is still wanted each source is asked for: its weight of those from it on."""
    return [one.weight / sum(other.weight for other in sources[place:]) for place, one in enumerate(sources)]


def _parsed(value: object, option: str) -> TextSource:
    if not isinstance(value, str | os.PathLike):
        raise CalibrationError(f"{option} names a {type(value).__name__} as a source of text; give {_KINDS}")
    text = os.fspath(value)
    head, colon, tail = text.rpartition(":")
    weight = _number(tail) if colon and isinstance(value, str) and not os.path.exists(Path(text).expanduser()) else None
    if weight is None and head in NAMED:
        raise CalibrationError(f"{option} {text}: the weight of {head} is {tail!r}, expected a number such as 0.5")
    source = TextSource(text) if weight is None else TextSource(head, weight)
    if not source.name.strip():
        raise CalibrationError(f"{option} {text!r} names no source of text; give {_KINDS}")
    if not 0 < source.weight < math.inf:
        raise CalibrationError(f"{option} {text}: the weight is {tail}, expected a number above 0 such as 0.5")
    if source.from_hub:
        parse_hub(source.name, option)
    return source


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
