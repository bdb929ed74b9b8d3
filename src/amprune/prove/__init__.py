"""Proof that a written checkpoint is the dense model without the removed units, and nothing else.

checks.py   every check, and the report of them; start at `verify_checkpoint`
logits.py   the masked dense model, and by how much the output's logits differ from its
card.py     README.md of an output, which tells of it
"""
