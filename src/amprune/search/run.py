"""Plans that need more than scores: a speedup is timed, an allocation is measured, on the model itself.

Scores and a ratio alone make a plan without the model: see `plan/`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from amprune.cut.refit.run import reconstruct
from amprune.model.loading import computing_dtype, loaded_model
from amprune.model.reader import Checkpoint
from amprune.plan.artefact import PruningPlan
from amprune.plan.heads import Budget
from amprune.plan.make import make_plan
from amprune.running import Progress, no_progress
from amprune.scoring.scores import ImportanceScores
from amprune.search.allocation import Refit, allocate, candidates, plan_of
from amprune.search.speedup import SpeedupSearch, find_shapes
from amprune.search.timing import shape_timer
from amprune.settings import Compute, PlanOptions
from amprune.text.calibration import CalibrationSet

logger = logging.getLogger(__name__)

_REFIT_TOKENS = 8192
"""Of the refits by which candidates are compared; enough to tell them apart."""


def plan_on_model(
    dense: Checkpoint,
    scores: ImportanceScores,
    options: PlanOptions,
    where: Compute,
    *,
    speedup: float | None = None,
    held_out: CalibrationSet | None = None,
    refit_on: CalibrationSet | None = None,
    progress: Progress = no_progress,
) -> PruningPlan:
    """Makes a plan whose split between heads and neurons is chosen by measuring.

    In the place of a ratio, a `speedup` times shapes with random weights on this device until one reaches it. Of the
    splits, that which does the least damage on the samples `held_out`, which were not scored on, is chosen; without
    them equal shares, or of the shapes that reach the speedup the largest. Splits that are near to each other are
    compared with their weights refitted on `refit_on`.
    """
    search = None if speedup is None else _search(dense, options, speedup, where, progress)
    splits = candidates(dense.shape, options) if search is None else search.budgets
    if held_out is None or len(splits) == 1:
        plan = _largest(scores, options, splits) if search else make_plan(scores, options)
    else:
        computed = str(computing_dtype(dense, where)).removeprefix("torch.")
        with (
            loaded_model(dense, dtype=computed, device=where.device, device_map=where.device_map) as model,
            TemporaryDirectory(prefix="amprune-refit-") as spill,
        ):
            # A model that is spread or streamed has no weights of its own to put others in the place of.
            fits = where.device_map is None
            refit = _refit(dense, refit_on, Path(spill), where) if fits and refit_on is not None else None
            found = allocate(
                model, dense.architecture, scores, held_out, options, budgets=search.budgets if search else None,
                refit=refit, progress=progress,
            )  # fmt: skip
        plan = plan_of(scores, found, options)
    if search is not None:
        plan = replace(plan, provenance={**plan.provenance, "speedup": search.to_dict()})
    return plan


def _largest(scores: ImportanceScores, options: PlanOptions, splits: Sequence[Budget]) -> PruningPlan:
    plans = [make_plan(scores, options, budget=budget) for budget in splits]
    return max(plans, key=lambda plan: plan.shape_after.parameters)


def _search(
    dense: Checkpoint, options: PlanOptions, speedup: float, where: Compute, progress: Progress
) -> SpeedupSearch:
    dtype = dense.computed_in(where.dtype)
    with shape_timer(dense.config, dense.architecture, device=where.device, dtype=dtype, progress=progress) as timing:
        logger.info("a speedup of %.2fx is searched for with %s", speedup, timing.words(dense.shape.num_layers))
        return find_shapes(dense.shape, speedup, options, timing.speedup)


def _refit(dense: Checkpoint, samples: CalibrationSet, spill: Path, where: Compute) -> Refit:
    few = samples.first(_REFIT_TOKENS)

    def refit(plan: PruningPlan) -> Mapping[str, torch.Tensor]:
        return reconstruct(dense, plan, few, spill, where).tensors

    return refit
