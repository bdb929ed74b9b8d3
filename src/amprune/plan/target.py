"""What is aimed at in the place of a ratio, as a text: `params=100M`, `weight-bytes=4GiB` or `speedup=1.25x`."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast, get_args

from amprune.errors import PlanError, guess

Kind = Literal["params", "weight-bytes", "speedup"]

_FORMS = "params=100M, weight-bytes=4GiB or speedup=1.25x"
_DECIMAL, _BINARY = ("k", "m", "g", "t"), ("ki", "mi", "gi", "ti")
_UNITS: dict[Kind, dict[str, int]] = {
    "params": {"": 1, "k": 10**3, "m": 10**6, "b": 10**9},
    "weight-bytes": {"": 1, "b": 1}
    | {f"{unit}b": 10 ** (3 * power) for power, unit in enumerate(_DECIMAL, start=1)}
    | {f"{unit}b": 2 ** (10 * power) for power, unit in enumerate(_BINARY, start=1)},
    "speedup": {"": 1, "x": 1},
}
_ACCEPTED: dict[Kind, str] = {
    "params": "a number of parameters such as 500k, 100M, 1.1B or 100_000_000",
    "weight-bytes": "a size such as 900MB, 4GiB or 4294967296",
    "speedup": "a factor above 1 such as 1.25x or 1.25",
}


@dataclass(frozen=True)
class Target:
    """The most that may stay of parameters or of bytes of weights, or the speedup that is to be reached."""

    kind: Kind
    value: float
    """A whole number of parameters or bytes; a factor above 1."""

    def __str__(self) -> str:
        """Returns a text that `parse_target` reads."""
        return f"{self.kind}={self.value}"


def parse_target(text: str) -> Target:
    """Reads a target: parameters, bytes (MB are 10^6, MiB 2^20), or a speedup. Fractions of one are left out.

    Raises:
        PlanError: it is none; names the forms that are accepted.
    """
    name, equals, amount = (part.strip() for part in text.partition("="))
    if not equals:
        raise PlanError(f"the target {text!r} does not say of what, expected {_FORMS}")
    if name not in get_args(Kind):
        raise PlanError(f"the target {text!r} is of the unknown kind {name!r}; {guess(name, _UNITS)}expected {_FORMS}")
    kind = cast(Kind, name)
    found = re.fullmatch(r"(\d{1,3}(?:_\d{3})+|\d{1,18}(?:\.\d{1,9})?)\s*([a-z]*)", amount.lower())
    if found is None or found[2] not in _UNITS[kind]:
        raise PlanError(f"the target {text!r} has the value {amount!r}, expected {_ACCEPTED[kind]}")
    exact = Decimal(found[1].replace("_", "")) * _UNITS[kind][found[2]]
    value = float(exact) if kind == "speedup" else int(exact)
    if value <= 1 if kind == "speedup" else value < 1:
        raise PlanError(f"the target {text!r} asks for {amount}, expected {_ACCEPTED[kind]}")
    return Target(kind, value)
