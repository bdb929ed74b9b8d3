"""What every head, neuron or block is worth. START at `run.py`.

run.py          a model and a criterion -> scores
catalogue.py    data: the criteria, and what each is computed from
formulas.py     criteria over activations (Eq. 8 and 9, and AMP's rivals); weights.py: over the weights alone
activations.py  one forward pass, with hooks on the output projections, for all criteria over activations
gradients.py    one forward pass, and one backward pass block by block
blocks.py       scores of whole blocks
batches.py      the calibration set as padded batches
scores.py       scores as a value and as a file
"""
