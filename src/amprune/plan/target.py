"""What is aimed at instead of a ratio: `params=100M`, `weight-bytes=4GiB` or `speedup=1.25x`.

Parameters and bytes of weights become the most parameters that may stay.
"""

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, cast, get_args

from amprune.errors import PlanError, guess
from amprune.plan.budget import largest_ratio
from amprune.plan.heads import usable_heads
from amprune.plan.options import check_options, smallest_multiple
from amprune.settings import PlanOptions

if TYPE_CHECKING:
    from amprune.model.reader import Checkpoint

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
    """Reads a target: parameters, bytes (MB are 10^6, MiB 2^20), or a speedup. Fractions of one are left out."""
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


def with_target(options: PlanOptions, target: Target, dense: "Checkpoint", *, depth: bool) -> PlanOptions:
    """Returns the options with a target of parameters or bytes as the most parameters that may stay.

    A speedup is searched for, see `search/`: the options stay as they are then.
    """
    if options.ratio is not None:
        raise PlanError(f"a ratio of {options.ratio} and the target {target} both say how much goes; give one of them")
    if target.kind == "speedup" and depth:
        raise PlanError("a speedup is searched for in numbers of heads and neurons; give depth pruning a ratio")
    if target.kind == "speedup":
        return options
    return replace(options, target_parameters=target_parameters(target, dense, options, depth=depth))


def target_parameters(target: Target, checkpoint: "Checkpoint", options: PlanOptions, *, depth: bool = False) -> int:
    """Returns the most parameters that may stay of a checkpoint by a target of parameters or bytes.

    Bytes are those of all tensors that are written, so that removed bytes are removed parameters times the bytes of an
    element. Where tensors that shrink are of several dtypes, the smallest counts: the target is not exceeded then, but
    met less closely.
    """
    if target.kind == "speedup":
        raise PlanError(f"the target {target} is one of time, which has to be measured; use search.find_shapes")
    if target.kind == "params":
        return int(target.value)
    shape, element = checkpoint.shape, _element_bytes(checkpoint, depth=depth)
    if not depth:
        check_options(shape, options, decided=False)
        usable_heads(shape, options)
    neurons = smallest_multiple(options) * shape.neuron_parameters * shape.num_layers
    step = shape.layer_parameters if depth else neurons
    excess = checkpoint.bytes - int(target.value)
    if excess <= 0:
        raise PlanError(
            f"a target of {int(target.value):,} bytes would remove nothing: the weights have {checkpoint.bytes:,}; the "
            f"next below is {checkpoint.bytes - step * element:,}"
        )
    smallest = 1 if depth else shape.parameters - round(largest_ratio(shape, options) * shape.parameters)
    parameters = shape.parameters - -(-excess // element)
    if parameters < smallest:
        raise PlanError(
            f"a target of {int(target.value):,} bytes cannot be reached: of {checkpoint.bytes:,} the options leave at "
            f"least {checkpoint.bytes - (shape.parameters - smallest) * element:,}"
        )
    return parameters


def _element_bytes(checkpoint: "Checkpoint", *, depth: bool) -> int:
    """Returns the bytes of an element of the tensors that shrink, or of all that belong to blocks."""
    architecture = checkpoint.architecture
    blocks = tuple(f"{architecture.block(layer)}." for layer in range(architecture.shape.num_layers))
    names = (name for name in checkpoint if name.startswith(blocks)) if depth else architecture.cut_tensors()
    dtypes = (checkpoint.header(name).dtype for name in names)
    return min(dtype.itemsize for dtype in dtypes if dtype is not None)
