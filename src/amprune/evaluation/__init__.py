"""What pruning cost and what it gained.

run.py          evaluate(): every measurement of one model or several, in order
identity.py     MODEL -> name, folder, hash
data.py         WikiText-2, texts and task files, checked
perplexity.py   windows of a text
zero_shot.py    lm-evaluation-harness
size.py         parameters, bytes, multiply-accumulates
energy.py       watt-hours through CodeCarbon
workload.py     hours, money and CO2 of a workload
guards.py       NaN logits, memory that runs out
figures.py      results -> records
session.py      one run: what is done, where, with which versions
records.py      evaluation.json
comparison.py   two records on the same items: the paired difference
"""
