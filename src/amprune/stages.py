"""The stages that make a pruned model, each alone: it reads files, or what they hold, and writes files.

MODEL -> score -> scores.safetensors -> make_plan -> plan.json -> apply_plan -> OUT, verified
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from amprune import __version__
from amprune.calibration import CalibrationSet, load_calibration
from amprune.checkpoint import (
    RECORDS,
    Checkpoint,
    check_output,
    open_source,
    read_checkpoint,
    staged_folder,
    write_json,
)
from amprune.checkpoint.loading import input_device, load_tokenizer, loaded_model
from amprune.errors import ScoresError
from amprune.model_card import write_model_card
from amprune.plan import PruningPlan
from amprune.progress import Progress, no_progress
from amprune.scores import ImportanceScores
from amprune.scoring import CRITERION, score_layers
from amprune.slicing import check_plan_fits, write_pruned
from amprune.verification import VerificationReport, read_plan, verify_checkpoint

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class PrunedModel:
    """What `prune` and `apply_plan` return."""

    folder: Path
    plan: PruningPlan
    verification: VerificationReport
    bytes_before: int
    bytes_after: int


def score(
    model: PathLike,
    *,
    calibration: PathLike | list[str] | CalibrationSet = "alpaca",
    samples: int = 50,
    max_length: int = 512,
    prompts_only: bool = False,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_tokens: int = 4096,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> ImportanceScores:
    """Scores every head, key-value group and neuron of a model (Eq. 8 and 9) in one pass over a calibration set.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        calibration: `alpaca`, `builtin`, a file, a list of texts, or token ids as a `CalibrationSet`.
        samples: drawn at random with `seed`.
        max_length: tokens kept of each sample; never more than the model's positions.
        prompts_only: leave out the responses.
        seed: of the draw.
        device: cpu, cuda, cuda:1; the default is cuda where there is one.
        dtype: of the computation; auto is that of the checkpoint (a GGUF file is dequantised to it, auto: bfloat16).
        device_map: `auto` spreads a large model over devices, memory and disk; `disk` streams each layer.
        batch_tokens: most tokens in a batch; changes no score beyond rounding.
        revision: of a hub id.
        trust_remote_code: lets a tokenizer's own code run; model code never does.
        progress: told how far it is.

    Raises:
        AmpruneError: one of its children says what is wrong with the model, the set or the activations.
    """
    source = open_source(model, revision=revision, dtype=dtype)
    checkpoint = read_checkpoint(source.folder)
    if not isinstance(calibration, CalibrationSet):
        tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
        calibration = load_calibration(
            calibration,
            tokenizer,
            samples=samples,
            max_length=_shortest(max_length, checkpoint),
            prompts_only=prompts_only,
            seed=seed,
        )
    longest = max(map(len, calibration.samples), default=0)
    if checkpoint.positions is not None and longest > checkpoint.positions:
        raise ScoresError(
            f"a sample of {calibration.name} has {longest} tokens, but the model has {checkpoint.positions} positions; "
            "cut the samples"
        )
    with loaded_model(source.folder, dtype=dtype, device=device, device_map=device_map) as loaded:
        layers = score_layers(
            loaded, checkpoint.architecture, calibration, batch_tokens=batch_tokens, progress=progress
        )
        settings = {
            "dtype": dtype if dtype != "auto" else str(checkpoint.dtype).removeprefix("torch."),
            "device": input_device(loaded).type,
            "amprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    return ImportanceScores(
        layers=layers,
        shape=checkpoint.shape,
        fingerprint=checkpoint.fingerprint,
        criterion=CRITERION,
        calibration=calibration.to_dict(),
        settings=settings,
    )


def _shortest(max_length: int, checkpoint: Checkpoint) -> int:
    positions = checkpoint.positions or max_length
    if positions < max_length:
        logger.info("samples are cut at %d tokens, the model's positions, instead of %d", positions, max_length)
    return int(min(max_length, positions))


def apply_plan(
    model: PathLike,
    plan: PruningPlan | PathLike,
    out: PathLike,
    *,
    scores: ImportanceScores | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> PrunedModel:
    """Slices a model by a plan, writes it shard by shard, verifies it, and only then gives it its name.

    Args:
        model: the model that the plan was made for.
        plan: a plan, or the path of a `plan.json`.
        out: the folder to write; it appears whole or not at all.
        scores: kept beside the plan in the output's records.
        max_shard_size: such as 200MB or 5GB; peak memory follows it, not the size of the model.
        overwrite: replace an OUT that is a checkpoint.
        dtype: that a GGUF file is dequantised to; other checkpoints keep theirs.
        revision: of a hub id.
        trust_remote_code: lets a tokenizer's own code run; model code never does.
        progress: told how far it is.

    Raises:
        PlanError: the plan is for another model.
        CheckpointError: the source cannot be read, or OUT not written.
        VerificationError: what was written is not the masked dense model; nothing is left.
    """
    if not isinstance(plan, PruningPlan):
        plan = PruningPlan.load(plan)
    source = open_source(model, revision=revision, dtype=dtype)
    folder = Path(out).expanduser()
    check_output(folder, overwrite=overwrite, protected=source.protected)
    dense = read_checkpoint(source.folder)
    check_plan_fits(plan, dense.shape, dense.fingerprint, where=str(model))
    with staged_folder(folder, overwrite=overwrite, protected=source.protected) as partial:
        write_pruned(dense, plan, partial, max_shard_size=max_shard_size, progress=progress)
        report = verify_checkpoint(partial, dense, plan, trust_remote_code=trust_remote_code, progress=progress)
        report.require()
        _write_records(partial, plan, scores, report)
        write_model_card(partial, plan, report, source=source)
    written = read_checkpoint(folder)
    return PrunedModel(folder, plan, report, dense.bytes, written.bytes)


def _write_records(
    folder: Path, plan: PruningPlan, scores: ImportanceScores | None, report: VerificationReport
) -> None:
    records = folder / RECORDS
    plan.save(records / "plan.json")
    if scores is not None:
        scores.save(records / "scores.safetensors")
    write_json(records / "verification.json", report.to_dict())


def verify(
    out: PathLike,
    *,
    dense: PathLike,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
) -> VerificationReport:
    """Verifies a written checkpoint against the dense model by the plan that it carries.

    Returns the report whether or not every check passed; `report.require()` raises when one did not.

    Raises:
        VerificationError: OUT carries no plan.
        PlanError: `dense` is not the model that OUT was made from.
        CheckpointError: one of the two cannot be read.
    """
    folder = Path(out).expanduser()
    plan = read_plan(folder)
    checkpoint = read_checkpoint(open_source(dense, revision=revision, dtype=dtype).folder)
    check_plan_fits(plan, checkpoint.shape, checkpoint.fingerprint, where=str(dense))
    return verify_checkpoint(folder, checkpoint, plan, trust_remote_code=trust_remote_code, progress=progress)
