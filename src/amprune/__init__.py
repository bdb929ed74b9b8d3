"""amprune makes open language models smaller and faster by removing attention heads and MLP neurons.

The stages, each a module that reads and writes files (`pipeline.py` runs them in order):

    MODEL -> score -> scores.safetensors -> make_plan -> plan.json -> apply_plan (and refit) -> OUT -> verify
    OUT -> quantize -> OUT of fewer bits; OUT -> export_gguf -> OUT.gguf, which llama.cpp runs
    OUT -> recover -> OUT; any models -> evaluate -> evaluation.json -> write_report -> report.html

The method is AMP: "Efficient LLMs with AMP: Attention Heads and MLP Pruning", arXiv 2504.21174.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where they are installed, transformers imports them with itself, and they speak of kernels that this machine lacks.
for _library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_library).setLevel(logging.ERROR)

if TYPE_CHECKING:
    from amprune.calibration import CalibrationSet, load_calibration
    from amprune.errors import (
        AmpruneError,
        CalibrationError,
        CheckpointError,
        EvaluationError,
        ExportError,
        MissingDependencyError,
        PlanError,
        PushError,
        QuantizationError,
        ReconstructionError,
        RecoveryError,
        ReportError,
        ScoresError,
        UnsupportedModelError,
        VerificationError,
    )
    from amprune.evaluation import Evaluation, LatencySettings, evaluate
    from amprune.experiments import ExperimentFiles, experiment
    from amprune.inspection import inspect
    from amprune.llama_cpp import ExportedGguf, export_gguf
    from amprune.pipeline import prune, run
    from amprune.plan import PruningPlan, make_plan
    from amprune.quantization import QuantizedModel, quantize
    from amprune.recovery import RecoveredModel, RecoverySettings, recover
    from amprune.report import write_report
    from amprune.scores import ImportanceScores
    from amprune.shape import ModelShape
    from amprune.sharing import PushedModel, push
    from amprune.slicing import prune_model
    from amprune.stages import PrunedModel, apply_plan, draw_calibration, score, verify
    from amprune.verification import VerificationReport

_MODULES = {
    "calibration": ("CalibrationSet", "load_calibration"),
    "errors": (
        "AmpruneError",
        "CalibrationError",
        "CheckpointError",
        "EvaluationError",
        "ExportError",
        "MissingDependencyError",
        "PlanError",
        "PushError",
        "QuantizationError",
        "ReconstructionError",
        "RecoveryError",
        "ReportError",
        "ScoresError",
        "UnsupportedModelError",
        "VerificationError",
    ),
    "evaluation": ("Evaluation", "LatencySettings", "evaluate"),
    "experiments": ("ExperimentFiles", "experiment"),
    "inspection": ("inspect",),
    "llama_cpp": ("ExportedGguf", "export_gguf"),
    "pipeline": ("prune", "run"),
    "plan": ("PruningPlan", "make_plan"),
    "quantization": ("QuantizedModel", "quantize"),
    "recovery": ("RecoveredModel", "RecoverySettings", "recover"),
    "report": ("write_report",),
    "scores": ("ImportanceScores",),
    "shape": ("ModelShape",),
    "sharing": ("PushedModel", "push"),
    "slicing": ("prune_model",),
    "stages": ("PrunedModel", "apply_plan", "draw_calibration", "score", "verify"),
    "verification": ("VerificationReport",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AmpruneError",
    "CalibrationError",
    "CalibrationSet",
    "CheckpointError",
    "Evaluation",
    "EvaluationError",
    "ExperimentFiles",
    "ExportError",
    "ExportedGguf",
    "ImportanceScores",
    "LatencySettings",
    "MissingDependencyError",
    "ModelShape",
    "PlanError",
    "PrunedModel",
    "PruningPlan",
    "PushError",
    "PushedModel",
    "QuantizationError",
    "QuantizedModel",
    "ReconstructionError",
    "RecoveredModel",
    "RecoveryError",
    "RecoverySettings",
    "ReportError",
    "ScoresError",
    "UnsupportedModelError",
    "VerificationError",
    "VerificationReport",
    "apply_plan",
    "draw_calibration",
    "evaluate",
    "experiment",
    "export_gguf",
    "inspect",
    "load_calibration",
    "make_plan",
    "prune",
    "prune_model",
    "push",
    "quantize",
    "recover",
    "run",
    "score",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `import amprune` and `amprune --help` stay instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'amprune' has no attribute {name!r}")
    return getattr(import_module(f"amprune.{_HOME[name]}"), name)
