"""The stages that make a pruned model, each alone: it reads files, or what they hold, and writes files.

MODEL -> score -> scores.safetensors -> make_plan -> plan.json -> apply_plan -> OUT, verified

scoring.py    calibration text -> scores
applying.py   plan -> OUT: sliced, refitted, verified, with its records
"""

from amprune.stages.applying import PrunedModel, apply_plan, verify
from amprune.stages.scoring import PathLike, draw_calibration, score, score_criteria

__all__ = ["PathLike", "PrunedModel", "apply_plan", "draw_calibration", "score", "score_criteria", "verify"]
