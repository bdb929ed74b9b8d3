"""Plans that are measured on the model itself.

run.py         scores and options -> a plan whose split or speed was measured
allocation.py  how much heads and neurons lose under one budget, by the damage that each split does
damage.py      the divergence and the loss of the dense model under a change
speedup.py     a speedup -> for each number of heads the most neurons that reach it
timing.py      models of random weights, timed side by side with the dense one

The damage of a split is the mean Kullback-Leibler divergence of its next-token distributions from the dense model's, on
tokens that were not used for scoring, with the removed units masked. Splits are compared at equal cost: where numbers
of neurons are rounded to a multiple, which moves the share of the parameters of each by another amount, damage is
measured before that.
"""
