"""The stage: a dense checkpoint, a plan and calibration text give refitted output projections, no training."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from amprune.cut.refit.moments import Refit
from amprune.cut.refit.record import FORMAT
from amprune.cut.refit.sweep import LayerRefit, sweep
from amprune.errors import PlanError, ReconstructionError
from amprune.model.files import opened
from amprune.model.loading import computing_dtype, device_of
from amprune.model.reader import Checkpoint, digest
from amprune.plan.artefact import PruningPlan
from amprune.running import Progress, binary, free_memory, no_progress
from amprune.settings import Compute
from amprune.text.calibration import HELD_OUT, CalibrationSet
from amprune.text.tokens import spans

logger = logging.getLogger(__name__)

ROW = 512
"""Most tokens of a row; samples are joined and cut into rows of one length."""


@dataclass(frozen=True)
class Reconstruction:
    """Refitted tensors of a pruned model, and how well they do."""

    tensors: Mapping[str, torch.Tensor]
    """By the names of the dense model, in the shapes of the pruned one; read from the disk as they are asked for."""
    record: dict[str, Any]
    """What `amprune/reconstruction.json` says."""


class _Spilled(Mapping[str, torch.Tensor]):
    """Tensors in files of their own layers, so that no model has to fit into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}

    def put(self, tensors: Mapping[str, torch.Tensor], layer: int) -> None:
        if tensors:
            file = self._folder / f"layer-{layer}.safetensors"
            save_file(dict(tensors), file)
            self._files |= dict.fromkeys(tensors, file)

    def __getitem__(self, name: str) -> torch.Tensor:
        with opened(self._files[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def reconstruct(
    dense: Checkpoint,
    plan: PruningPlan,
    calibration: CalibrationSet,
    folder: Path,
    where: Compute,
    *,
    progress: Progress = no_progress,
) -> Reconstruction:
    """Refits the kept columns of every output projection, so that each layer gives what it gave before.

    Ridge least squares, shrinking to the kept weights: `min ||H' W' - T||^2 + ridge * ||W' - W_kept||^2` over the
    calibration tokens, layer by layer; H' are inputs in the already pruned and refitted model, T what the dense model
    has there. The ridge is chosen on held-out tokens, an eighth; where none lowers their error, a projection stays.

    Samples are joined and cut into rows of up to 512 tokens, each behind a start token where the tokenizer begins texts
    with one; `folder` keeps the refitted tensors until they are written.
    """
    _check_plan(plan)
    rows = packed(calibration, longest=min(ROW, dense.positions or ROW), eos=_eos(dense))
    held_out = len(rows) // HELD_OUT
    place, kind = torch.device(device_of(where.device)), computing_dtype(dense, where)
    width = max(plan.shape_after.intermediate_size, plan.shape_after.num_attention_heads * plan.shape_after.head_dim)
    moments_dtype = _moments_dtype(dense, rows, width, kind, place)
    if (fitted := rows[:-held_out].numel()) < width:
        logger.warning(
            "the refit of a projection of %d inputs sees %d tokens; more than twice as many as inputs are needed to "
            "settle it, and until then the ridge holds it near its weights: give more --samples", width, fitted
        )  # fmt: skip
    size = max(1, where.batch_tokens // rows.shape[1])
    # A quarter and a half of the rows may be enough (see sweep): how large batches are must not move these bounds.
    fit = len(rows) - held_out
    bounds = sorted({0, fit // 4, fit // 2, fit, len(rows)})
    parts = [torch.split(rows[first:last], size) for first, last in pairwise(bounds)]
    batches = [batch for part in parts for batch in part]
    counts = [*accumulate(map(len, parts[:-1]))]
    tensors, layers = _Spilled(folder), []
    for index, layer in enumerate(
        sweep(
            dense, plan, batches, counts, device=place, dtype=kind, moments_dtype=moments_dtype, progress=progress
        )
    ):  # fmt: skip
        tensors.put(layer.tensors, index)
        layers.append(_layer_record(layer))
    record = {
        "format": FORMAT,
        "calibration": calibration.to_dict(),
        "rows": len(rows),
        "row_tokens": rows.shape[1],
        "held_out_rows": held_out,
        "dtype": str(kind).removeprefix("torch."),
        "moments_dtype": str(moments_dtype).removeprefix("torch."),
        "device": place.type,
        "layers": layers,
        "sha256": {name: digest(tensor) for name, tensor in tensors.items()},
    }
    return Reconstruction(tensors, record)


def _check_plan(plan: PruningPlan) -> None:
    if len(plan.kept_layers) < len(plan.layers):
        raise PlanError(
            "reconstruction makes up for heads and neurons, but the plan removes whole blocks; leave it out"
        )
    if plan.compensated:
        raise PlanError("reconstruction refits biases, too; leave out bias_compensation")


def packed(calibration: CalibrationSet, *, longest: int = ROW, eos: int | None = None) -> torch.Tensor:
    """Joins samples and cuts them into (rows, length) of one length, at least 8 rows; what is left over is dropped."""
    joined: list[int] = []
    for sample in calibration.samples:
        joined += sample if eos is None or sample[-1] == eos else (*sample, eos)
    length = min(longest, len(joined) // HELD_OUT)
    if length < 2:
        raise ReconstructionError(
            f"the calibration set {calibration.name!r} holds {len(joined)} tokens, but reconstruction needs at least "
            f"{2 * HELD_OUT}, and good results tens of thousands; give more --samples"
        )
    rows = [head + joined[part] for head, part in spans(joined, length, calibration.start)]
    return torch.tensor([row for row in rows if len(row) == length])


def _eos(dense: Checkpoint) -> int | None:
    found = dense.config.get("eos_token_id")
    return found[0] if isinstance(found, list) and found else found if isinstance(found, int) else None


def _moments_dtype(
    dense: Checkpoint, rows: torch.Tensor, width: int, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """Returns float64 where its sums fit into the memory that is free, else float32."""
    hidden = dense.shape.hidden_size
    states = rows.numel() * hidden * dtype.itemsize * 4 + rows.numel() // HELD_OUT * (width + hidden) * 4
    blocks = 2 * dense.shape.parameters // dense.shape.num_layers * dtype.itemsize
    free = free_memory(device)
    for kind in (torch.float64, torch.float32):
        moments = 3 * width * (width + hidden) * kind.itemsize
        needed = moments + states + blocks
        precision = str(kind).removeprefix("torch.")
        what = f"{binary(needed)} ({binary(moments)} for the moments of {width:,} inputs in {precision})"
        if needed <= free:
            logger.info("reconstruction takes about %s of %s that are free", what, binary(free))
            return kind
    raise ReconstructionError(
        f"reconstruction takes about {what}, but {binary(free)} are free on {device}; "
        "give fewer --samples, another --device, or leave reconstruction out"
    )


def _layer_record(layer: LayerRefit) -> dict[str, Any]:
    def of(refit: Refit) -> dict[str, float | None]:
        return {name: value for name, value in vars(refit).items() if name not in ("change", "bias_change")}

    return {"attention": of(layer.attention), "mlp": of(layer.mlp), "drift": layer.drift}
