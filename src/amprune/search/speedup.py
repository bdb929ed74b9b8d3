"""From a speedup to the shapes that reach it on this device: for each number of heads the most neurons."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from amprune.errors import PlanError
from amprune.model.shape import ModelShape
from amprune.plan.budget import find_budget
from amprune.plan.heads import Budget, choices_of_all_modes, kept_heads
from amprune.plan.options import multiples
from amprune.search.allocation import evenly
from amprune.settings import PlanOptions

logger = logging.getLogger(__name__)

HEAD_COUNTS = 6
"""Numbers of head units that are tried in each mode, the fewest removed first."""
_WIDTH = 64
"""Neurons between the widths that are tried, where no multiple is asked for and the model is wide enough."""
_WIDTHS = 16
"""Fewest widths that a model is tried at."""


@dataclass(frozen=True)
class TimedShape:
    """A shape and how fast it was."""

    budget: Budget
    parameters: int
    speedup: float
    """Measured, over the dense model."""


@dataclass(frozen=True)
class SpeedupSearch:
    """What a search for a speedup has timed, in this order, and what reaches it."""

    wanted: float
    reached: tuple[TimedShape, ...]
    """For each number of heads that can reach it, the shape of the most neurons; the fewest heads removed first."""
    timed: tuple[TimedShape, ...]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The candidates among which an allocation chooses."""
        return tuple(found.budget for found in self.reached)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return asdict(self)


def find_shapes(
    shape: ModelShape,
    wanted: float,
    options: PlanOptions,
    speedup: Callable[[ModelShape], float],
    *,
    head_counts: int = HEAD_COUNTS,
) -> SpeedupSearch:
    """Finds for each number of heads the most neurons that reach a speedup, by bisection.

    Widths are 64 neurons apart, or as near to that as a `neuron_multiple` lets them be. Fewer neurons are taken to be
    no slower; what is returned has been measured.

    Args:
        shape: of the dense model.
        wanted: above 1.
        options: which heads and neurons may go; neither a ratio nor a number of parameters.
        speedup: measures a shape; see `shape_timer`.
        head_counts: at most so many numbers of heads are tried in each mode, spread evenly.
    """
    _check(shape, wanted, options)
    timed: dict[Budget, TimedShape] = {}

    def reaches(budget: Budget) -> bool:
        if budget not in timed:
            timed[budget] = _timed(shape, budget, speedup)
        return timed[budget].speedup >= wanted

    reached = []
    for choices in choices_of_all_modes(shape, options):
        start = 0
        for removed in evenly(choices.removable, head_counts):
            heads = kept_heads(shape, choices.mode, removed)
            budgets = [
                Budget(choices.mode, *heads, neurons)
                for neurons in _widths(shape, options)
                if (*heads, neurons) != (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
            ]
            if (found := _last(budgets, start, reaches)) is not None:
                start = found
                reached.append(timed[budgets[found]])
    if not reached:
        raise _out_of_reach(wanted, list(timed.values()))
    return SpeedupSearch(wanted, tuple(reached), tuple(timed.values()))


def _check(shape: ModelShape, wanted: float, options: PlanOptions) -> None:
    if not wanted > 1:
        raise PlanError(f"a speedup of {wanted} was asked for, expected more than 1, such as 1.25")
    if options.ratio is not None or options.target_parameters is not None:
        raise PlanError("a speedup settles how much goes; leave out the ratio and the number of parameters")
    if options.heads_ratio is not None or options.neurons_ratio is not None:
        raise PlanError("a speedup settles what heads and neurons lose; leave out heads_ratio and neurons_ratio")
    # Whatever else is wrong with the options is told by a budget of any size.
    find_budget(shape, PlanOptions(**{**vars(options), "target_parameters": shape.parameters - 1}))


def _timed(shape: ModelShape, budget: Budget, speedup: Callable[[ModelShape], float]) -> TimedShape:
    after = shape.shrunk(query_heads=budget.query_heads, key_value_heads=budget.key_value_heads, neurons=budget.neurons)
    found = TimedShape(budget, after.parameters, speedup(after))
    logger.info(
        "%d query heads, %d key-value heads, %d neurons: %.3fx",
        budget.query_heads, budget.key_value_heads, budget.neurons, found.speedup,
    )  # fmt: skip
    return found


def _widths(shape: ModelShape, options: PlanOptions) -> list[int]:
    """Returns the numbers of neurons that are tried, ascending."""
    width, multiple = shape.intermediate_size, multiples(shape, options)[-1]
    if options.only == "heads":
        return [width]
    step = multiple * max(min(_WIDTH, width // _WIDTHS) // multiple, 1)
    return sorted({*range(step, width + 1, step), width // multiple * multiple})


def _last(budgets: list[Budget], start: int, reaches: Callable[[Budget], bool]) -> int | None:
    """Returns the index of the last budget that reaches the speedup, looking at `start` first, then by halving."""
    low, high, middle = -1, len(budgets), min(start, len(budgets) - 1)
    while high - low > 1:
        if reaches(budgets[middle]):
            low = middle
        else:
            high = middle
        middle = (low + high) // 2
    return None if low < 0 else low


def _out_of_reach(wanted: float, timed: list[TimedShape]) -> PlanError:
    if not timed:
        return PlanError(f"a speedup of {wanted} cannot be searched for: these options leave nothing to remove")
    best = max(timed, key=lambda found: found.speedup)
    return PlanError(
        f"a speedup of {wanted} is out of reach here: the largest that was measured is {best.speedup:.2f}, of a shape "
        f"with {best.budget.query_heads} query heads, {best.budget.key_value_heads} key-value heads and "
        f"{best.budget.neurons} neurons a layer; ask for less, or time larger batches or prompts, or on another device"
    )
