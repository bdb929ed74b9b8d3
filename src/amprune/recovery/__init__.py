"""Recovery by training: LoRA as in the paper, full fine-tuning, distillation from the dense model.

run.py            recover(): data, training, merge, comparison, in order
settings.py       the recipe
samples.py        instructions -> token ids and labels
training.py       the transformers Trainer, with our loss, log and checkpoints
distillation.py   divergence from a teacher
adapters.py       LoRA adapters
merging.py        adapter + checkpoint -> checkpoint
"""

from amprune.recovery.run import RecoveredModel, measure_epochs, recover
from amprune.recovery.settings import RecoverySettings

__all__ = ["RecoveredModel", "RecoverySettings", "measure_epochs", "recover"]
