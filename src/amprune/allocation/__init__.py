"""How much heads and how much neurons lose under one budget, chosen by the damage that each split does.

Candidates are every number of head units with the neurons that spend the rest of the budget. The damage of one is the
mean Kullback-Leibler divergence of its next-token distributions from the dense model's, on tokens that were not used
for scoring, with the removed units masked. Candidates are compared at equal cost: where numbers of neurons are rounded
to a multiple, which moves each candidate's share of the parameters by another amount, damage is measured before that.

choice.py   the candidates, the order in which they are measured, and the one that is chosen
damage.py   the divergence and the loss of the dense model under a change
"""

from amprune.allocation.choice import Allocation, Candidate, Refit, allocate, candidates, choose, plan_of
from amprune.allocation.damage import Damage, measure_changes

__all__ = [
    "Allocation",
    "Candidate",
    "Damage",
    "Refit",
    "allocate",
    "candidates",
    "choose",
    "measure_changes",
    "plan_of",
]
