"""MODEL and plan -> apply_plan -> OUT, refitted where asked for and verified; OUT -> verify."""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from amprune.cut.biases import compensated_biases, recorded_biases
from amprune.cut.refit.record import RECORD as RECONSTRUCTION
from amprune.cut.refit.record import recorded_hashes
from amprune.cut.refit.run import reconstruct
from amprune.cut.slicing import check_plan_fits, write_pruned
from amprune.errors import PlanError, VerificationError
from amprune.model.reader import read_checkpoint
from amprune.model.source import open_source
from amprune.model.staging import check_output, staged_folder
from amprune.model.writer import RECORDS, write_json
from amprune.plan.artefact import PruningPlan
from amprune.prove.card import write_model_card
from amprune.prove.checks import VerificationReport, read_plan, verify_checkpoint
from amprune.running import Progress, no_progress
from amprune.scoring.run import PathLike
from amprune.scoring.scores import ImportanceScores
from amprune.text.calibration import CalibrationSet


@dataclass(frozen=True)
class PrunedModel:
    """What `prune` and `apply_plan` return."""

    folder: Path
    plan: PruningPlan
    verification: VerificationReport
    bytes_before: int
    bytes_after: int


def apply_plan(
    model: PathLike,
    plan: PruningPlan | PathLike,
    out: PathLike,
    *,
    scores: ImportanceScores | None = None,
    bias_compensation: bool = False,
    refit: CalibrationSet | None = None,
    device: str | None = None,
    batch_tokens: int = 4096,
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
        bias_compensation: put the mean of what was removed into the biases of the output projections, where there are
            any; needs scores with mean inputs.
        refit: text to refit the kept output weights on, layer by layer (see `reconstruct`); None leaves them as they
            are.
        device: of the refit; the default is cuda where there is one.
        batch_tokens: most tokens in a batch of the refit.
        max_shard_size: such as 200MB or 5GB; peak memory follows it, not the size of the model.
        overwrite: replace an OUT that is a checkpoint.
        dtype: that a GGUF file is dequantised to; other checkpoints keep theirs, and the refit computes in it.
        revision: of a hub id.
        trust_remote_code: lets a tokenizer's own code run; model code never does.
        progress: told how far it is.

    Raises:
        PlanError: the plan is for another model, there is no bias to compensate with, or nothing that can be refitted.
        ReconstructionError: the refit has too few tokens, too little memory, or activations that are not finite.
        ScoresError: the scores hold no mean inputs.
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
    plan = replace(plan, compensated=plan.compensated or bias_compensation)
    if plan.refitted and refit is None:
        raise PlanError(
            "the plan asks for its output projections to be refitted, and there is no text to refit them on: give "
            "--reconstruct and a calibration set (refit), or make refitted false in the plan"
        )
    plan = replace(plan, refitted=refit is not None)
    biases = compensated_biases(dense, plan, scores) if plan.compensated else {}
    with (
        staged_folder(folder, overwrite=overwrite, protected=source.protected) as partial,
        TemporaryDirectory(prefix="amprune-refit-") as spill,
    ):
        fitted = None
        if refit is not None:
            fitted = reconstruct(
                dense,
                plan,
                refit,
                Path(spill),
                device=device,
                dtype=dtype,
                batch_tokens=batch_tokens,
                progress=progress,
            )
            write_json(_records(partial) / RECONSTRUCTION, fitted.record)
        replaced = biases if fitted is None else fitted.tensors
        write_pruned(dense, plan, partial, replaced=replaced, max_shard_size=max_shard_size, progress=progress)
        report = verify_checkpoint(
            partial,
            dense,
            plan,
            biases=biases,
            refitted=recorded_hashes(partial),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        report.require()
        _write_records(partial, plan, scores, report)
        write_model_card(partial, plan, report, source=source)
    written = read_checkpoint(folder)
    return PrunedModel(folder, plan, report, dense.bytes, written.bytes)


def _write_records(
    folder: Path, plan: PruningPlan, scores: ImportanceScores | None, report: VerificationReport
) -> None:
    records = _records(folder)
    plan.save(records / "plan.json")
    if scores is not None:
        scores.save(records / "scores.safetensors")
    write_json(records / "verification.json", report.to_dict())


def _records(folder: Path) -> Path:
    records = folder / RECORDS
    records.mkdir(exist_ok=True)
    return records


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
        VerificationError: OUT carries no plan, or not the record of a refit that the plan tells of.
        PlanError: `dense` is not the model that OUT was made from.
        CheckpointError: one of the two cannot be read.
    """
    folder = Path(out).expanduser()
    plan = read_plan(folder)
    checkpoint = read_checkpoint(open_source(dense, revision=revision, dtype=dtype).folder)
    check_plan_fits(plan, checkpoint.shape, checkpoint.fingerprint, where=str(dense))
    biases, refitted = recorded_biases(folder, checkpoint, plan), recorded_hashes(folder)
    if plan.refitted and not (folder / RECORDS / RECONSTRUCTION).is_file():
        raise VerificationError(
            f"{folder / RECORDS / RECONSTRUCTION} is missing, which says what was refitted; without it nothing can be "
            "held to the dense model"
        )
    return verify_checkpoint(
        folder,
        checkpoint,
        plan,
        biases=biases,
        refitted=refitted,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
