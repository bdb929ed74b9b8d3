"""From scores and a ratio to a plan (Algorithm 1, lines 3 to 8). START HERE in this folder."""

import math
import random
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from amprune.errors import PlanError
from amprune.model.shape import ModelShape
from amprune.plan.artefact import LayerPlan, PruningPlan, check_plan
from amprune.plan.budget import asked_ratio, find_budget, find_depth
from amprune.plan.heads import Budget, check_budget
from amprune.plan.options import applied_multiple, recorded
from amprune.settings import PlanOptions, settle

if TYPE_CHECKING:  # numbers in a row serve as scores; numpy need not be there
    from amprune.scoring.scores import ImportanceScores, LayerScores, Scores

_Kept = tuple[ModelShape, tuple[LayerPlan | None, ...], dict[str, Any]]
"""The sizes of what stays, what each layer keeps, and what the plan records of the options."""


def make_plan(
    scores: "ImportanceScores", settings: PlanOptions | None = None, *, budget: Budget | None = None, **single: Any
) -> PruningPlan:
    """Chooses the units to keep so that the model loses `ratio` of its parameters.

    Attention and MLPs both lose the share `ratio * P / (A + M)`: heads are rounded to whole units (down for key-value
    groups, of which there are few), neurons make up the exact rest. Scores of whole decoder blocks remove as many
    blocks as come nearest to the ratio, and nothing of those that stay.

    Args:
        scores: of the model to be pruned.
        settings: what is asked for. A share of heads or of neurons that is set by hand leaves the rest of the ratio to
            the other; with both, they alone decide, and the ratio must be left out. The `neuron_multiple` "hardware"
            is settled by the size of the layer: 256 where that costs at most 0.25 % of the parameters, else 64, and
            less in layers that are too narrow. Blocks that are protected unless told otherwise are those of Shortened
            LLaMA (arXiv 2402.02834).
        budget: the numbers of units to keep, such as an allocation has chosen; the settings then say what was asked
            for, and in which order units go.
        single: options of `PlanOptions`, such as `ratio=0.2`.

    Raises:
        PlanError: the ratio is out of reach (says the nearest) or removes nothing, options contradict each other, or
            the family's heads cannot be removed, or no number of heads can be split over the devices.
    """
    options, shape = settle(PlanOptions, settings, single), scores.shape
    if scores.blocks is not None and budget is not None:
        raise PlanError("a budget of heads and neurons means nothing to scores of whole blocks; leave it out")
    after, layers, told = (
        _by_width(scores, options, budget) if scores.blocks is None else _by_depth(shape, scores.blocks, options)
    )
    actual, asked = 1 - after.parameters / shape.parameters, asked_ratio(shape, options)
    provenance = {
        "fingerprint": scores.fingerprint,
        "criterion": scores.criterion,
        "calibration": scores.calibration,
        "scoring": scores.settings,
    }
    plan = PruningPlan(actual if asked is None else asked, actual, shape, after, layers, provenance, told)
    check_plan(plan)
    return plan


def check_request(shape: ModelShape, options: PlanOptions, *, depth: bool) -> None:
    """Refuses, without scores, options that no plan of the model can be made with; `depth` removes whole blocks."""
    (find_depth if depth else find_budget)(shape, options)


def _by_width(scores: "ImportanceScores", options: PlanOptions, given: Budget | None) -> _Kept:
    """Chooses the units of each layer."""
    shape = scores.shape
    if given is not None:
        check_budget(shape, given, options)
    budget = find_budget(shape, options) if given is None else given
    after, asked = budget.left_of(shape), asked_ratio(shape, options)
    missed = math.inf if asked is None else abs(1 - after.parameters / shape.parameters - asked)
    told = recorded(options, depth=False) | {
        "heads_mode": budget.heads_mode,
        "neuron_multiple": applied_multiple(shape, budget.neurons, options, missed=missed),
        **({} if given is None else {"budget": asdict(given)}),
    }
    return after, tuple(_keep_layer(layer, i, budget, options) for i, layer in enumerate(scores.layers)), told


def _by_depth(shape: ModelShape, blocks: "Scores", options: PlanOptions) -> _Kept:
    """Chooses the blocks, of equal ones those of the lower index; those that stay keep every head and neuron."""
    count, candidates = find_depth(shape, options), range(options.protect_first, len(blocks) - options.protect_last)
    if options.order == "random":
        gone = random.Random(f"{options.seed}/blocks").sample(candidates, count)
    else:
        sign = -1 if options.order == "reversed" else 1
        gone = sorted(candidates, key=lambda block: (sign * blocks[block], -block))[:count]
    units = (shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size)
    after = shape.shrunk(
        query_heads=units[0], key_value_heads=units[1], neurons=units[2], layers=shape.num_layers - count
    )
    whole = LayerPlan(*(tuple(range(total)) for total in units))
    layers = tuple(None if layer in gone else whole for layer in range(shape.num_layers))
    return after, layers, recorded(options, depth=True)


def _keep_layer(scores: "LayerScores", index: int, budget: Budget, options: PlanOptions) -> LayerPlan:
    generator = random.Random(f"{options.seed}/{index}") if options.order == "random" else None
    group_size = len(scores.heads) // len(scores.groups)
    groups = tuple(range(len(scores.groups)))
    queries: list[int] = []
    if budget.heads_mode == "groups":
        groups = _keep(scores.groups, budget.key_value_heads, options, generator)
    for first in (group * group_size for group in groups):
        members = scores.heads[first : first + group_size]
        kept = _keep(members, budget.query_heads // len(groups), options, generator)
        queries += [first + head for head in kept]
    return LayerPlan(tuple(queries), groups, _keep(scores.neurons, budget.neurons, options, generator))


def _keep(scores: "Scores", count: int, options: PlanOptions, generator: random.Random | None) -> tuple[int, ...]:
    """Returns the indices to keep, ascending; of equal scores the lower index stays."""
    indices = range(len(scores))
    if generator is not None:
        return tuple(sorted(generator.sample(indices, count)))
    sign = 1 if options.order == "reversed" else -1
    return tuple(sorted(sorted(indices, key=lambda index: (sign * scores[index], index))[:count]))
