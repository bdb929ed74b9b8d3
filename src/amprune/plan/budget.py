"""How much goes: from a ratio, or a number of parameters, to the heads and neurons of each layer, or to the blocks.

START at `find_budget` for heads and neurons, at `find_depth` for blocks; the rest of the module serves the first.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product

from amprune.errors import PlanError
from amprune.model.shape import ModelShape
from amprune.plan.heads import Budget, HeadChoices, choices_of_all_modes, head_choices, kept_heads, usable_heads
from amprune.plan.options import SLACK, check_options, heads_stay, multiples, narrower, smallest_multiple
from amprune.settings import PlanOptions


def find_depth(shape: ModelShape, options: PlanOptions) -> int:
    """Returns how many decoder blocks go: as many as come nearest to the ratio, of two equally near the fewer.

    Of `target_parameters` it is the fewest that leave no more.
    """
    check_options(shape, options, depth=True)
    ratio, target, block = _ratio(shape, options), options.target_parameters, shape.layer_parameters
    most, step = removable_blocks(shape, options), block / shape.parameters
    protected = f"the first {options.protect_first} and the last {options.protect_last} blocks are protected"
    if most < 1:
        raise PlanError(
            f"none of the {shape.num_layers} blocks can be removed: {protected}, and at least one stays; lower "
            "protect_first or protect_last"
        )
    removed = math.ceil(ratio / step - 0.5 - 1e-9) if target is None else math.ceil((shape.parameters - target) / block)
    if removed <= 0 and target is not None:
        raise PlanError(
            f"a target of {target:,} parameters would remove no block: the model has {shape.parameters:,}; without one "
            f"block it has {shape.parameters - block:,}"
        )
    if removed <= 0:
        raise PlanError(
            f"a ratio of {ratio} would remove no block, as each holds {step:.2%} of the parameters; the "
            f"nearest ratio that works is {_rounded_up(step)}"
        )
    if removed > most:
        asked, reachable = f"a ratio of {ratio}", f"the largest ratio is {_rounded_down(most * step)}"
        if target is not None:
            asked = f"a target of {target:,} parameters"
            reachable = f"the smallest reachable is {shape.parameters - most * block:,}"
        raise PlanError(
            f"{asked} asks for {removed} of {shape.num_layers} blocks, but at most {most} can go: {protected}; "
            f"{reachable}"
        )
    return removed


def removable_blocks(shape: ModelShape, options: PlanOptions) -> int:
    """Returns how many blocks can go: those that are not protected, and never all."""
    if shape.blocks_refused is not None or not shape.layer_parameters:
        return 0
    return max(min(shape.num_layers - options.protect_first - options.protect_last, shape.num_layers - 1), 0)


def find_budget(shape: ModelShape, options: PlanOptions) -> Budget:
    """Spends the ratio on heads, rounded to whole units, and on neurons, which make up the exact rest.

    Of a number of parameters nothing is exceeded: neurons are rounded down to the largest that fits. The multiples that
    hardware likes give way to narrower ones where nothing would be removed, or the ratio is out of reach.
    """
    check_options(shape, options)
    choices, attempts = usable_heads(shape, options), (options, *narrower(shape, options))
    # Devices leave few numbers of heads, of which the other mode may have one that suits.
    modes = choices_of_all_modes(shape, options) if options.tensor_parallel > 1 else (choices,)
    for attempt, mode in product(attempts, modes):
        with suppress(PlanError):
            return _find(shape, mode, attempt)
    return _find(shape, choices, attempts[-1])


def _find(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> Budget:
    if options.target_parameters is not None and options.target_parameters >= shape.parameters:
        raise _removes_nothing(shape, choices, options)
    removed, neurons = _spend(shape, choices, options)
    if (removed, neurons) == (0, shape.intermediate_size):
        raise _removes_nothing(shape, choices, options)
    return Budget(choices.mode, *kept_heads(shape, choices.mode, removed), neurons)


def _spend(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> tuple[int, int]:
    """Returns the number of head units removed and of neurons kept in every layer."""
    neuron_cost, width = shape.neuron_parameters * shape.num_layers, shape.intermediate_size
    if options.only == "heads" or options.neurons_ratio is not None:
        neurons = _neurons_by_hand(shape, options)
        return _heads_for(shape, choices, options, (width - neurons) * neuron_cost), neurons
    preferred = _preferred(shape, choices, options)
    if (equal := _equal_shares(shape, choices, options, preferred)) is not None:
        return equal
    for removed in preferred:
        if (matching := matching_neurons(shape, choices, removed, options)) is not None:
            return removed, matching
    if options.target_parameters is not None:
        # Between two numbers of heads: what all neurons leave with the larger one is the most that does not exceed it.
        multiple = multiples(shape, options)[-1]
        most = width // multiple * multiple
        return _enough_heads(shape, choices, options, (width - most) * neuron_cost, preferred), most
    raise _unreachable(shape, choices, options)


def matching_neurons(shape: ModelShape, choices: HeadChoices, removed: int, options: PlanOptions) -> int | None:
    """Returns how many neurons meet the ratio where `removed` head units go, or None where no number does.

    They come to within half a multiple of the ratio; of `target_parameters` they are the most that do not exceed it,
    by less than one multiple. Of several multiples it is the widest that costs no more than `SLACK`.
    """
    wanted, width = _exact_neurons(shape, removed * choices.cost, options), shape.intermediate_size
    *wider, usual = multiples(shape, options)

    def of_multiple(multiple: int) -> int | None:
        if options.target_parameters is not None:
            neurons = math.floor(wanted) // multiple * multiple
            return neurons if multiple <= neurons <= width // multiple * multiple else None
        neurons = _to_multiple(wanted, multiple, width)
        return neurons if abs(neurons - wanted) <= multiple / 2 + 1e-6 else None

    for neurons in map(of_multiple, wider):
        if neurons is not None:
            missed = _removed_share(shape, choices, removed, neurons) - _ratio(shape, options)
            if abs(missed) <= SLACK:
                return neurons
    return of_multiple(usual)


def _exact_neurons(shape: ModelShape, spent: int, options: PlanOptions) -> float:
    """Returns how many neurons spend the rest where heads have taken `spent` parameters; whole for `target_parameters`.

    The number may be one that no layer can keep.
    """
    cost, width = shape.neuron_parameters * shape.num_layers, shape.intermediate_size
    if options.target_parameters is not None:
        return width - -(-(shape.parameters - options.target_parameters - spent) // cost)
    return width - (_ratio(shape, options) * shape.parameters - spent) / cost


def _removed_share(shape: ModelShape, choices: HeadChoices, removed: int, neurons: int) -> float:
    """Returns the share of the parameters that go with so many head units, and with all but so many neurons."""
    gone = (shape.intermediate_size - neurons) * shape.neuron_parameters * shape.num_layers
    return (removed * choices.cost + gone) / shape.parameters


def unrounded(shape: ModelShape, budget: Budget, options: PlanOptions) -> Budget:
    """Returns the budget with the same heads and as many neurons as spend what is asked for, of no multiple."""
    width = shape.intermediate_size
    if multiples(shape, options) == (1,) or asked_ratio(shape, options) is None:
        return budget
    whole = replace(budget, neurons=width).left_of(shape)
    neurons = round(_exact_neurons(shape, shape.parameters - whole.parameters, options))
    return replace(budget, neurons=min(max(neurons, 1), width))


def largest_ratio(shape: ModelShape, options: PlanOptions) -> float:
    """Returns the largest pruning ratio that the options leave, with a head (or group) and a neuron in every layer."""
    return max((high for _, high in _reachable(shape, head_choices(shape, options), options)), default=0.0)


def _reachable(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> list[tuple[float, float]]:
    """Lists the lowest and highest ratio for each number of heads that can be removed; there may be gaps between."""
    removable, width, multiple = choices.removable, shape.intermediate_size, smallest_multiple(options)
    if removable and options.heads_ratio is not None:
        removable = (_nearest(removable, options.heads_ratio * choices.units),)
    if options.only == "heads" or options.neurons_ratio is not None:
        most = fewest = _neurons_by_hand(shape, options)
    else:
        most, fewest = width // multiple * multiple, multiple
    return [
        (_removed_share(shape, choices, removed, most), _removed_share(shape, choices, removed, fewest))
        for removed in removable
    ]


def _neurons_by_hand(shape: ModelShape, options: PlanOptions) -> int:
    """Returns the neurons kept where `neurons_ratio` or `only` settles them."""
    width = shape.intermediate_size
    if not options.neurons_ratio and width % options.tensor_parallel == 0:
        return width
    return _to_multiple(width * (1 - (options.neurons_ratio or 0)), multiples(shape, options)[-1], width)


def _heads_for(shape: ModelShape, choices: HeadChoices, options: PlanOptions, spent: int) -> int:
    """Returns the head units to remove where the neurons are settled and have taken `spent` parameters."""
    if asked_ratio(shape, options) is None or options.heads_ratio is not None or heads_stay(shape, options):
        return _nearest(choices.removable, (options.heads_ratio or 0) * choices.units)
    if options.target_parameters is not None:
        return _enough_heads(shape, choices, options, spent, choices.removable)
    wanted = (_ratio(shape, options) * shape.parameters - spent) / choices.cost
    if not min(choices.removable) - 0.5 <= wanted <= max(choices.removable) + 0.5:
        raise _unreachable(shape, choices, options)
    return _nearest(choices.removable, wanted)


def _enough_heads(
    shape: ModelShape, choices: HeadChoices, options: PlanOptions, spent: int, allowed: Sequence[int]
) -> int:
    """Returns the fewest head units that reach `target_parameters` where neurons have taken `spent` parameters."""
    most = options.target_parameters or 0
    enough = [removed for removed in allowed if shape.parameters - spent - removed * choices.cost <= most]
    if not enough:
        raise _unreachable(shape, choices, options)
    return min(enough)


def _preferred(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> list[int]:
    """Orders the numbers of head units to remove by how well they suit; the later ones serve extreme ratios."""
    if choices.removable == (0,):
        return [0]
    if options.heads_ratio is not None:
        return [_nearest(choices.removable, options.heads_ratio * choices.units)]
    wanted = _prunable_share(shape, _ratio(shape, options)) * shape.attention_parameters / choices.cost
    if shape.group_size > 1:
        # Few and large units: one too many costs far more quality than the same parameters in neurons.
        whole = math.floor(wanted + 1e-9)
        return sorted(choices.removable, key=lambda removed: (removed > whole, abs(removed - wanted)))
    return sorted(choices.removable, key=lambda removed: (abs(removed - wanted), removed))


def _equal_shares(
    shape: ModelShape, choices: HeadChoices, options: PlanOptions, preferred: Sequence[int]
) -> tuple[int, int] | None:
    """Returns the shape whose heads and neurons lose the same share, if its ratio is the one given, as it is written.

    Published ratios are rounded: 21.02 % of LLaMA-2 7B stands for 7 of 32 heads and 7/32 of the neurons, although a
    shape with one neuron more lies nearer to 0.2102. A ratio with more than four decimals is taken as exact.
    """
    ratio = options.ratio
    if not preferred or ratio is None or round(ratio, 4) != ratio or options.only:
        return None
    if multiples(shape, options) != (1,):
        return None
    neurons = _to_multiple(shape.intermediate_size * (1 - _prunable_share(shape, ratio)), 1, shape.intermediate_size)
    share = _removed_share(shape, choices, preferred[0], neurons)
    return (preferred[0], neurons) if round(share, 4) == ratio else None


def _prunable_share(shape: ModelShape, ratio: float) -> float:
    """Returns r = c * P / (A + M), the share that attention and MLPs must both lose."""
    return ratio * shape.parameters / (shape.attention_parameters + shape.mlp_parameters)


def asked_ratio(shape: ModelShape, options: PlanOptions) -> float | None:
    """Returns the share of the parameters to remove that was asked for, as a ratio or as a number; None: neither."""
    if options.target_parameters is None:
        return options.ratio
    return 1 - options.target_parameters / shape.parameters


def _ratio(shape: ModelShape, options: PlanOptions) -> float:
    """Returns the ratio that was asked for, which options that were checked have where a share is open."""
    ratio = asked_ratio(shape, options)
    assert ratio is not None
    return ratio


def _nearest(allowed: Sequence[int], wanted: float) -> int:
    return min(allowed, key=lambda value: (abs(value - wanted), value))


def _to_multiple(wanted: float, multiple: int, most: int) -> int:
    """Rounds to the nearest multiple, of at least one and of at most `most`."""
    return multiple * min(max(round(wanted / multiple), 1), most // multiple)


def _unreachable(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> PlanError:
    ratio, ranges = _ratio(shape, options), _reachable(shape, choices, options)
    below, above = [high for _, high in ranges if high < ratio], [low for low, _ in ranges if low > ratio]
    because = f" (heads cannot be removed: {shape.heads_refused})" if shape.heads_refused else ""
    asked = f"a ratio of {ratio}"
    if (parameters := options.target_parameters) is not None:
        smallest = round((1 - max((high for _, high in ranges), default=0.0)) * shape.parameters)
        asked, what = f"a target of {parameters:,} parameters", f"the smallest reachable is {smallest:,}"
    elif not above:
        what = f"the largest reachable is {_rounded_down(max(below, default=0.0))}"
    elif not below:
        what = f"the smallest reachable is {_rounded_up(min(above))}"
    else:
        nearest = f"{_rounded_down(max(below))} and {_rounded_up(min(above))}"
        what = f"heads come in whole units, and the nearest reachable are {nearest}"
    return PlanError(
        f"{asked} cannot be reached with these options: {what}{because}; every layer keeps at least one "
        f"head and {smallest_multiple(options)} of its neurons, and embeddings and norms are never pruned"
    )


def _removes_nothing(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> PlanError:
    asked = "heads_ratio and neurons_ratio together" if options.ratio is None else f"a ratio of {options.ratio}"
    steps = [low for low, _ in _reachable(shape, choices, options) if low > 0]
    if options.only != "heads" and options.neurons_ratio is None:
        steps.append(smallest_multiple(options) * shape.neuron_parameters * shape.num_layers / shape.parameters)
    if (target := options.target_parameters) is not None:
        nearest = shape.parameters - round(min(steps, default=0.0) * shape.parameters)
        return PlanError(
            f"a target of {target:,} parameters would remove nothing: the model has {shape.parameters:,}, and the next "
            f"below is {nearest:,}"
        )
    smallest = f"the smallest step of these options is {min(steps):.2e} of the parameters" if steps else "ask for more"
    return PlanError(f"{asked} would remove nothing, as units are whole; {smallest}")


def _rounded_down(ratio: float) -> float:
    """Returns a ratio with four decimals that is no larger."""
    return math.floor(ratio * 1e4) / 1e4


def _rounded_up(ratio: float) -> float:
    """Returns a ratio with four decimals that is no smaller."""
    return math.ceil(ratio * 1e4) / 1e4
