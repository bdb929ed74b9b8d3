"""Proof that a written checkpoint is the dense model without the removed units, and nothing else.

checks.py       every check of an output against its masked dense model; start at `verify_checkpoint`
comparison.py   one comparison of two models by their logits, for recovered, quantised and exported ones alike
card.py         README.md of an output: the one model card, written by every stage and renewed by a report
"""
