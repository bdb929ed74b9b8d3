"""Proof that a written checkpoint is the dense model without the removed units, and nothing else.

checks.py   every check, and the report of them; start at `verify_checkpoint`
logits.py   the masked dense model, and by how much the output's logits differ from its
"""

from amprune.verification.checks import TOLERANCE, Check, VerificationReport, read_plan, verify_checkpoint
from amprune.verification.logits import probe_ids, probe_logits

__all__ = ["TOLERANCE", "Check", "VerificationReport", "probe_ids", "probe_logits", "read_plan", "verify_checkpoint"]
