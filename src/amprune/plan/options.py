"""What a user may ask of a plan, what of it is refused, and of which multiple the number of neurons is then."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from math import lcm
from typing import Any, get_args

from amprune.errors import PlanError
from amprune.model.backends import GGUF_SUPER_BLOCK, TILE, reason_not_split
from amprune.model.shape import ModelShape
from amprune.settings import HeadsMode, Only, Order, PlanOptions

OF_DEPTH = ("ratio", "target_parameters", "order", "seed", "protect_first", "protect_last", "tensor_parallel")
"""Options that mean something where whole blocks are removed; `protect_*` mean nothing elsewhere."""
SLACK = 0.0025
"""Share of the parameters by which a ratio may be missed for the sake of a multiple wider than the usual one."""
_FEWEST = 4
"""Usual multiples that a layer should have: of a narrower one the ratio would be a matter of luck."""


def check_options(shape: ModelShape, options: PlanOptions, *, depth: bool = False) -> None:
    """Refuses options that are out of range, contradict each other, do not suit the family, or mean nothing.

    Where whole blocks are removed (`depth`) others mean something than where heads and neurons are.
    """
    if depth:
        _check_depth(shape, options)
        return
    check_units(shape, options)
    check_ratio(options)
    for name in ("heads_ratio", "neurons_ratio"):
        if (share := getattr(options, name)) is not None and not 0 <= share < 1:
            raise PlanError(f"{name} is {share}, expected at least 0 and less than 1")
    check_target(options)
    if (options.only == "neurons" and options.heads_ratio) or (options.only == "heads" and options.neurons_ratio):
        raise PlanError(f"only={options.only} contradicts a share of the other kind set by hand; leave out one of them")
    _check_decided(shape, options)


def check_units(shape: ModelShape, options: PlanOptions) -> None:
    """Refuses options, whatever is said of how much goes, that are out of range or do not suit the family."""
    _check_choice("order", options.order, get_args(Order))
    _check_choice("only", options.only, (None, *get_args(Only)))
    _check_choice("heads_mode", options.heads_mode, (None, *get_args(HeadsMode)))
    _check_no_protection(options)
    _check_multiples(shape, options)
    if shape.heads_refused is not None and (options.only == "heads" or options.heads_ratio):
        raise PlanError(f"heads of a {shape.model_type} model cannot be removed: {shape.heads_refused}")


def _check_choice(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        raise PlanError(f"{name} is {value!r}, expected one of {', '.join(str(a) for a in allowed)}")


def check_ratio(options: PlanOptions) -> None:
    """Refuses a ratio that is none."""
    ratio = options.ratio
    if ratio is not None and not 0 < ratio < 1:
        raise PlanError(f"ratio is {ratio}, expected a number between 0 and 1, such as 0.2 for 20 % of the parameters")


def check_target(options: PlanOptions) -> None:
    """Refuses a number of parameters that is none, or that stands beside a ratio."""
    target = options.target_parameters
    if target is None:
        return
    if options.ratio is not None:
        raise PlanError(
            f"a ratio of {options.ratio} and a target of {target} parameters say the same; give one of them"
        )
    if type(target) is not int or target < 1:
        raise PlanError(f"target_parameters is {target!r}, expected a whole number of at least 1")


def _check_no_protection(options: PlanOptions) -> None:
    for name in ("protect_first", "protect_last"):
        if (value := getattr(options, name)) != getattr(PlanOptions, name):
            raise PlanError(
                f"{name} is {value}, but no block is removed by scores of heads and neurons, and every one loses as "
                "many; leave it out, or score by a criterion of blocks"
            )


def _check_decided(shape: ModelShape, options: PlanOptions) -> None:
    """Wants a ratio or a number of parameters where a share is open.

    Where both are settled by hand, they decide: a ratio is what was aimed at then, and a number would have no say.
    """
    open_heads = options.heads_ratio is None and not heads_stay(shape, options)
    open_neurons = options.neurons_ratio is None and options.only != "heads"
    if options.ratio is None and options.target_parameters is None and (open_heads or open_neurons):
        raise PlanError("give a ratio, or both heads_ratio and neurons_ratio, or target_parameters")
    if options.target_parameters is not None and not (open_heads or open_neurons):
        raise PlanError(
            "target_parameters decides nothing where the shares of heads and of neurons are both settled; leave one out"
        )


def heads_stay(shape: ModelShape, options: PlanOptions) -> bool:
    """Tells whether no head is to be removed, because none can be or none is asked for."""
    return options.only == "neurons" or shape.heads_refused is not None


def _check_multiples(shape: ModelShape, options: PlanOptions) -> None:
    check_devices(options)
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


def check_devices(options: PlanOptions) -> None:
    """Refuses a number of devices that is none."""
    if type(options.tensor_parallel) is not int or options.tensor_parallel < 1:
        raise PlanError(f"tensor_parallel is {options.tensor_parallel!r}, expected a number of devices, at least 1")


def _check_depth(shape: ModelShape, options: PlanOptions) -> None:
    if shape.blocks_refused is not None:
        raise PlanError(f"blocks of a {shape.model_type} model cannot be removed: {shape.blocks_refused}")
    if not shape.layer_parameters:
        raise PlanError("the scores do not say how many parameters a block holds; score the model again")
    _check_choice("order", options.order, get_args(Order))
    check_ratio(options)
    check_target(options)
    check_devices(options)
    if (reason := reason_not_split(shape, options.tensor_parallel)) is not None:
        raise PlanError(
            f"tensor_parallel is {options.tensor_parallel}, but blocks that stay keep their units: {reason}"
        )
    for field in fields(PlanOptions):
        value = getattr(options, field.name)
        if field.name not in OF_DEPTH and value != field.default:
            raise PlanError(
                f"{field.name} is {value}, but means nothing where whole blocks are removed; leave it out, or score "
                "by a criterion of heads and neurons"
            )
    for name, value in (("protect_first", options.protect_first), ("protect_last", options.protect_last)):
        if type(value) is not int or value < 0:
            raise PlanError(f"{name} is {value!r}, expected a number of blocks, at least 0")


def recorded(options: PlanOptions, *, depth: bool) -> dict[str, Any]:
    """Returns what a plan records of its options; a target instead of a ratio, and devices, where asked for."""
    of_width = tuple(field.name for field in fields(PlanOptions) if not field.name.startswith("protect_"))
    names = OF_DEPTH if depth else of_width
    rare = ("target_parameters", "tensor_parallel")
    unused = {name for name in rare if getattr(options, name) == getattr(PlanOptions, name)}
    return {name: getattr(options, name) for name in names if name not in unused}


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
    if options.neuron_multiple != "hardware":
        return multiples(shape, options)[-1]
    wide = [multiple for multiple in multiples(shape, options)[:-1] if missed <= SLACK]
    usual = multiples(shape, options)[-1]
    narrow = [multiples(shape, fewer)[-1] for fewer in narrower(shape, options)]
    fitting = [multiple for multiple in (*wide, usual, *narrow) if neurons % multiple == 0]
    return fitting[0] if fitting else 1
