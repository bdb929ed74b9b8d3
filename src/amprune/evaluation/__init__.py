"""What pruning cost and what it gained.

run.py          evaluate(): every measurement of one model or several, in order
identity.py     MODEL -> name, folder, hash
data.py         WikiText-2, texts and task files, checked
perplexity.py   windows of a text
zero_shot.py    lm-evaluation-harness
latency.py      generation time, runs of several models interleaved; peak memory
size.py         parameters, bytes, multiply-accumulates
energy.py       watt-hours through CodeCarbon
workload.py     hours, money and CO2 of a workload
guards.py       NaN logits, memory that runs out
figures.py      results -> records
session.py      one run: what is done, where, with which versions
records.py      evaluation.json
comparison.py   two records on the same items: the paired difference
"""

from amprune.evaluation.comparison import Difference, paired
from amprune.evaluation.identity import names_of
from amprune.evaluation.latency import LatencySettings
from amprune.evaluation.records import Evaluation, ModelEntry, Record
from amprune.evaluation.run import evaluate

__all__ = ["Difference", "Evaluation", "LatencySettings", "ModelEntry", "Record", "evaluate", "names_of", "paired"]
