"""What a user may ask of a plan, and what of it is refused."""

from collections.abc import Sequence
from math import lcm
from typing import Any, get_args

from amprune.errors import PlanError
from amprune.model.shape import ModelShape
from amprune.settings import HeadsMode, Only, Order, PlanOptions


def check_options(shape: ModelShape, options: PlanOptions) -> None:
    """Refuses options that are out of range, contradict each other or do not suit the family."""
    check_units(shape, options)
    _check_shares(options)
    check_target(options)
    if (options.only == "neurons" and options.heads_ratio) or (options.only == "heads" and options.neurons_ratio):
        raise PlanError(f"only={options.only} contradicts a share of the other kind set by hand; leave out one of them")
    _check_decided(shape, options)


def check_units(shape: ModelShape, options: PlanOptions) -> None:
    """Refuses options, whatever is said of how much goes, that are out of range or do not suit the family."""
    check_order(options)
    _check_choice("only", options.only, (None, *get_args(Only)))
    _check_choice("heads_mode", options.heads_mode, (None, *get_args(HeadsMode)))
    _check_no_protection(options)
    _check_multiples(shape, options)
    if shape.heads_refused is not None and (options.only == "heads" or options.heads_ratio):
        raise PlanError(f"heads of a {shape.model_type} model cannot be removed: {shape.heads_refused}")


def check_order(options: PlanOptions) -> None:
    """Refuses an order that is none."""
    _check_choice("order", options.order, get_args(Order))


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


def _check_shares(options: PlanOptions) -> None:
    check_ratio(options)
    for name, share in (("heads_ratio", options.heads_ratio), ("neurons_ratio", options.neurons_ratio)):
        if share is not None and not 0 <= share < 1:
            raise PlanError(f"{name} is {share}, expected at least 0 and less than 1")


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


def recorded(options: PlanOptions, names: Sequence[str]) -> dict[str, Any]:
    """Returns what a plan records of its options; a target in the place of a ratio, and devices, where asked for."""
    rare = ("target_parameters", "tensor_parallel")
    unused = {name for name in rare if getattr(options, name) == getattr(PlanOptions, name)}
    return {name: getattr(options, name) for name in names if name not in unused}
