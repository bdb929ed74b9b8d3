"""Plans: which units every layer keeps. Needs neither the model nor torch.

options.py    what a user may ask, and what of it is refused
budget.py     ratio -> numbers of heads and neurons, the same in every layer
depth.py      ratio and scores of whole blocks -> the blocks that stay
make.py       scores and these numbers -> the units of each layer
artefact.py   `plan.json`: write, read, check
"""

from amprune.plan.artefact import LayerPlan, PruningPlan, check_plan
from amprune.plan.budget import find_budget, head_choices, largest_ratio
from amprune.plan.depth import find_depth, removable_blocks
from amprune.plan.make import make_plan
from amprune.plan.options import HeadsMode, Only, Order, PlanOptions

__all__ = [
    "HeadsMode",
    "LayerPlan",
    "Only",
    "Order",
    "PlanOptions",
    "PruningPlan",
    "check_plan",
    "find_budget",
    "find_depth",
    "head_choices",
    "largest_ratio",
    "make_plan",
    "removable_blocks",
]
