"""Recovery by training: LoRA as in the paper, full fine-tuning, distillation from the dense model.

run.py            START HERE: data, training, merge, records, in order
models.py         the model to train, with its adapters, and the one that teaches
training.py       the transformers Trainer, with our loss, log and checkpoints
distillation.py   divergence from a teacher
runs.py           the folder of a run, and going on with it
merging.py        adapter + checkpoint -> checkpoint
"""
