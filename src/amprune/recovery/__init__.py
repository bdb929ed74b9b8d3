"""Recovery by training: LoRA as in the paper, full fine-tuning, distillation from the dense model.

run.py            recover(): data, training, merge, comparison, in order
settings.py       the recipe
training.py       the transformers Trainer, with our loss, log and checkpoints
distillation.py   divergence from a teacher
adapters.py       LoRA adapters
merging.py        adapter + checkpoint -> checkpoint
"""
