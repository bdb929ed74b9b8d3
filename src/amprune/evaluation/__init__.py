"""What pruning cost and what it gained.

run.py          evaluate(): every measurement of one model or several, in order; what of it is done
identity.py     MODEL -> name, folder, hash
measurement.py  what a measurement is given; NaN logits, memory that runs out
data.py         WikiText-2, texts and task files, checked
perplexity.py   windows of a text
zero_shot.py    lm-evaluation-harness
size.py         parameters, bytes, multiply-accumulates
latency.py      seconds and peak memory of generating
energy.py       watt-hours through CodeCarbon
workload.py     hours, money and CO2 of a workload
records.py      evaluation.json
comparison.py   two records on the same items: the paired difference
"""
