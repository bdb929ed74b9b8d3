"""From a plan to a smaller checkpoint.

run.py         plan -> OUT: sliced, refitted, verified, with its records
slicing.py     plan and family -> indices per tensor, output config; a model in memory
masking.py     the dense model made to compute what a pruned one would
biases.py      biases that make up for what is removed
refit/         kept output weights refitted in closed form, so that layers give what they gave before
inspection.py  what a model is made of and what can be cut from it
"""
