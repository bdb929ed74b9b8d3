r"""Which numbers of heads can go, in whole units of two kinds; the same number from every layer.

Query heads over key-value heads, and what the two modes remove (9 query heads, 3 key-value heads, groups of 3):

    query       0 1 2   3 4 5   6 7 8        groups: a key-value head and all       within: the same number of
                \_|_/   \_|_/   \_|_/        query heads that read it               query heads in every group
    key-value     0       1       2          . . .   3 4 5   6 7 8                  0 . 2   3 4 .   . 7 8
                                               .       1       2                      0       1       2
"""

from dataclasses import dataclass, replace

from amprune.errors import PlanError
from amprune.model.backends import heads_split
from amprune.model.shape import ModelShape
from amprune.plan.options import check_options, heads_stay
from amprune.settings import HeadsMode, PlanOptions


@dataclass(frozen=True)
class Budget:
    """Units that every layer keeps."""

    heads_mode: HeadsMode
    query_heads: int
    key_value_heads: int
    neurons: int

    def left_of(self, shape: ModelShape) -> ModelShape:
        """Returns the shape of a model that keeps these units."""
        return shape.shrunk(query_heads=self.query_heads, key_value_heads=self.key_value_heads, neurons=self.neurons)


@dataclass(frozen=True)
class HeadChoices:
    """The numbers of head units that can be removed from every layer, and what one costs."""

    mode: HeadsMode
    units: int
    """Groups in a layer, or query heads in a group."""
    cost: int
    """Parameters of one unit, over all layers."""
    removable: tuple[int, ...]


def head_choices(shape: ModelShape, options: PlanOptions) -> HeadChoices:
    """Lists what can be removed of heads.

    Without a mode: groups, or within where there is one key-value head or no number of groups can be split over the
    devices.
    """
    mode = options.heads_mode or ("within" if shape.num_key_value_heads == 1 else "groups")
    choices = _choices(shape, options, "groups" if shape.group_size == 1 else mode)
    if options.heads_mode is None and options.tensor_parallel > 1 and not choices.removable:
        within = _choices(shape, options, "within")
        return within if within.removable else choices
    return choices


def _choices(shape: ModelShape, options: PlanOptions, mode: HeadsMode) -> HeadChoices:
    if mode == "groups":
        units = shape.num_key_value_heads
        cost = shape.group_size * shape.query_head_parameters + shape.key_value_head_parameters
    else:
        units, cost = shape.group_size, shape.num_key_value_heads * shape.query_head_parameters

    def fits(removed: int) -> bool:
        query_heads, key_value_heads = kept_heads(shape, mode, removed)
        counted = key_value_heads if mode == "groups" else query_heads
        return (removed == 0 or query_heads in shape.query_head_counts) and counted % options.head_multiple == 0

    # Heads that stay as they are need not obey a multiple.
    removable = (0,) if heads_stay(shape, options) else tuple(filter(fits, range(units)))
    split = tuple(r for r in removable if heads_split(*kept_heads(shape, mode, r), options.tensor_parallel))
    return HeadChoices(mode, units, cost * shape.num_layers, split)


def usable_heads(shape: ModelShape, options: PlanOptions) -> HeadChoices:
    """Returns what can be removed of heads, as `head_choices` does, and refuses options that leave no number."""
    choices = head_choices(shape, options)
    if choices.removable:
        return choices
    if head_choices(shape, replace(options, tensor_parallel=1)).removable:
        raise _no_split(shape, options)
    raise PlanError(
        f"no number of heads is a multiple of {options.head_multiple}: the {shape.model_type} model has "
        f"{shape.num_attention_heads} query and {shape.num_key_value_heads} key-value heads, and transformers "
        f"accepts {', '.join(map(str, shape.query_head_counts)) or 'only these'} query heads"
    )


def _no_split(shape: ModelShape, options: PlanOptions) -> PlanError:
    """Says over how many devices the heads that may stay can be split, each with these heads."""
    sizes = []
    for devices in range(2, shape.num_attention_heads + 1):
        if options.only == "heads" and shape.intermediate_size % devices:
            continue
        if kept := kept_by_any_mode(shape, replace(options, tensor_parallel=devices)):
            sizes.append(f"{devices} ({', '.join(f'{queries}/{groups}' for queries, groups in kept[::-1])})")
    because = f" with heads_mode={options.heads_mode}" if options.heads_mode else ""
    if heads_stay(shape, options):
        because = f" (heads stay: {shape.heads_refused or 'neurons alone are to go'})"
    return PlanError(
        f"no number of heads of the {shape.model_type} model, which has {shape.num_attention_heads} query and "
        f"{shape.num_key_value_heads} key-value heads, can be split over tensor_parallel={options.tensor_parallel} "
        f"devices{because}: query heads must be a multiple of it, key-value heads, too, or one of its divisors; with "
        f"these options can be split, with the query/key-value heads that each leaves: {'; '.join(sizes) or '1 alone'}"
    )


def choices_of_all_modes(shape: ModelShape, options: PlanOptions) -> tuple[HeadChoices, ...]:
    """Lists what can be removed of heads in the mode that is asked for, or in each; the default's comes first.

    What would be listed twice, such as that no head goes, is listed where it comes first.
    """
    default = head_choices(shape, options).mode
    other: HeadsMode = "within" if default == "groups" else "groups"
    modes: tuple[HeadsMode, ...] = (default, other) if options.heads_mode is None else (default,)
    found, seen = [], set[tuple[int, int]]()
    for mode in modes:
        choices = head_choices(shape, replace(options, heads_mode=mode))
        kept = {removed: kept_heads(shape, choices.mode, removed) for removed in choices.removable}
        found.append(replace(choices, removable=tuple(r for r in choices.removable if kept[r] not in seen)))
        seen |= set(kept.values())
    return tuple(choices for choices in found if choices.removable)


def kept_by_any_mode(shape: ModelShape, options: PlanOptions) -> list[tuple[int, int]]:
    """Lists the numbers of query and key-value heads that can stay, ascending."""
    found = choices_of_all_modes(shape, options)
    return sorted({kept_heads(shape, choices.mode, removed) for choices in found for removed in choices.removable})


def kept_heads(shape: ModelShape, mode: HeadsMode, removed: int) -> tuple[int, int]:
    """Returns the numbers of query and key-value heads that stay."""
    if mode == "groups":
        groups = shape.num_key_value_heads - removed
        return groups * shape.group_size, groups
    return shape.num_attention_heads - removed * shape.num_key_value_heads, shape.num_key_value_heads


def check_budget(shape: ModelShape, budget: Budget, options: PlanOptions) -> None:
    """Refuses numbers of units that no layer of the model can keep, or not with these options."""
    check_options(shape, options, decided=False)
    known = kept_by_any_mode(shape, replace(options, heads_mode=budget.heads_mode))
    if (budget.query_heads, budget.key_value_heads) not in known:
        raise PlanError(
            f"the budget keeps {budget.query_heads} query and {budget.key_value_heads} key-value heads, expected (mode "
            f"{budget.heads_mode}) {' or '.join(f'{queries} and {groups}' for queries, groups in known)}"
        )
    if not 1 <= budget.neurons <= shape.intermediate_size:
        raise PlanError(f"the budget keeps {budget.neurons} neurons, expected 1 to {shape.intermediate_size}")
    if budget.neurons % options.tensor_parallel:
        raise PlanError(
            f"the budget keeps {budget.neurons} neurons, expected a multiple of tensor_parallel="
            f"{options.tensor_parallel}"
        )
