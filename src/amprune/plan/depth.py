"""Depth: from a ratio to the number of whole decoder blocks that go, and from their scores to which."""

import math
import random
from dataclasses import fields

from amprune.errors import PlanError
from amprune.model.backends import reason_not_split
from amprune.model.shape import ModelShape
from amprune.plan.artefact import LayerPlan, PruningPlan, check_plan
from amprune.plan.budget import asked_ratio, rounded_down, rounded_up
from amprune.plan.options import check_devices, check_order, check_ratio, check_target, recorded
from amprune.scoring.scores import ImportanceScores, Scores
from amprune.settings import PlanOptions

OPTIONS = ("ratio", "target_parameters", "order", "seed", "protect_first", "protect_last", "tensor_parallel")
"""Options that mean something where whole blocks are removed."""


def find_depth(shape: ModelShape, options: PlanOptions) -> int:
    """Returns how many decoder blocks go: as many as come nearest to the ratio, of two equally near the fewer.

    Of `target_parameters` it is the fewest that leave no more.

    Raises:
        PlanError: an option is wrong or means nothing here, the ratio is out of reach or too small to remove a block,
            or blocks of this model cannot be removed.
    """
    _check_options(shape, options)
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


def _check_options(shape: ModelShape, options: PlanOptions) -> None:
    if shape.blocks_refused is not None:
        raise PlanError(f"blocks of a {shape.model_type} model cannot be removed: {shape.blocks_refused}")
    if not shape.layer_parameters:
        raise PlanError("the scores do not say how many parameters a block holds; score the model again")
    check_order(options)
    check_ratio(options)
    check_target(options)
    check_devices(options)
    if (reason := reason_not_split(shape, options.tensor_parallel)) is not None:
        raise PlanError(
            f"tensor_parallel is {options.tensor_parallel}, but blocks that stay keep their units: {reason}"
        )
    for field in fields(PlanOptions):
        value = getattr(options, field.name)
        if field.name not in OPTIONS and value != field.default:
            raise PlanError(
                f"{field.name} is {value}, but means nothing where whole blocks are removed; leave it out, or score "
                "by a criterion of heads and neurons"
            )
    for name, value in (("protect_first", options.protect_first), ("protect_last", options.protect_last)):
        if type(value) is not int or value < 0:
            raise PlanError(f"{name} is {value!r}, expected a number of blocks, at least 0")


def plan_depth(scores: ImportanceScores, blocks: Scores, options: PlanOptions) -> PruningPlan:
    """Chooses the blocks to keep; those that stay keep every head and neuron.

    Raises:
        PlanError: as in `find_depth`.
    """
    shape = scores.shape
    gone = _removed(blocks, find_depth(shape, options), options)
    whole = LayerPlan(
        tuple(range(shape.num_attention_heads)),
        tuple(range(shape.num_key_value_heads)),
        tuple(range(shape.intermediate_size)),
    )
    after = shape.shrunk(
        query_heads=shape.num_attention_heads,
        key_value_heads=shape.num_key_value_heads,
        neurons=shape.intermediate_size,
        layers=shape.num_layers - len(gone),
    )
    actual = 1 - after.parameters / shape.parameters
    plan = PruningPlan(
        ratio_target=actual if (asked := asked_ratio(shape, options)) is None else asked,
        ratio_actual=actual,
        shape_before=shape,
        shape_after=after,
        layers=tuple(None if layer in gone else whole for layer in range(shape.num_layers)),
        provenance={
            "fingerprint": scores.fingerprint,
            "criterion": scores.criterion,
            "calibration": scores.calibration,
            "scoring": scores.settings,
            "options": recorded(options, OPTIONS),
        },
    )
    check_plan(plan)
    return plan


def _removed(blocks: Scores, count: int, options: PlanOptions) -> frozenset[int]:
    """Returns the blocks that go; of equal scores the higher index goes."""
    candidates = range(options.protect_first, len(blocks) - options.protect_last)
    if options.order == "random":
        return frozenset(random.Random(f"{options.seed}/blocks").sample(candidates, count))
    sign = -1 if options.order == "reversed" else 1
    return frozenset(sorted(candidates, key=lambda block: (sign * blocks[block], -block))[:count])
