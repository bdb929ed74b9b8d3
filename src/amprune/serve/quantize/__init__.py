"""A model with fewer bits a weight, in a format that stock transformers loads, without training or calibration.

run.py      MODEL -> OUT, in order; start here
schemes.py  the types, as data; which layers are quantised; group sizes
int8.py     weights as torchao packs them
int4.py     weights as bitsandbytes packs them
write.py    tensor by tensor into shards
check.py    what was stored, against the source; what stock transformers makes of it
"""
