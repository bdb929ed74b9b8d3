"""Bias compensation: the mean of what the removed units added is put into the bias of the projection they fed.

FLAP (arXiv 2312.11983) adds such biases to every output projection; here those that the architecture has take them up,
so that the output stays a checkpoint that any engine loads.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from amprune.cut.slicing import masks
from amprune.errors import PlanError, ScoresError, VerificationError
from amprune.model.architecture import Architecture
from amprune.model.families import Cut, ModelFamily
from amprune.model.reader import Checkpoint
from amprune.model.writer import RECORDS
from amprune.plan.artefact import PruningPlan
from amprune.scoring.scores import ImportanceScores, InputMeans, Scores


def check_biases(architecture: Architecture) -> None:
    """Refuses a model none of whose output projections has a bias."""
    family, prefix = architecture.family, architecture.family.layer_prefix.format(layer=0)
    if not any(f"{prefix}{module}.bias" in architecture.tensors for module in _outputs(family)):
        raise PlanError(
            f"bias compensation needs output projections with biases, and this {architecture.shape.model_type} model "
            f"has none ({' and '.join(_outputs(family))}); llama-like models without biases would need a config flag "
            "that adds biases to every projection and loads in fewer engines. Leave bias_compensation out"
        )


def _input_means(scores: ImportanceScores | None, plan: PruningPlan) -> tuple[InputMeans, ...]:
    """Returns the mean inputs of each layer's output projections, measured on the model of the plan."""
    if len(plan.kept_layers) < len(plan.layers):
        raise PlanError("bias compensation makes up for heads and neurons, but the plan removes whole blocks")
    if scores is None:
        raise PlanError("bias compensation needs the scores that the plan was made from, with mean inputs; give scores")
    differences = plan.shape_before.differences(scores.shape)
    if differences or plan.fingerprint not in (None, scores.fingerprint):
        what = ", ".join(differences) or "other weights"
        raise PlanError(f"the scores are of another model than the plan ({what}); give those that it was made from")
    if scores.input_means is None:
        raise ScoresError(
            f"the scores, made by the criterion {scores.criterion}, carry no mean inputs, which bias compensation "
            "needs; score with the criterion flap"
        )
    return scores.input_means


def compensated_biases(
    dense: Checkpoint, plan: PruningPlan, scores: ImportanceScores | None
) -> dict[str, torch.Tensor]:
    """Returns float64 `b + W[:, removed] @ mean[removed]` of shape (hidden_size,) by the name of the dense bias."""
    check_biases(dense.architecture)
    means, family = _input_means(scores, plan), dense.architecture.family
    keep, biases = dict(masks(plan, dense.architecture)), {}
    for module, mean in _means_by_module(family, plan, means):
        gone = keep[module] == 0
        if f"{module}.bias" in dense and gone.any():
            weight = dense[f"{module}.weight"].double()
            by_input = weight if _transposed(family, module) else weight.T
            added = torch.from_numpy(mean.astype(np.float64))[gone] @ by_input[gone]
            biases[f"{module}.bias"] = dense[f"{module}.bias"].double() + added
    if not biases:
        raise PlanError(
            "bias compensation has nothing to do: no output projection that loses inputs by this plan has a bias; "
            "leave bias_compensation out"
        )
    return biases


def recorded_biases(folder: Path, dense: Checkpoint, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Returns the compensated biases of an output by the scores that it carries; none where nothing was compensated."""
    if not plan.compensated:
        return {}
    path = folder / RECORDS / "scores.safetensors"
    if not path.is_file():
        raise VerificationError(
            f"{path} is missing, by which the biases were changed; without it nothing can be held to the dense model"
        )
    return compensated_biases(dense, plan, ImportanceScores.load(path))


def _means_by_module(
    family: ModelFamily, plan: PruningPlan, means: Sequence[InputMeans]
) -> Iterator[tuple[str, Scores]]:
    for layer in plan.kept_layers:
        prefix, mean = family.layer_prefix.format(layer=layer), means[layer]
        yield from zip((prefix + module for module in _outputs(family)), (mean.attention, mean.mlp), strict=True)


def _outputs(family: ModelFamily) -> tuple[str, str]:
    return family.attention_output, family.mlp_output


def _transposed(family: ModelFamily, module: str) -> bool:
    """Tells whether the weight is stored as (inputs, outputs), as in GPT-2's Conv1D."""
    return any(cut.axis == 0 and _is_input(cut, module) for cut in family.cuts)


def _is_input(cut: Cut, module: str) -> bool:
    return module.endswith(f".{cut.tensor.removesuffix('.weight')}")
