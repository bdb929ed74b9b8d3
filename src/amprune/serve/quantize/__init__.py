"""A model with fewer bits a weight, in a format that stock transformers loads, without training or calibration.

run.py      MODEL -> OUT, in order; start here
schemes.py  the types, as data; which layers are quantised; group sizes
packing.py  weights as torchao and bitsandbytes pack them
check.py    what was stored, against the source; what stock transformers makes of it
"""
