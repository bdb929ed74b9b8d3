"""Plans: which units every layer keeps. Needs neither the model nor torch. START at `make.py`.

options.py   what a user may ask, what of it is refused, and of which multiple the neurons are
heads.py     which numbers of heads can go, and what a layer keeps
budget.py    ratio or parameters -> numbers of heads and neurons, the same in every layer, or of blocks
target.py    what is aimed at, as a text: parameters, bytes or a speedup -> the most parameters that may stay
make.py      scores and these numbers -> the units of each layer
artefact.py  the plan, its invariants, and `plan.json`
"""
