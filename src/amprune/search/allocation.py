"""Every split of one budget between heads and neurons, and the one that does the least damage."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from amprune.cut.masking import masked, swapped, whole_tensors
from amprune.model.architecture import Architecture, PreTrainedModel
from amprune.model.shape import ModelShape
from amprune.plan.artefact import PruningPlan
from amprune.plan.budget import find_budget, matching_neurons, unrounded
from amprune.plan.heads import Budget, choices_of_all_modes, kept_heads
from amprune.plan.make import make_plan
from amprune.plan.options import check_options
from amprune.running import Progress, no_progress
from amprune.scoring.scores import ImportanceScores
from amprune.search.damage import Damage, measure_changes
from amprune.settings import PlanOptions
from amprune.text.calibration import CalibrationSet

_Item = TypeVar("_Item")
logger = logging.getLogger(__name__)

MOST = 12
"""Candidates that are measured at once; of more, an even choice, and then the neighbours of the best."""
_POINT = 0.01
"""What misses the ratio by so much more than another candidate, its neurons rounded to a multiple, is not chosen."""
FINALISTS, NEAR = 3, 1.2
"""At most so many candidates are measured again with refitted weights, if they are as near to the best as this."""
Refit = Callable[[PruningPlan], Mapping[str, torch.Tensor]]
"""Gives the weights of a plan's pruned model that are no longer the dense ones, by their dense names."""


@dataclass(frozen=True)
class Candidate:
    """A split of the budget, and what was measured of it."""

    budget: Budget
    ratio: float
    """Share of the parameters that it removes."""
    damage: Damage
    """With the removed units masked and nothing else changed."""
    refitted: Damage | None = None
    """With refitted weights, where they were asked for and this is one of the best."""
    measured_neurons: int | None = None
    """Neurons that the damage was measured with, where the budget's are rounded to a multiple: with as many, every
    candidate removes the share that was asked for, and none looks better for removing less."""

    @property
    def kl(self) -> float:
        """The divergence that it is judged by."""
        return self.damage.kl if self.refitted is None else self.refitted.kl


@dataclass(frozen=True)
class Allocation:
    """Every candidate that was measured, from the fewest heads removed to the most, and the one that was chosen."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    dense_loss: float
    held_out: dict[str, Any]
    """Name, number and hash of the samples that the damage was measured on."""

    def to_dict(self) -> dict[str, Any]:
        """Returns what a plan records of its allocation."""
        return {
            "dense_loss": self.dense_loss,
            "held_out": self.held_out,
            "chosen": self.candidates.index(self.chosen),
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }


def candidates(shape: ModelShape, options: PlanOptions) -> tuple[Budget, ...]:
    """Lists every split of the budget between heads and neurons, from the fewest heads removed to the most.

    Both modes are in it unless one is asked for; those of a mode follow each other. Where a share is set by hand, or
    heads or neurons alone are to go, there is nothing to choose: the one budget of `find_budget` is returned.
    """
    check_options(shape, options)
    settled = [name for name in ("only", "heads_ratio", "neurons_ratio") if getattr(options, name) is not None]
    default = partial(find_budget, shape, options)
    if settled:
        logger.info("no allocation is searched for, as %s settles what heads and neurons lose", " and ".join(settled))
        return (default(),)
    if shape.heads_refused is not None:
        logger.info("no allocation is searched for, as heads stay: %s", shape.heads_refused)
        return (default(),)
    found = []
    for choices in choices_of_all_modes(shape, options):
        for removed in choices.removable:
            neurons = matching_neurons(shape, choices, removed, options)
            heads = kept_heads(shape, choices.mode, removed)
            if neurons is not None and (*heads, neurons) != _everything(shape):
                found.append(Budget(choices.mode, *heads, neurons))
    return tuple(found) or (default(),)


def _everything(shape: ModelShape) -> tuple[int, int, int]:
    return shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size


def allocate(
    model: PreTrainedModel,
    architecture: Architecture,
    scores: ImportanceScores,
    held_out: CalibrationSet,
    options: PlanOptions,
    *,
    budgets: Sequence[Budget] | None = None,
    refit: Refit | None = None,
    progress: Progress = no_progress,
) -> Allocation:
    """Measures the candidates and chooses the one that does the least damage.

    Args:
        model: the dense one, in evaluation mode; it is as it was afterwards.
        architecture: of the model.
        scores: of heads and neurons; each candidate keeps the best by them.
        held_out: samples that were not used for scoring.
        options: what is asked of the plan.
        budgets: the candidates, such as those that reach a speedup, measured as they are; the default is `candidates`,
            measured before their neurons are rounded to a multiple.
        refit: measures the best few with these weights, too, and chooses among them.
        progress: told how far it is.
    """
    splits = tuple(budgets) if budgets is not None else candidates(scores.shape, options)
    equal = {budget: budget if budgets is not None else unrounded(scores.shape, budget, options) for budget in splits}
    exact = replace(options, neuron_multiple=1, tensor_parallel=1)
    plans = {budget: make_plan(scores, exact, budget=equal[budget]) for budget in splits}
    measure = partial(measure_changes, model, samples=held_out, progress=progress)
    found: dict[Budget, Damage] = {}
    dense = Damage(0.0, 0.0)
    while wanted := _next(splits, found):
        dense, measured = measure([partial(masked, model, plans[budget], architecture) for budget in wanted])
        found |= zip(wanted, measured, strict=True)
    table = {b: _candidate(scores.shape, b, equal[b], found[b]) for b in splits if b in found}
    finalists = nearest(list(table.values()), options)
    if refit is not None:
        ranked, finalists = sorted(finalists, key=_by_damage), []
        near = [found for found in ranked[:FINALISTS] if found.kl <= NEAR * ranked[0].kl]
        for best in near if len(near) > 1 else ranked[:0]:
            plan = plans[best.budget]
            whole = whole_tensors(model, plan, architecture, refit(plan))
            _, (damage,) = measure([partial(_refitted, model, plan, architecture, whole)])
            table[best.budget] = replace(best, refitted=damage)
            finalists.append(table[best.budget])
        finalists = finalists or ranked
    return Allocation(tuple(table.values()), choose(finalists), dense.loss, held_out.to_dict())


def _candidate(shape: ModelShape, budget: Budget, measured: Budget, damage: Damage) -> Candidate:
    after = shape.shrunk(query_heads=budget.query_heads, key_value_heads=budget.key_value_heads, neurons=budget.neurons)
    neurons = None if measured == budget else measured.neurons
    return Candidate(budget, 1 - after.parameters / shape.parameters, damage, measured_neurons=neurons)


def nearest(found: Sequence[Candidate], options: PlanOptions) -> list[Candidate]:
    """Returns the candidates that may be chosen: those that miss the ratio by no more than a point beside the best."""
    if options.ratio is None:
        return list(found)
    missed = [abs(one.ratio - options.ratio) for one in found]
    return [one for one, by in zip(found, missed, strict=True) if by <= min(missed) + _POINT]


def choose(found: Sequence[Candidate]) -> Candidate:
    """Returns the candidate of the least damage; of equal ones that which removes the fewest heads."""
    return min(found, key=_by_damage)


def _by_damage(candidate: Candidate) -> tuple[float, int, int]:
    """Orders candidates; a millionth of a nat is within rounding."""
    return round(candidate.kl, 6), -candidate.budget.query_heads, -candidate.budget.key_value_heads


def plan_of(scores: ImportanceScores, allocation: Allocation, options: PlanOptions) -> PruningPlan:
    """Returns the plan of the chosen candidate; its provenance holds the whole table."""
    plan = make_plan(scores, options, budget=allocation.chosen.budget)
    return replace(plan, provenance={**plan.provenance, "allocation": allocation.to_dict()})


def evenly(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    """Returns at most so many of the items, spread evenly, the first and the last among them."""
    if len(items) <= most or most < 2:
        return items[:most]
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _next(splits: Sequence[Budget], found: Mapping[Budget, Damage]) -> list[Budget]:
    """Returns what is to be measured next: of many candidates a few, spread evenly, then the neighbours of the best."""
    if not found:
        return list(evenly(splits, MOST))
    best = splits.index(min(found, key=lambda budget: (found[budget].kl, splits.index(budget))))
    near = [splits[index] for index in (best - 1, best + 1) if 0 <= index < len(splits)]
    return [budget for budget in near if budget not in found]


@contextmanager
def _refitted(
    model: PreTrainedModel, plan: PruningPlan, architecture: Architecture, whole: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    with masked(model, plan, architecture), swapped(model, whole):
        yield
