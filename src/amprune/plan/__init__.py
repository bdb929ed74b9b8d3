"""Plans: which units every layer keeps. Needs neither the model nor torch.

options.py    what a user may ask, and what of it is refused
target.py     what is aimed at, as a text: parameters, bytes or a speedup
heads.py      which numbers of heads can go, and what a layer keeps
multiples.py  of which multiple the number of neurons is
budget.py     ratio or parameters -> numbers of heads and neurons, the same in every layer
depth.py      ratio and scores of whole blocks -> the blocks that stay
make.py       scores and these numbers -> the units of each layer
artefact.py   `plan.json`: write, read, check
"""

from amprune.plan.artefact import LayerPlan, PruningPlan, check_plan
from amprune.plan.budget import asked_ratio, find_budget, largest_ratio, matching_neurons, unrounded
from amprune.plan.depth import find_depth, removable_blocks
from amprune.plan.heads import (
    Budget,
    HeadChoices,
    choices_of_all_modes,
    evenly,
    head_choices,
    kept_heads,
    usable_heads,
)
from amprune.plan.make import make_plan
from amprune.plan.multiples import multiples, smallest_multiple
from amprune.plan.options import HeadsMode, NeuronMultiple, Only, Order, PlanOptions, check_units
from amprune.plan.target import Target, parse_target

__all__ = [
    "Budget",
    "HeadChoices",
    "HeadsMode",
    "LayerPlan",
    "NeuronMultiple",
    "Only",
    "Order",
    "PlanOptions",
    "PruningPlan",
    "Target",
    "asked_ratio",
    "check_plan",
    "check_units",
    "choices_of_all_modes",
    "evenly",
    "find_budget",
    "find_depth",
    "head_choices",
    "kept_heads",
    "largest_ratio",
    "make_plan",
    "matching_neurons",
    "multiples",
    "parse_target",
    "removable_blocks",
    "smallest_multiple",
    "unrounded",
    "usable_heads",
]
