"""Closed-form refit of the kept output weights, no training.

run.py      checkpoint, plan and calibration text -> refitted tensors and a record of their errors
sweep.py    layer by layer, dense and pruned streams side by side -> what each output projection should have given
moments.py  second moments of a projection's inputs -> the change that the held-out tokens like best
blocks.py   one block at a time of a model that may be larger than memory
record.py   what `amprune/reconstruction.json` tells
"""
