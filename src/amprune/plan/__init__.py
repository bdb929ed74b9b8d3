"""Plans: which units every layer keeps. Needs neither the model nor torch.

options.py    what a user may ask, and what of it is refused
target.py     what is aimed at, as a text: parameters, bytes or a speedup
heads.py      which numbers of heads can go, and what a layer keeps
multiples.py  of which multiple the number of neurons is
budget.py     ratio or parameters -> numbers of heads and neurons, the same in every layer
depth.py      ratio and scores of whole blocks -> the blocks that stay
make.py       scores and these numbers -> the units of each layer
artefact.py   `plan.json`: write, read, check
bytes.py      bytes of weights -> the most parameters that may stay
"""
