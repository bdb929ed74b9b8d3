"""What a user may ask of a plan, what of it is refused, and of which multiple the number of neurons is then."""

from collections.abc import Iterator
from dataclasses import fields, replace
from math import lcm
from typing import Any, get_args

from amprune.errors import PlanError
from amprune.model.backends import GGUF_SUPER_BLOCK, TILE, reason_not_split
from amprune.model.shape import ModelShape
from amprune.settings import HeadsMode, Only, Order, PlanOptions

SLACK = 0.0025
"""Share of the parameters by which a ratio may be missed for the sake of a multiple wider than the usual one."""
_FEWEST = 4
"""Usual multiples that a layer should have: of a narrower one the ratio would be a matter of luck."""
_OF_BLOCKS = ("protect_first", "protect_last")
_OF_BOTH = ("ratio", "target_parameters", "order", "seed", "tensor_parallel")
_CHOICES = {"order": get_args(Order), "only": (None, *get_args(Only)), "heads_mode": (None, *get_args(HeadsMode))}


def check_options(shape: ModelShape, options: PlanOptions, *, depth: bool = False, decided: bool = True) -> None:
    """Refuses options that are out of range, contradict each other, do not suit the family, or mean nothing.

    Where whole blocks are removed (`depth`), others mean something than where heads and neurons are. `decided` tells
    whether they have to say how much goes.
    """
    if depth and shape.blocks_refused is not None:
        raise PlanError(f"blocks of a {shape.model_type} model cannot be removed: {shape.blocks_refused}")
    if depth and not shape.layer_parameters:
        raise PlanError("the scores do not say how many parameters a block holds; score the model again")
    meaningful = _meaningful(depth=depth)
    for name in (field.name for field in fields(PlanOptions)):
        value, known = getattr(options, name), _CHOICES.get(name)
        if name in meaningful and known is not None and value not in known:
            raise PlanError(f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")
        if name not in meaningful and value != getattr(PlanOptions, name):
            nothing = "no block is removed by scores of heads and neurons, and every one loses as many"
            other = "blocks"
            if depth:
                nothing, other = "means nothing where whole blocks are removed", "heads and neurons"
            raise PlanError(f"{name} is {value}, but {nothing}; leave it out, or score by a criterion of {other}")
    if type(options.tensor_parallel) is not int or options.tensor_parallel < 1:
        raise PlanError(f"tensor_parallel is {options.tensor_parallel!r}, expected a number of devices, at least 1")
    (_check_blocks if depth else _check_units)(shape, options)
    _check_amount(shape, options, depth=depth, decided=decided)


def _meaningful(*, depth: bool) -> tuple[str, ...]:
    """Names the options that mean something where blocks, or heads and neurons, are removed."""
    of_units = tuple(field.name for field in fields(PlanOptions) if field.name not in _OF_BLOCKS)
    return (*_OF_BOTH, *_OF_BLOCKS) if depth else of_units


def _check_blocks(shape: ModelShape, options: PlanOptions) -> None:
    if (reason := reason_not_split(shape, options.tensor_parallel)) is not None:
        raise PlanError(
            f"tensor_parallel is {options.tensor_parallel}, but blocks that stay keep their units: {reason}"
        )
    for name in _OF_BLOCKS:
        if type(value := getattr(options, name)) is not int or value < 0:
            raise PlanError(f"{name} is {value!r}, expected a number of blocks, at least 0")


def _check_units(shape: ModelShape, options: PlanOptions) -> None:
    neurons, devices = 1 if options.neuron_multiple == "hardware" else options.neuron_multiple, options.tensor_parallel
    for name, multiple, total in (
        ("neuron_multiple", neurons, shape.intermediate_size),
        ("head_multiple", options.head_multiple, shape.num_attention_heads),
    ):
        if not isinstance(multiple, int) or not 1 <= multiple <= total:
            raise PlanError(f"{name} is {multiple}, expected 1 to {total}, the number that a layer has")
    if lcm(neurons, devices) > shape.intermediate_size:
        raise PlanError(
            f"neuron_multiple {neurons} and tensor_parallel {devices} ask for a multiple of {lcm(neurons, devices)} "
            f"neurons, but a layer has {shape.intermediate_size}"
        )
    if options.only == "heads" and shape.intermediate_size % devices:
        raise PlanError(
            f"only heads are to go, but the {shape.intermediate_size} neurons that stay cannot be shared out over "
            f"tensor_parallel={devices} devices; let neurons go, too"
        )
    if shape.heads_refused is not None and (options.only == "heads" or options.heads_ratio):
        raise PlanError(f"heads of a {shape.model_type} model cannot be removed: {shape.heads_refused}")
    if not any(count < shape.num_attention_heads for count in shape.query_head_counts) and (
        options.only == "heads" or options.heads_ratio
    ):
        raise PlanError(
            f"heads of this {shape.model_type} model cannot be removed: its config accepts no other number than "
            f"{shape.num_attention_heads}; let only neurons go"
        )


def _check_amount(shape: ModelShape, options: PlanOptions, *, depth: bool, decided: bool) -> None:
    """Wants a ratio or a number of parameters where a share is open, and no number where it would have no say."""
    ratio, target = options.ratio, options.target_parameters
    if ratio is not None and not 0 < ratio < 1:
        raise PlanError(f"ratio is {ratio}, expected a number between 0 and 1, such as 0.2 for 20 % of the parameters")
    for name in ("heads_ratio", "neurons_ratio"):
        if (share := getattr(options, name)) is not None and not 0 <= share < 1:
            raise PlanError(f"{name} is {share}, expected at least 0 and less than 1")
    if target is not None and ratio is not None:
        raise PlanError(f"a ratio of {ratio} and a target of {target} parameters say the same; give one of them")
    if target is not None and (type(target) is not int or target < 1):
        raise PlanError(f"target_parameters is {target!r}, expected a whole number of at least 1")
    if (options.only == "neurons" and options.heads_ratio) or (options.only == "heads" and options.neurons_ratio):
        raise PlanError(f"only={options.only} contradicts a share of the other kind set by hand; leave out one of them")
    heads_open = options.heads_ratio is None and not heads_stay(shape, options)
    is_open = depth or heads_open or (options.neurons_ratio is None and options.only != "heads")
    if decided and is_open and ratio is None and target is None:
        if depth:
            raise PlanError("give a ratio or target_parameters: blocks are removed by their share of the parameters")
        raise PlanError("give a ratio, or both heads_ratio and neurons_ratio, or target_parameters")
    if decided and not is_open and not (ratio is target is None):
        name = "ratio" if target is None else "target_parameters"
        raise PlanError(
            f"{name} decides nothing where the shares of heads and of neurons are both settled; leave one out"
        )


def heads_stay(shape: ModelShape, options: PlanOptions) -> bool:
    """Tells whether no head is to be removed, because none can be or none is asked for."""
    return options.only == "neurons" or shape.heads_refused is not None


def recorded(options: PlanOptions, *, depth: bool) -> dict[str, Any]:
    """Returns what a plan records of its options; a target instead of a ratio, and devices, where asked for."""
    rare = ("target_parameters", "tensor_parallel")
    unused = {name for name in rare if getattr(options, name) == getattr(PlanOptions, name)}
    return {name: getattr(options, name) for name in _meaningful(depth=depth) if name not in unused}


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


def applied_multiple(shape: ModelShape, neurons: int, options: PlanOptions, *, missed: float) -> int:
    """Returns the multiple that has shaped this number of neurons, which misses the ratio asked for by `missed`."""
    *wide, usual = multiples(shape, options)
    if options.neuron_multiple != "hardware":
        return usual
    narrow = (multiples(shape, fewer)[-1] for fewer in narrower(shape, options))
    possible = (*(wide if missed <= SLACK else ()), usual, *narrow)
    return next((multiple for multiple in possible if neurons % multiple == 0), 1)
