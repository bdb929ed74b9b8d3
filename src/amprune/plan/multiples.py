"""Of which multiple the number of neurons is: the one that is asked for, or the widest that hardware likes."""

from collections.abc import Iterator
from dataclasses import replace
from math import lcm

from amprune.model.backends import GGUF_SUPER_BLOCK, TILE
from amprune.model.shape import ModelShape
from amprune.plan.heads import Budget
from amprune.settings import PlanOptions

SLACK = 0.0025
"""Share of the parameters by which a ratio may be missed for the sake of a multiple wider than the usual one."""
_FEWEST = 4
"""Usual multiples that a layer should have: of a narrower one the ratio would be a matter of luck."""


def multiples(shape: ModelShape, options: PlanOptions) -> tuple[int, ...]:
    """Returns the multiples that neurons may be of, widest first: the last always, those before it within `SLACK`.

    For hardware these are 256 (K-quants) and 64 (tiles), which also suits the blocks of 32 of other quantised types.
    Each is a multiple of the devices that share the neurons out.
    """
    devices, asked = options.tensor_parallel, options.neuron_multiple
    if asked != "hardware":
        return (lcm(asked, devices),)
    wide, usual = lcm(GGUF_SUPER_BLOCK, devices), lcm(_usual(shape), devices)
    return (wide, usual) if usual < wide <= shape.intermediate_size else (usual,)


def narrower(shape: ModelShape, options: PlanOptions) -> Iterator[PlanOptions]:
    """Yields the options with half the usual multiple of hardware, a quarter, and on to 1; none of one by hand."""
    multiple = _usual(shape) if options.neuron_multiple == "hardware" else 1
    while multiple > 1:
        multiple //= 2
        yield replace(options, neuron_multiple=multiple)


def _usual(shape: ModelShape) -> int:
    multiple = TILE
    while multiple > 1 and _FEWEST * multiple > shape.intermediate_size:
        multiple //= 2
    return multiple


def smallest_multiple(options: PlanOptions) -> int:
    """Returns the multiple of which neurons are where nothing else reaches what is asked for."""
    return lcm(1 if options.neuron_multiple == "hardware" else options.neuron_multiple, options.tensor_parallel)


def applied_multiple(shape: ModelShape, budget: Budget, options: PlanOptions, *, missed: float) -> int:
    """Returns the multiple that has shaped a budget whose ratio misses the one asked for by `missed`."""
    if options.neuron_multiple != "hardware":
        return multiples(shape, options)[-1]
    wide = [multiple for multiple in multiples(shape, options)[:-1] if missed <= SLACK]
    usual = multiples(shape, options)[-1]
    narrow = [multiples(shape, fewer)[-1] for fewer in narrower(shape, options)]
    fitting = [multiple for multiple in (*wide, usual, *narrow) if budget.neurons % multiple == 0]
    return fitting[0] if fitting else 1
