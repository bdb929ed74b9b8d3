"""From scores and a ratio to a plan (Algorithm 1, lines 3 to 8)."""

import math
import random
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from amprune.errors import PlanError
from amprune.model.shape import ModelShape
from amprune.plan.artefact import LayerPlan, PruningPlan, check_plan
from amprune.plan.budget import asked_ratio, find_budget
from amprune.plan.depth import find_depth, removed_blocks
from amprune.plan.heads import Budget, check_budget
from amprune.plan.options import applied_multiple, recorded
from amprune.settings import Order, PlanOptions, settle

if TYPE_CHECKING:  # numbers in a row serve as scores; numpy need not be there
    from amprune.scoring.scores import ImportanceScores, LayerScores, Scores


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
    options = settle(PlanOptions, settings, single)
    if scores.blocks is None:
        return _by_width(scores, options, budget)
    if budget is not None:
        raise PlanError("a budget of heads and neurons means nothing to scores of whole blocks; leave it out")
    return _by_depth(scores, scores.blocks, options)


def check_request(shape: ModelShape, options: PlanOptions, *, depth: bool) -> None:
    """Refuses, without scores, options that no plan of the model can be made with; `depth` removes whole blocks."""
    (find_depth if depth else find_budget)(shape, options)


def _by_width(scores: "ImportanceScores", options: PlanOptions, budget: Budget | None) -> PruningPlan:
    """Chooses the units of each layer."""
    shape, given = scores.shape, {} if budget is None else {"budget": asdict(budget)}
    if budget is None:
        budget = find_budget(shape, options)
    else:
        check_budget(shape, budget, options)
    after = shape.shrunk(query_heads=budget.query_heads, key_value_heads=budget.key_value_heads, neurons=budget.neurons)
    asked = asked_ratio(shape, options)
    missed = math.inf if asked is None else abs(1 - after.parameters / shape.parameters - asked)
    used = {
        "heads_mode": budget.heads_mode,
        "neuron_multiple": applied_multiple(shape, budget.neurons, options, missed=missed),
    }
    layers = tuple(_keep_layer(layer, index, budget, options) for index, layer in enumerate(scores.layers))
    return _plan(scores, options, after, layers, recorded(options, depth=False) | used | given)


def _by_depth(scores: "ImportanceScores", blocks: "Scores", options: PlanOptions) -> PruningPlan:
    """Chooses the blocks; those that stay keep every head and neuron."""
    shape = scores.shape
    units = {
        "query_heads": shape.num_attention_heads,
        "key_value_heads": shape.num_key_value_heads,
        "neurons": shape.intermediate_size,
    }
    gone = removed_blocks(blocks, find_depth(shape, options), options)
    after = shape.shrunk(**units, layers=shape.num_layers - len(gone))
    whole = LayerPlan(**{kind: tuple(range(count)) for kind, count in units.items()})
    layers = tuple(None if layer in gone else whole for layer in range(shape.num_layers))
    return _plan(scores, options, after, layers, recorded(options, depth=True))


def _plan(
    scores: "ImportanceScores",
    options: PlanOptions,
    after: ModelShape,
    layers: tuple[LayerPlan | None, ...],
    told: dict[str, Any],
) -> PruningPlan:
    """Puts a plan together, and holds it to its invariants."""
    actual, asked = 1 - after.parameters / scores.shape.parameters, asked_ratio(scores.shape, options)
    plan = PruningPlan(
        ratio_target=actual if asked is None else asked,
        ratio_actual=actual,
        shape_before=scores.shape,
        shape_after=after,
        layers=layers,
        options=told,
        provenance={
            "fingerprint": scores.fingerprint,
            "criterion": scores.criterion,
            "calibration": scores.calibration,
            "scoring": scores.settings,
        },
    )
    check_plan(plan)
    return plan


def _keep_layer(scores: "LayerScores", index: int, budget: Budget, options: PlanOptions) -> LayerPlan:
    generator = random.Random(f"{options.seed}/{index}") if options.order == "random" else None
    group_size = len(scores.heads) // len(scores.groups)
    groups = tuple(range(len(scores.groups)))
    queries: list[int] = []
    if budget.heads_mode == "groups":
        groups = _keep(scores.groups, budget.key_value_heads, options.order, generator)
    for group in groups:
        members = range(group * group_size, (group + 1) * group_size)
        kept = _keep(
            scores.heads[members.start : members.stop], budget.query_heads // len(groups), options.order, generator
        )
        queries += [members[head] for head in kept]
    return LayerPlan(tuple(queries), groups, _keep(scores.neurons, budget.neurons, options.order, generator))


def _keep(scores: "Scores", count: int, order: Order, generator: random.Random | None) -> tuple[int, ...]:
    """Returns the indices to keep, ascending; of equal scores the lower index stays."""
    indices = range(len(scores))
    if generator is not None:
        return tuple(sorted(generator.sample(indices, count)))
    sign = 1 if order == "reversed" else -1
    return tuple(sorted(sorted(indices, key=lambda index: (sign * scores[index], index))[:count]))
