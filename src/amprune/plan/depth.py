"""Depth: from a ratio to the number of whole decoder blocks that go, and from their scores to which."""

import math
import random
from typing import TYPE_CHECKING

from amprune.errors import PlanError
from amprune.model.shape import ModelShape
from amprune.plan.budget import asked_ratio, rounded_down, rounded_up
from amprune.plan.options import check_options
from amprune.settings import PlanOptions

if TYPE_CHECKING:
    from amprune.scoring.scores import Scores


def find_depth(shape: ModelShape, options: PlanOptions) -> int:
    """Returns how many decoder blocks go: as many as come nearest to the ratio, of two equally near the fewer.

    Of `target_parameters` it is the fewest that leave no more.
    """
    check_options(shape, options, depth=True)
    ratio = asked_ratio(shape, options)
    if ratio is None:
        raise PlanError("give a ratio or target_parameters: blocks are removed by their share of the parameters")
    most, step = removable_blocks(shape, options), shape.layer_parameters / shape.parameters
    protected = f"the first {options.protect_first} and the last {options.protect_last} blocks are protected"
    if most < 1:
        raise PlanError(
            f"none of the {shape.num_layers} blocks can be removed: {protected}, and at least one stays; lower "
            "protect_first or protect_last"
        )
    if options.target_parameters is not None:
        removed = math.ceil((shape.parameters - options.target_parameters) / shape.layer_parameters)
    else:
        removed = max(math.ceil(ratio / step - 0.5 - 1e-9), 0)
    if options.target_parameters is not None and removed <= 0:
        raise PlanError(
            f"a target of {options.target_parameters:,} parameters would remove no block: the model has "
            f"{shape.parameters:,}; without one block it has {shape.parameters - shape.layer_parameters:,}"
        )
    if removed == 0:
        raise PlanError(
            f"a ratio of {ratio} would remove no block, as each holds {step:.2%} of the parameters; the "
            f"nearest ratio that works is {rounded_up(step)}"
        )
    if removed > most:
        asked, reachable = f"a ratio of {ratio}", f"the largest ratio is {rounded_down(most * step)}"
        if (target := options.target_parameters) is not None:
            smallest = shape.parameters - most * shape.layer_parameters
            asked, reachable = f"a target of {target:,} parameters", f"the smallest reachable is {smallest:,}"
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


def removed_blocks(blocks: "Scores", count: int, options: PlanOptions) -> frozenset[int]:
    """Returns the blocks that go; of equal scores the higher index goes."""
    candidates = range(options.protect_first, len(blocks) - options.protect_last)
    if options.order == "random":
        return frozenset(random.Random(f"{options.seed}/blocks").sample(candidates, count))
    sign = -1 if options.order == "reversed" else 1
    return frozenset(sorted(candidates, key=lambda block: (sign * blocks[block], -block))[:count])
