"""A checkpoint and a plan -> the files of a smaller one: refitted where asked for, sliced, written. START HERE."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from amprune.cut.refit.record import RECORD as RECONSTRUCTION
from amprune.cut.refit.run import reconstruct
from amprune.cut.slicing import write_pruned
from amprune.model.reader import Checkpoint
from amprune.model.writer import RECORDS
from amprune.plan.artefact import PruningPlan
from amprune.records import write
from amprune.running import Progress
from amprune.settings import ApplySettings
from amprune.text.calibration import CalibrationSet


def cut(
    dense: Checkpoint,
    plan: PruningPlan,
    folder: Path,
    settings: ApplySettings,
    *,
    biases: Mapping[str, torch.Tensor],
    refit_on: CalibrationSet | None,
    progress: Progress,
) -> None:
    """Writes what stays of a checkpoint into a folder, shard by shard, and the record of its refit.

    `biases` take the place of those of output projections, by their dense names; the kept weights of output projections
    are refitted on the samples `refit_on`.
    """
    with TemporaryDirectory(prefix="amprune-refit-") as spill:
        replaced = biases
        if refit_on is not None:
            fitted = reconstruct(dense, plan, refit_on, Path(spill), settings, progress=progress)
            replaced = fitted.tensors
            (folder / RECORDS).mkdir(exist_ok=True)
            write(folder / RECORDS / RECONSTRUCTION, fitted.record)
        write_pruned(dense, plan, folder, replaced=replaced, max_shard_size=settings.max_shard_size, progress=progress)
