"""Every stage once, in order. START HERE.

    MODEL -> prune -> OUT                      scored, planned, cut and proven, in one process; the model is opened once
    MODEL -> run -> OUT, evaluated, reported   prune, recover, evaluate and report

The stages of `prune` alone are `score` (scoring/run.py), `plan_scores` (search/planning.py), `apply_plan` and `verify`.
Two doors lead from here where the preset `best` asks for more: search/run.py measures the split of the budget,
cut/refit/run.py refits weights.
"""

import logging
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amprune.cut.biases import compensated_biases, recorded_biases
from amprune.cut.refit.record import RECORD as RECONSTRUCTION
from amprune.cut.refit.record import recorded_hashes
from amprune.cut.run import cut
from amprune.cut.slicing import check_plan_fits
from amprune.errors import CheckpointError, VerificationError, required
from amprune.model.files import stored_bytes
from amprune.model.reader import Checkpoint, digests, open_model, read_checkpoint
from amprune.model.source import Source, open_source
from amprune.model.writer import RECORDS, check_output, parse_size, staged_folder
from amprune.plan.artefact import PruningPlan
from amprune.plan.target import parse_target
from amprune.prove.card import write_card
from amprune.prove.checks import VERIFICATION, VerificationReport, read_plan, verify_checkpoint
from amprune.records import Run, alone, begin, sha256, write
from amprune.running import Progress, no_progress
from amprune.scoring.catalogue import find_criterion
from amprune.scoring.run import score_criteria
from amprune.scoring.scores import ImportanceScores
from amprune.search.planning import check_plannable, plan_for, settled
from amprune.settings import (
    MEASURED_BY,
    ApplySettings,
    EvaluationSettings,
    PathLike,
    PruneSettings,
    RecoverySettings,
    RunSettings,
    Texts,
    VerifySettings,
    part,
    settle,
    with_preset,
    write_recipe,
)
from amprune.text.calibration import CalibrationSet, draw
from amprune.text.records import file_of

if TYPE_CHECKING:
    from amprune.evaluation.records import Evaluation
    from amprune.recovery.run import RecoveredModel
    from amprune.report.write import ReportFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedModel:
    """What `prune` and `apply_plan` return."""

    folder: Path
    plan: PruningPlan
    verification: VerificationReport
    bytes_before: int
    bytes_after: int


def prune(
    model: PathLike,
    out: PathLike,
    settings: PruneSettings | None = None,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> PrunedModel:
    """Scores, plans, cuts, refits and verifies a model in one go.

    What can fail without the weights (OUT, the ratio, the options) is checked before they are loaded.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        out: the folder to write; it appears whole or not at all.
        settings: what is asked for; `amprune prune --help` and `amprune.settings` say what each option means.
        progress: told how far it is.
        options: of `PruneSettings`, such as `ratio=0.2` or `preset="paper"`; they count before `settings`.

    Raises:
        AmpruneError: one of its children; nothing is left behind then.
    """
    given = settle(PruneSettings, settings, options)
    rule = find_criterion(str(with_preset(given).criterion))
    asked = settled(given, rule)
    if asked.target is not None:
        parse_target(asked.target)
    source, dense = open_model(model, revision=asked.revision, dtype=asked.dtype)
    source = replace(source, protected=(*source.protected, *file_of(asked.calibration)))
    check_output(Path(out).expanduser(), overwrite=asked.overwrite, protected=source.protected)
    parse_size(asked.max_shard_size)
    check_plannable(dense, asked, rule)
    samples = None
    if rule.calibrated or asked.allocate or asked.reconstruct:
        samples = draw(dense, asked, trust_remote_code=asked.trust_remote_code, progress=progress)
    fit, held_out = samples.split() if samples is not None and asked.allocate else (samples, None)
    scores = score_criteria(dense, [rule], fit, asked, seed=asked.seed, progress=progress)[rule.name]
    plan = plan_for(dense, scores, asked, fit=fit, held_out=held_out, progress=progress)
    refit_on = samples if asked.reconstruct else None
    return _write(source, dense, plan, Path(out), asked, scores=scores, refit_on=refit_on, progress=progress)


def apply_plan(
    model: PathLike,
    plan: PruningPlan | PathLike,
    out: PathLike,
    settings: ApplySettings | None = None,
    *,
    scores: ImportanceScores | None = None,
    refit: CalibrationSet | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> PrunedModel:
    """Cuts a model by a plan, writes it shard by shard, verifies it, and only then gives it its name.

    Args:
        model: the model that the plan was made for.
        plan: a plan, or the path of a `plan.json`.
        out: the folder to write; it appears whole or not at all.
        settings: what else is asked for. Unless told otherwise, the plan says whether the kept output weights are
            refitted; the text that they are refitted on is the preset's.
        scores: kept beside the plan in the output's records; bias compensation needs them, with mean inputs.
        refit: samples to refit on, instead of the settings' text.
        progress: told how far it is.
        options: of `ApplySettings`, such as `max_shard_size="200MB"`.

    Raises:
        PlanError: the plan is for another model, there is no bias to compensate with, or nothing that can be refitted.
        ReconstructionError: the refit has too few tokens, too little memory, or activations that are not finite.
        ScoresError: the scores hold no mean inputs.
        CheckpointError: the source cannot be read, or OUT not written.
        VerificationError: what was written is not the masked dense model; nothing is left.
    """
    given = settle(ApplySettings, settings, options)
    if not isinstance(plan, PruningPlan):
        plan = PruningPlan.load(plan)
    source, dense = open_model(model, revision=given.revision, dtype=given.dtype)
    source = replace(source, protected=(*source.protected, *file_of(given.calibration)))
    check_output(Path(out).expanduser(), overwrite=given.overwrite, protected=source.protected)
    check_plan_fits(plan, dense.shape, dense.fingerprint, where=str(model))
    refitted = plan.refitted if given.reconstruct is None else given.reconstruct
    compensated = plan.compensated or given.bias_compensation
    plan = replace(plan, refitted=refitted or refit is not None, compensated=compensated)
    asked = replace(with_preset(given), reconstruct=plan.refitted)
    if plan.refitted and refit is None:
        refit = draw(dense, asked, trust_remote_code=asked.trust_remote_code, progress=progress)
    return _write(source, dense, plan, Path(out), asked, scores=scores, refit_on=refit, progress=progress)


def _write(
    source: Source,
    dense: Checkpoint,
    plan: PruningPlan,
    out: Path,
    asked: ApplySettings,
    *,
    scores: ImportanceScores | None,
    refit_on: CalibrationSet | None,
    progress: Progress,
) -> PrunedModel:
    """Cuts an opened model and proves the result; OUT appears when it is whole."""
    check_plan_fits(plan, dense.shape, dense.fingerprint, where=str(source.folder))
    biases = compensated_biases(dense, plan, scores) if plan.compensated else {}
    folder = out.expanduser()
    with staged_folder(folder, overwrite=asked.overwrite, protected=source.protected) as partial:
        cut(dense, plan, partial, asked, biases=biases, refit_on=refit_on, progress=progress)
        report = verify_checkpoint(
            partial, dense, plan, biases=biases, refitted=recorded_hashes(partial),
            trust_remote_code=asked.trust_remote_code, progress=progress,
        )  # fmt: skip
        report.require()
        dense.check_unchanged()
        records = partial / RECORDS
        plan.save(records / "plan.json")
        if scores is not None:
            scores.save(records / "scores.safetensors")
        hashes = digests(read_checkpoint(partial))  # by which `push` tells that these are the weights that passed
        told = {file.name: sha256(file) for file in sorted(records.iterdir())}
        where = {"dense": source.again, "sha256": hashes, "records": told}
        write(records / VERIFICATION, report.to_dict() | where)
        command = "prune" if isinstance(asked, PruneSettings) else "apply"
        write_recipe(records / "recipe.yaml", command, asked)
        write_card(partial, source=source)
    return PrunedModel(folder, plan, report, dense.bytes, stored_bytes(folder))


def verify(
    out: PathLike,
    *,
    dense: PathLike,
    settings: VerifySettings | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> VerificationReport:
    """Verifies a written checkpoint against the dense model by the plan that it carries.

    Returns the report whether or not every check passed; `report.require()` raises when one did not.

    Args:
        out: what `prune`, `apply_plan` or `recover` wrote.
        dense: the model that OUT was made from.
        settings: how the dense model is opened.
        progress: told how far it is.
        options: of `VerifySettings`, such as `revision="main"`.

    Raises:
        VerificationError: OUT carries no plan, or not the record of a refit that the plan tells of.
        PlanError: `dense` is not the model that OUT was made from.
        CheckpointError: one of the two cannot be read.
    """
    asked, folder = settle(VerifySettings, settings, options), Path(out).expanduser()
    plan = read_plan(folder)
    _, checkpoint = open_model(dense, revision=asked.revision, dtype=asked.dtype)
    check_plan_fits(plan, checkpoint.shape, checkpoint.fingerprint, where=str(dense))
    biases, refitted = recorded_biases(folder, checkpoint, plan), recorded_hashes(folder)
    if plan.refitted and not (folder / RECORDS / RECONSTRUCTION).is_file():
        raise VerificationError(
            f"{folder / RECORDS / RECONSTRUCTION} is missing, which says what was refitted; without it nothing can be "
            "held to the dense model"
        )
    return verify_checkpoint(
        folder, checkpoint, plan, biases=biases, refitted=refitted, trust_remote_code=asked.trust_remote_code,
        progress=progress,
    )  # fmt: skip


def run(
    model: PathLike,
    out: PathLike,
    settings: RunSettings | None = None,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> "ReportFiles":
    """Prunes a model, recovers and measures it when asked to, and draws the report; goes on where it was interrupted.

    Until OUT is whole, `OUT.run.json` holds what was asked for, and with recovery `OUT.pruned` the pruned model. The
    same call finds what is finished and does the rest.

    Args:
        model: a Hugging Face folder, a `.gguf` file, an alias or a hub id.
        out: the folder to write; report and figures lie in its folder `amprune/`.
        settings: what is asked for, of all stages.
        progress: told how far it is.
        options: of `RunSettings`: those of `prune`, `recover` and `evaluate` by their names, and `recover=True`,
            `evaluate=True` and `distil=True` for these stages.

    Raises:
        AmpruneError: one of its children, from the stage that failed; what was finished stays.
    """
    asked, folder = settle(RunSettings, settings, options), Path(out).expanduser()
    trained = ("peft",) if asked.recover and not asked.full else ()
    measured_by = [library for kind in asked.measure for library in MEASURED_BY.get(kind, ()) if asked.evaluate]
    required("run", *trained, *measured_by, "matplotlib")
    # Heavy, and of no use to `prune`.
    from amprune.evaluation.run import evaluate, jobs_of
    from amprune.model.latency import latency_cases
    from amprune.recovery.run import recover
    from amprune.recovery.training import check_training
    from amprune.report.write import write_report
    from amprune.text.drawing import check_sources

    measured = replace(part(EvaluationSettings, asked), batch_size=asked.evaluation_batch_size)
    if asked.evaluate:  # what can fail is tried before the pruning
        jobs_of(measured, latency_cases(measured))
    if asked.recover:
        check_training(_recovery(asked))
        check_sources(with_preset(_recovery(asked)).data, "--data")
    pruned = folder.with_name(f"{folder.name}.pruned") if asked.recover else folder
    file = folder.with_name(f"{folder.name}.run.json")
    with alone(file.with_name(f"{file.name}.lock"), f"OUT {folder}"), ExitStack() as stack:
        begun = _begin(file, {folder, pruned}, open_source(model).protected, _request(model, asked), asked)
        replaced = asked.overwrite or begun.resumed  # what an interrupted run of the same request has written
        stack.callback(lambda: None if begun.done else file.unlink(missing_ok=True))  # nothing to go on with
        if "prune" not in begun.done:
            prune(model, pruned, replace(part(PruneSettings, asked), overwrite=replaced), progress=progress)
            begun.finish("prune", file)
        elif begun.resumed:  # somebody may have put another model there
            _, dense = open_model(model, revision=asked.revision, dtype=asked.dtype)
            check_plan_fits(read_plan(pruned), dense.shape, dense.fingerprint, where=str(model))
        if asked.recover and "recover" not in begun.done:
            training = folder.with_name(f"{folder.name}.training")
            recover(
                pruned, folder, _recovery(asked), teacher=model if asked.distil else asked.teacher,
                resume=begun.resumed and not begun.otherwise and training.exists(), overwrite=replaced,
                progress=progress,
            )  # fmt: skip
            begun.finish("recover", file)
        if asked.evaluate:
            between = [f"{folder.name}, not recovered={pruned}"] if pruned != folder else []
            place = folder / RECORDS / "evaluation.json"
            evaluate([f"dense={model}", *between, folder], place, measured, progress=progress)
        write_recipe(folder / RECORDS / "recipe.yaml", "run", asked)
        files = write_report(folder)
        file.unlink()
        if pruned != folder:
            shutil.rmtree(pruned)
        return files


def _recovery(asked: RunSettings) -> RecoverySettings:
    """Returns the options of the training, of which some share their name with those of other stages."""
    own = {one.name.removeprefix("training_"): one.name for one in fields(asked) if one.name.startswith("training_")}
    return replace(part(RecoverySettings, asked), **{name: getattr(asked, given) for name, given in own.items()})


def _request(model: PathLike, asked: RunSettings) -> dict[str, Any]:
    """Returns what has to be the same for the models of each stage to be taken over: what decides them."""
    stages = {"prune": {"model": str(model), "recover": asked.recover, **asdict(part(PruneSettings, asked))}}
    if asked.recover:
        stages["recover"] = {**asdict(_recovery(asked)), "distil": asked.distil}
    return {
        stage: {name: value for name, value in options.items() if name not in ("overwrite", "resume")}
        for stage, options in stages.items()
    }


def measure_epochs(
    pruned: PathLike, result: "RecoveredModel", settings: Texts, *, progress: Progress = no_progress
) -> "Evaluation":
    """Measures the pruned model and that of every epoch (section IV-G) into OUT's `amprune/evaluation.json`.

    The folders of the epochs, the last of which is OUT once more, are removed then.

    Raises:
        EvaluationError: the data cannot be read.
    """
    from amprune.evaluation.run import evaluate

    out = result.folder
    named = [f"{path.name.rpartition('.')[2]}={path}" for path in result.epochs[:-1]]
    found = evaluate(
        [f"pruned={pruned}", *named, f"{out.name}={out}"], out / RECORDS / "evaluation.json",
        measure=("perplexity", "zero_shot"), data_dir=settings.data_dir, limit=settings.limit,
        windows=settings.windows, device=getattr(settings, "device", None), progress=progress,
    )  # fmt: skip
    for path in result.epochs:
        shutil.rmtree(path)
    return found


def _begin(
    file: Path, places: set[Path], protected: tuple[Path, ...], request: dict[str, Any], asked: RunSettings
) -> Run:
    """Finds an interrupted run of the same request, or begins a new one where nothing is in its way."""
    begun = begin(file, request, error=CheckpointError, remedy="it tells of an interrupted run; remove it")
    if begun.resumed:
        logger.info("going on with the run that %s tells of; done: %s", file, ", ".join(begun.done) or "nothing")
        return begun
    if begun.otherwise and begun.others == ("prune",) and all(name.startswith("recover.") for name in begun.otherwise):
        logger.info("going on with the run that %s tells of, with another %s", file, ", ".join(begun.otherwise))
        mended = replace(begun, done=["prune"], resumed=True)
        write(file, mended.begun())
        return mended
    if begun.otherwise and begun.others and not asked.overwrite:
        raise CheckpointError(
            f"{file} tells of an interrupted run that was asked for with another {', '.join(begun.otherwise)}; ask for "
            "the same again, or give --overwrite to start anew"
        )
    for place in places:
        check_output(place, overwrite=asked.overwrite, protected=protected)
    write(file, begun.begun())
    return begun
