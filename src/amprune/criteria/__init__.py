"""Importance criteria: functions from captured activations, weights and gradients to scores.

catalogue.py     every criterion by its name, with its formula and source
activations.py   those over the inputs of the output projections, AMP's among them
weights.py       those over the weights that a unit owns
"""

from amprune.criteria.catalogue import CRITERIA, DEFAULT, Criterion, Needs, find_criterion

__all__ = ["CRITERIA", "DEFAULT", "Criterion", "Needs", "find_criterion"]
