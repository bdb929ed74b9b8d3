r"""The exact budget: from a ratio to the numbers of heads and neurons that every layer keeps.

Query heads over key-value heads, and what the two modes remove (9 query heads, 3 key-value heads, groups of 3):

    query       0 1 2   3 4 5   6 7 8        groups: a key-value head and all       within: the same number of
                \_|_/   \_|_/   \_|_/        query heads that read it               query heads in every group
    key-value     0       1       2          . . .   3 4 5   6 7 8                  0 . 2   3 4 .   . 7 8
                                               .       1       2                      0       1       2
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from amprune.errors import PlanError
from amprune.plan.options import HeadsMode, PlanOptions, check_options, heads_stay
from amprune.shape import ModelShape


@dataclass(frozen=True)
class Budget:
    """Units that every layer keeps."""

    heads_mode: HeadsMode
    query_heads: int
    key_value_heads: int
    neurons: int


@dataclass(frozen=True)
class HeadChoices:
    """The numbers of head units that can be removed from every layer, and what one costs."""

    mode: HeadsMode
    units: int
    """Groups in a layer, or query heads in a group."""
    cost: int
    """Parameters of one unit, over all layers."""
    removable: tuple[int, ...]


def find_budget(shape: ModelShape, options: PlanOptions) -> Budget:
    """Spends the ratio on heads, rounded to whole units, and on neurons, which make up the exact rest.

    Raises:
        PlanError: an option is wrong, the ratio is out of reach or too small to remove anything, or the family's heads
            cannot be removed.
    """
    check_options(shape, options)
    choices = head_choices(shape, options)
    if not choices.removable:
        raise PlanError(
            f"no number of heads is a multiple of {options.head_multiple}: the {shape.model_type} model has "
            f"{shape.num_attention_heads} query and {shape.num_key_value_heads} key-value heads, and transformers "
            f"accepts {', '.join(map(str, shape.query_head_counts)) or 'only these'} query heads"
        )
    removed, neurons = _spend(shape, choices, options)
    if (removed, neurons) == (0, shape.intermediate_size):
        raise _removes_nothing(shape, choices, options)
    query_heads, key_value_heads = _kept_heads(shape, choices.mode, removed)
    return Budget(choices.mode, query_heads, key_value_heads, neurons)


def head_choices(shape: ModelShape, options: PlanOptions) -> HeadChoices:
    """Lists what can be removed of heads; without a mode: groups, or within where there is one key-value head."""
    mode = options.heads_mode or ("within" if shape.num_key_value_heads == 1 else "groups")
    if shape.group_size == 1:
        mode = "groups"
    if mode == "groups":
        units = shape.num_key_value_heads
        cost = shape.group_size * shape.query_head_parameters + shape.key_value_head_parameters
    else:
        units, cost = shape.group_size, shape.num_key_value_heads * shape.query_head_parameters

    def fits(removed: int) -> bool:
        query_heads, key_value_heads = _kept_heads(shape, mode, removed)
        counted = key_value_heads if mode == "groups" else query_heads
        return (removed == 0 or query_heads in shape.query_head_counts) and counted % options.head_multiple == 0

    if heads_stay(shape, options):
        # Heads that stay as they are need not obey a multiple.
        return HeadChoices(mode, units, cost * shape.num_layers, (0,))
    return HeadChoices(mode, units, cost * shape.num_layers, tuple(filter(fits, range(units))))


def _kept_heads(shape: ModelShape, mode: HeadsMode, removed: int) -> tuple[int, int]:
    """Returns the numbers of query and key-value heads that stay."""
    if mode == "groups":
        groups = shape.num_key_value_heads - removed
        return groups * shape.group_size, groups
    return shape.num_attention_heads - removed * shape.num_key_value_heads, shape.num_key_value_heads


def largest_ratio(shape: ModelShape, options: PlanOptions) -> float:
    """Returns the largest pruning ratio that the options leave, with a head (or group) and a neuron in every layer."""
    return max((high for _, high in _reachable(shape, head_choices(shape, options), options)), default=0.0)


def _reachable(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> list[tuple[float, float]]:
    """Lists the lowest and highest ratio for each number of heads that can be removed; there may be gaps between."""
    removable, width, multiple = choices.removable, shape.intermediate_size, options.neuron_multiple
    if removable and options.heads_ratio is not None:
        removable = (_nearest(removable, options.heads_ratio * choices.units),)
    if options.only == "heads" or options.neurons_ratio is not None:
        most = fewest = _neurons_by_hand(shape, options)
    else:
        most, fewest = width // multiple * multiple, multiple

    def ratio(removed: int, neurons: int) -> float:
        spent = removed * choices.cost + (width - neurons) * shape.neuron_parameters * shape.num_layers
        return spent / shape.parameters

    return [(ratio(removed, most), ratio(removed, fewest)) for removed in removable]


def _neurons_by_hand(shape: ModelShape, options: PlanOptions) -> int:
    """Returns the neurons kept where `neurons_ratio` or `only` settles them."""
    if not options.neurons_ratio:
        return shape.intermediate_size
    wanted = shape.intermediate_size * (1 - options.neurons_ratio)
    return _to_multiple(wanted, options.neuron_multiple, shape.intermediate_size)


def _spend(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> tuple[int, int]:
    """Returns the number of head units removed and of neurons kept in every layer."""
    neuron_cost, width = shape.neuron_parameters * shape.num_layers, shape.intermediate_size
    if options.only == "heads" or options.neurons_ratio is not None:
        neurons = _neurons_by_hand(shape, options)
        return _heads_for(shape, choices, options, (width - neurons) * neuron_cost), neurons
    ratio = _ratio(options)
    preferred = _preferred(shape, choices, options)
    if (equal := _equal_shares(shape, choices, options, preferred)) is not None:
        return equal
    for removed in preferred:
        wanted = width - (ratio * shape.parameters - removed * choices.cost) / neuron_cost
        neurons = _to_multiple(wanted, options.neuron_multiple, width)
        if abs(neurons - wanted) <= options.neuron_multiple / 2 + 1e-6:
            return removed, neurons
    raise _unreachable(shape, choices, options)


def _equal_shares(
    shape: ModelShape, choices: HeadChoices, options: PlanOptions, preferred: Sequence[int]
) -> tuple[int, int] | None:
    """Returns the shape whose heads and neurons lose the same share, if its ratio is the one given, as it is written.

    Published ratios are rounded: 21.02 % of LLaMA-2 7B stands for 7 of 32 heads and 7/32 of the neurons, although a
    shape with one neuron more lies nearer to 0.2102. A ratio with more than four decimals is taken as exact.
    """
    ratio = _ratio(options)
    if not preferred or round(ratio, 4) != ratio or (options.neuron_multiple, options.only) != (1, None):
        return None
    share = _prunable_share(shape, ratio)
    neurons = _to_multiple(shape.intermediate_size * (1 - share), 1, shape.intermediate_size)
    removed = preferred[0] * choices.cost
    removed += (shape.intermediate_size - neurons) * shape.neuron_parameters * shape.num_layers
    return (preferred[0], neurons) if round(removed / shape.parameters, 4) == ratio else None


def _prunable_share(shape: ModelShape, ratio: float) -> float:
    """Returns r = c * P / (A + M), the share that attention and MLPs must both lose."""
    return ratio * shape.parameters / (shape.attention_parameters + shape.mlp_parameters)


def _ratio(options: PlanOptions) -> float:
    if options.ratio is None:
        raise PlanError("give a ratio, or both heads_ratio and neurons_ratio")
    return options.ratio


def _heads_for(shape: ModelShape, choices: HeadChoices, options: PlanOptions, spent: int) -> int:
    """Returns the head units to remove where the neurons are settled and have taken `spent` parameters."""
    if options.ratio is None or options.heads_ratio is not None or heads_stay(shape, options):
        return _nearest(choices.removable, (options.heads_ratio or 0) * choices.units)
    wanted = (options.ratio * shape.parameters - spent) / choices.cost
    if not min(choices.removable) - 0.5 <= wanted <= max(choices.removable) + 0.5:
        raise _unreachable(shape, choices, options)
    return _nearest(choices.removable, wanted)


def _preferred(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> list[int]:
    """Orders the numbers of head units to remove by how well they suit; the later ones serve extreme ratios."""
    if choices.removable == (0,):
        return [0]
    if options.heads_ratio is not None:
        return [_nearest(choices.removable, options.heads_ratio * choices.units)]
    wanted = _prunable_share(shape, _ratio(options)) * shape.attention_parameters / choices.cost
    if shape.group_size > 1:
        # Few and large units: one too many costs far more quality than the same parameters in neurons.
        whole = math.floor(wanted + 1e-9)
        return sorted(choices.removable, key=lambda removed: (removed > whole, abs(removed - wanted)))
    return sorted(choices.removable, key=lambda removed: (abs(removed - wanted), removed))


def _nearest(allowed: Sequence[int], wanted: float) -> int:
    return min(allowed, key=lambda value: (abs(value - wanted), value))


def _to_multiple(wanted: float, multiple: int, most: int) -> int:
    """Rounds to the nearest multiple, of at least one and of at most `most`."""
    return multiple * min(max(round(wanted / multiple), 1), most // multiple)


def _unreachable(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> PlanError:
    ratio, ranges = _ratio(options), _reachable(shape, choices, options)
    below, above = [high for _, high in ranges if high < ratio], [low for low, _ in ranges if low > ratio]
    because = f" (heads cannot be removed: {shape.heads_refused})" if shape.heads_refused else ""
    if not above:
        what = f"the largest reachable is {rounded_down(max(below, default=0.0))}"
    elif not below:
        what = f"the smallest reachable is {rounded_up(min(above))}"
    else:
        nearest = f"{rounded_down(max(below))} and {rounded_up(min(above))}"
        what = f"heads come in whole units, and the nearest reachable are {nearest}"
    return PlanError(
        f"a ratio of {ratio} cannot be reached with these options: {what}{because}; every layer keeps at least one "
        f"head and {options.neuron_multiple} of its neurons, and embeddings and norms are never pruned"
    )


def _removes_nothing(shape: ModelShape, choices: HeadChoices, options: PlanOptions) -> PlanError:
    asked = "heads_ratio and neurons_ratio together" if options.ratio is None else f"a ratio of {options.ratio}"
    steps = [low for low, _ in _reachable(shape, choices, options) if low > 0]
    if options.only != "heads" and options.neurons_ratio is None:
        steps.append(options.neuron_multiple * shape.neuron_parameters * shape.num_layers / shape.parameters)
    smallest = f"the smallest step of these options is {min(steps):.2e} of the parameters" if steps else "ask for more"
    return PlanError(f"{asked} would remove nothing, as units are whole; {smallest}")


def rounded_down(ratio: float) -> float:
    """Returns a ratio with four decimals that is no larger."""
    return math.floor(ratio * 1e4) / 1e4


def rounded_up(ratio: float) -> float:
    """Returns a ratio with four decimals that is no smaller."""
    return math.ceil(ratio * 1e4) / 1e4
