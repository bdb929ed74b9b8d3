"""Plans: which units every layer keeps. Needs neither the model nor torch.

budget.py     ratio -> numbers of heads and neurons, the same in every layer
make.py       scores and these numbers -> the units of each layer
artefact.py   `plan.json`: write, read, check
"""

from amprune.plan.artefact import LayerPlan, PruningPlan, check_plan
from amprune.plan.budget import HeadsMode, Only, Order, PlanOptions, find_budget, head_choices, largest_ratio
from amprune.plan.make import make_plan

__all__ = [
    "HeadsMode",
    "LayerPlan",
    "Only",
    "Order",
    "PlanOptions",
    "PruningPlan",
    "check_plan",
    "find_budget",
    "head_choices",
    "largest_ratio",
    "make_plan",
]
