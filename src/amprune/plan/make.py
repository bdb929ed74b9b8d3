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
from amprune.plan.options import HeadsMode, NeuronMultiple, Only, Order, PlanOptions, applied_multiple, recorded

if TYPE_CHECKING:  # numbers in a row serve as scores; numpy need not be there
    from amprune.scoring.scores import ImportanceScores, LayerScores, Scores


def make_plan(
    scores: "ImportanceScores",
    *,
    ratio: float | None = None,
    target_parameters: int | None = None,
    order: Order = "amp",
    only: Only | None = None,
    heads_mode: HeadsMode | None = None,
    heads_ratio: float | None = None,
    neurons_ratio: float | None = None,
    neuron_multiple: NeuronMultiple = 1,
    head_multiple: int = 1,
    tensor_parallel: int = 1,
    seed: int = 0,
    protect_first: int = 4,
    protect_last: int = 2,
    budget: Budget | None = None,
) -> PruningPlan:
    """Chooses the units to keep so that the model loses `ratio` of its parameters.

    Attention and MLPs both lose the share `ratio * P / (A + M)`: heads are rounded to whole units (down for key-value
    groups, of which there are few), neurons make up the exact rest.

    Scores of whole decoder blocks remove as many blocks as come nearest to the ratio, and nothing of those that stay;
    of the options they take `ratio`, `order`, `seed` and what is protected.

    Args:
        scores: of the model to be pruned.
        ratio: `1 - Q/P`, in (0, 1); left out when both shares are given.
        target_parameters: in the place of a ratio, the most parameters that may stay; never exceeded, and met to within
            one neuron (one `neuron_multiple`) per layer.
        order: `amp` removes the least important, `reversed` the most important, `random` a seeded draw.
        only: remove heads alone or neurons alone (the paper's ablation).
        heads_mode: `groups` removes key-value heads with their readers; `within` removes as many query heads in every
            group. The default is groups, and within for multi-query attention.
        heads_ratio: share of the heads to remove, set by hand; neurons make up the rest of `ratio`.
        neurons_ratio: share of the neurons to remove, set by hand; heads come as near to `ratio` as they can. With
            both shares set, they alone decide, and `ratio` must be left out.
        neuron_multiple: keep a multiple of this many neurons; `hardware` settles it by the size of the layer: 256 where
            that costs at most 0.25 % of the parameters, else 64, and less in layers that are too narrow. The provenance
            says which.
        head_multiple: keep a multiple of this many key-value heads (query heads when `within`).
        tensor_parallel: keep heads and neurons that so many devices can share out by vLLM's rule: query heads and
            neurons are multiples of it, key-value heads, too, or one of its divisors. The heads that a plan by depth
            keeps have to suit.
        seed: of the random order.
        protect_first: blocks at the start that stay, where whole blocks are removed; the default is that of Shortened
            LLaMA (arXiv 2402.02834).
        protect_last: the same at the end.
        budget: the numbers of units to keep, such as an allocation has chosen; the other options then say what was
            asked for, and in which order units go.

    Raises:
        PlanError: the ratio is out of reach (says the nearest) or removes nothing, options contradict each other, or
            the family's heads cannot be removed, or no number of heads can be split over the devices.
    """
    options = PlanOptions(
        ratio=ratio,
        target_parameters=target_parameters,
        order=order,
        only=only,
        heads_mode=heads_mode,
        heads_ratio=heads_ratio,
        neurons_ratio=neurons_ratio,
        neuron_multiple=neuron_multiple,
        head_multiple=head_multiple,
        tensor_parallel=tensor_parallel,
        seed=seed,
        protect_first=protect_first,
        protect_last=protect_last,
    )
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
