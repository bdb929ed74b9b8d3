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
    from amprune.cut.inspection import inspect
    from amprune.cut.slicing import prune_model
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
    from amprune.evaluation.records import Evaluation
    from amprune.evaluation.run import evaluate
    from amprune.experiments.run import ExperimentFiles, experiment
    from amprune.model.latency import LatencySettings
    from amprune.model.shape import ModelShape
    from amprune.pipeline import PrunedModel, apply_plan, prune, run, verify
    from amprune.plan.artefact import PruningPlan
    from amprune.plan.make import make_plan
    from amprune.prove.checks import VerificationReport
    from amprune.recovery.run import RecoveredModel, recover
    from amprune.report.write import write_report
    from amprune.scoring.run import score
    from amprune.scoring.scores import ImportanceScores
    from amprune.serve.gguf.run import ExportedGguf, export_gguf
    from amprune.serve.hub.run import PushedModel, push
    from amprune.serve.quantize.run import QuantizedModel, quantize
    from amprune.settings import EvaluationSettings, PruneSettings, RecoverySettings, RunSettings
    from amprune.text.calibration import CalibrationSet, draw_calibration, load_calibration

_MODULES = {
    "cut.inspection": ("inspect",),
    "cut.slicing": ("prune_model",),
    "errors": (
        "AmpruneError",
        "CalibrationError",
        "CheckpointError",
        "EvaluationError",
        "EvaluationSettings",
        "ExportError",
        "MissingDependencyError",
        "PlanError",
        "PushError",
        "QuantizationError",
        "ReconstructionError",
        "RecipeError",
        "RecoveryError",
        "ReportError",
        "RunSettings",
        "ScoresError",
        "UnsupportedModelError",
        "VerificationError",
    ),
    "evaluation.records": ("Evaluation",),
    "evaluation.run": ("evaluate",),
    "experiments.run": ("ExperimentFiles", "experiment"),
    "model.latency": ("LatencySettings",),
    "model.shape": ("ModelShape",),
    "pipeline": ("PrunedModel", "apply_plan", "prune", "run", "verify"),
    "plan.artefact": ("PruningPlan",),
    "plan.make": ("make_plan",),
    "prove.checks": ("VerificationReport",),
    "recovery.run": ("RecoveredModel", "recover"),
    "settings": ("PruneSettings", "RecoverySettings", "EvaluationSettings", "RunSettings"),
    "report.write": ("write_report",),
    "scoring.run": ("score",),
    "scoring.scores": ("ImportanceScores",),
    "serve.gguf.run": ("ExportedGguf", "export_gguf"),
    "serve.hub.run": ("PushedModel", "push"),
    "serve.quantize.run": ("QuantizedModel", "quantize"),
    "text.calibration": ("CalibrationSet", "draw_calibration", "load_calibration"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AmpruneError",
    "CalibrationError",
    "CalibrationSet",
    "CheckpointError",
    "Evaluation",
    "EvaluationError",
    "EvaluationSettings",
    "ExperimentFiles",
    "ExportError",
    "ExportedGguf",
    "ImportanceScores",
    "LatencySettings",
    "MissingDependencyError",
    "ModelShape",
    "PlanError",
    "PruneSettings",
    "PrunedModel",
    "PruningPlan",
    "PushError",
    "PushedModel",
    "QuantizationError",
    "QuantizedModel",
    "RecipeError",
    "ReconstructionError",
    "RecoveredModel",
    "RecoveryError",
    "RecoverySettings",
    "ReportError",
    "RunSettings",
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
    try:
        return getattr(import_module(f"amprune.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        from amprune.errors import required

        required(f"amprune.{name}", str(error.name).partition(".")[0])
        raise
