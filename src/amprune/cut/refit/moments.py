"""Second moments of a projection's inputs, and the ridge least squares that they solve."""

import math
from dataclasses import dataclass, field

import torch

from amprune.errors import ReconstructionError

_STRENGTHS = tuple(10 ** (step / 2) for step in range(-10, 5))
"""Strengths of the ridge that are tried, as shares of the mean diagonal of the moments: 1e-5 to 100."""
FIRST_STRENGTH = 0.1


@dataclass(frozen=True)
class Refit:
    """How one projection is to change, and what that does to the error of its output."""

    change: torch.Tensor | None
    """(inputs, outputs) float64, to be added to the weight as (inputs, outputs); None: it stays as it is."""
    bias_change: torch.Tensor | None
    """(outputs,) float64; None: there is no bias, or it stays."""
    strength: float | None
    """Of the ridge, as a share of the mean diagonal of the moments."""
    before: float
    """Squared error of the output as a share of what the target holds, on the tokens of the fit."""
    after: float
    held_out_before: float
    """The same on tokens that the fit never saw."""
    held_out_after: float
    tokens: int
    """Of the fit."""


@dataclass
class Moments:
    """Sums over the calibration tokens, for `min ||H D - R||^2 + ridge * ||D||^2` over the change D of a weight.

    H are the (tokens, inputs) that the projection is given, R the (tokens, outputs) by which its output falls short.
    The ridge holds the change and not the weight to zero: it shrinks to the kept weights. Nothing is kept of the tokens
    of the fit; the held-out ones, an eighth, are kept while the projection is under way.
    """

    inputs: int
    outputs: int
    device: torch.device
    dtype: torch.dtype = torch.float64
    """Of the sums and of the solution."""
    gram: torch.Tensor = field(init=False)
    cross: torch.Tensor = field(init=False)
    error: float = 0.0
    target: float = 0.0
    tokens: int = 0
    held_out: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    held_out_target: float = 0.0

    def __post_init__(self) -> None:
        """Makes room for the sums."""
        self.gram = torch.zeros(self.inputs, self.inputs, dtype=self.dtype, device=self.device)
        self.cross = torch.zeros(self.inputs, self.outputs, dtype=self.dtype, device=self.device)

    def add(self, given: torch.Tensor, missing: torch.Tensor, target: torch.Tensor, *, held_out: bool) -> None:
        """Adds tokens: (tokens, inputs), the (tokens, outputs) that are missing, and what the output should be."""
        given, missing = _rows(given), _rows(missing)
        energy = float(target.double().square().sum())
        if held_out:
            self.held_out.append((given, missing))
            self.held_out_target += energy
            return
        self.gram += given.T @ given
        self.cross += given.T @ missing
        self.error += float(missing.double().square().sum())
        self.target += energy
        self.tokens += len(given)

    @property
    def held_out_error(self) -> float:
        """Summed squares of what is missing on the held-out tokens."""
        return sum(float(missing.double().square().sum()) for _, missing in self.held_out)


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, values.shape[-1]).to(torch.promote_types(values.dtype, torch.float32))


def solve(moments: Moments, *, bias: bool, strength: float = FIRST_STRENGTH) -> Refit:
    """Finds the change that the held-out tokens like best, walking from `strength` to weaker and stronger ridges.

    With `bias`, the last input is a one for each token, whose weight is the bias and is not held to anything. Where no
    ridge lowers the held-out error, the projection stays as it is.
    """
    before = moments.held_out_error
    finite = bool(torch.isfinite(moments.gram).all() and torch.isfinite(moments.cross).all())
    if not finite or not math.isfinite(before):
        raise ReconstructionError("gives activations that are not finite")
    error, held_out = _share(moments.error, moments.target), _share(before, moments.held_out_target)
    unchanged = Refit(None, None, None, error, error, held_out, held_out, moments.tokens)
    if moments.error == 0 or not moments.gram.any():
        return unchanged
    place, found, after = _descend(moments, strength, bias=bias)
    if found is None or not after < before:
        return unchanged
    fitted = moments.error + float((found * (moments.gram @ found - 2 * moments.cross)).sum())
    return Refit(
        change=found[:-1] if bias else found,
        bias_change=found[-1] if bias else None,
        strength=_STRENGTHS[place],
        before=error,
        after=_share(max(fitted, 0.0), moments.target),
        held_out_before=held_out,
        held_out_after=_share(after, moments.held_out_target),
        tokens=moments.tokens,
    )


def _share(error: float, target: float) -> float:
    return error / target if target else 0.0


def _descend(moments: Moments, strength: float, *, bias: bool) -> tuple[int, torch.Tensor | None, float]:
    """Walks to weaker, else to stronger ridges while the held-out error falls; returns place, change and error."""
    tried: dict[int, tuple[torch.Tensor | None, float]] = {}

    def error(place: int) -> float:
        if place not in tried:
            change = _ridge(moments, _STRENGTHS[place], bias=bias)
            tried[place] = change, math.inf if change is None else _held_out_error(moments, change)
        return tried[place][1]

    place = min(range(len(_STRENGTHS)), key=lambda index: abs(math.log(_STRENGTHS[index] / strength)))
    for step in (-1, 1):
        while 0 <= place + step < len(_STRENGTHS) and error(place + step) < error(place):
            place += step
    return place, *tried[place]


def _ridge(moments: Moments, strength: float, *, bias: bool) -> torch.Tensor | None:
    """Solves `(H'H + ridge) D = H'R`; an input that is zero for every token keeps its weight.

    None where the ridge is too weak for moments that rounding has made indefinite.
    """
    gram = moments.gram
    diagonal = gram.diagonal()
    ridge = torch.full_like(diagonal, strength * float(diagonal[: len(diagonal) - bias].mean()))
    if bias:
        ridge[-1] = 0
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge))
    if failed:
        # Rounding of the products, in float32, has made the moments indefinite; a ridge as large makes up for it.
        ridge += torch.finfo(torch.float32).eps * len(diagonal) * float(diagonal.max())
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(ridge))
    return None if failed else torch.cholesky_solve(moments.cross, factor)


def _held_out_error(moments: Moments, change: torch.Tensor) -> float:
    change = change.to(moments.held_out[0][0].dtype)
    return sum(float((missing - given @ change).double().square().sum()) for given, missing in moments.held_out)
