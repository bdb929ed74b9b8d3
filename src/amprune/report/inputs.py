"""What a report is drawn from: an evaluation, and the records of the models that amprune pruned or recovered."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from amprune.cut.inspection import inspect
from amprune.cut.refit.record import ReconstructionRecord, read_record
from amprune.errors import AmpruneError, EvaluationError, ReportError
from amprune.evaluation.identity import content_hash
from amprune.evaluation.records import Evaluation, ModelEntry
from amprune.model.quantization import Quantization, is_quantized, read_quantization
from amprune.model.recovered import Recovery, TrainingLog, is_recovered, read_recovery, read_training_log
from amprune.model.writer import RECORDS
from amprune.plan.artefact import PruningPlan
from amprune.prove.card import read_card, read_made
from amprune.records import read_object, resolved
from amprune.scoring.scores import ImportanceScores

EVALUATION = "evaluation.json"
_FEW = 3
"""Models that sentences are about; more of them are read in the tables."""
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Subject:
    """A model of the report."""

    name: str
    parameters: int
    entry: ModelEntry | None = None
    plan: PruningPlan | None = None
    scores: ImportanceScores | None = None
    parts: dict[str, int] | None = None
    """Parameters by part of the model, where its folder is at hand."""
    reconstruction: ReconstructionRecord | None = None
    """How well its output projections were refitted, where they were."""
    trained: bool = False
    """Whether it was trained after pruning."""
    recovery: Recovery | None = None
    """How it was trained; None also where the record of it is damaged."""
    log: TrainingLog = field(default_factory=TrainingLog)
    quantization: Quantization | None = None
    """How its weights were quantised, where they were."""


@dataclass(frozen=True)
class Inputs:
    """Everything that a report is drawn from."""

    output: Path
    """Where the report is written."""
    evaluation: Evaluation
    subjects: tuple[Subject, ...]
    baseline: str | None
    focus: str | None
    """The checkpoint that the report is of; None for a comparison of models."""
    verification: dict[str, Any] | None = None

    @property
    def compared(self) -> tuple[Subject, ...]:
        """Returns every model but the baseline."""
        return tuple(subject for subject in self.subjects if subject.name != self.baseline)

    def spoken(self, names: Iterable[str]) -> list[str]:
        """Returns the models that sentences are about: the report's own, or all but the baseline where they are few."""
        others = [name for name in names if name != self.baseline]
        return [name for name in others if name == self.focus] or (others if len(others) <= _FEW else [])

    def subject(self, name: str | None) -> Subject | None:
        """Returns the model of this name."""
        return next((subject for subject in self.subjects if subject.name == name), None)


def read_inputs(
    folder: Path, *, baseline: str | None = None, evaluation: str | os.PathLike[str] | None = None
) -> Inputs:
    """Reads a pruned checkpoint with its evaluation, or a folder with an evaluation."""
    if not folder.is_dir():
        raise ReportError(
            f"{folder} is no folder; give a checkpoint that amprune pruned, or a folder with {EVALUATION}"
        )
    pruned = (folder / RECORDS / "plan.json").is_file()
    ours = pruned or is_recovered(folder) or is_quantized(folder)
    output = folder / RECORDS if ours else folder
    file = Path(evaluation) if evaluation is not None else output / EVALUATION
    if not ours and evaluation is None and not file.is_file():
        raise ReportError(
            f"{folder} holds neither {RECORDS}/plan.json, as a checkpoint that amprune pruned does, nor {EVALUATION}; "
            f"measure models with `amprune evaluate DENSE PRUNED -o {folder / EVALUATION}`"
        )
    wanted = evaluation is not None or file.is_file()
    measured = _read_evaluation(file) if wanted else Evaluation()
    if not ours:
        subjects = tuple(_subject(entry) for entry in measured.models.values())
        return Inputs(output, measured, subjects, _baseline(measured, baseline, None), None)
    return _of_checkpoint(folder, output, measured, baseline)


def _read_evaluation(file: Path) -> Evaluation:
    try:
        evaluation = Evaluation.load(file)
    except EvaluationError as error:
        raise ReportError(f"{error}; measure again with `amprune evaluate`") from error
    if not evaluation.models:
        raise ReportError(f"{file} names no model; measure some with `amprune evaluate`")
    return evaluation


def _baseline(evaluation: Evaluation, baseline: str | None, focus: str | None) -> str | None:
    if baseline is None:
        return next((name for name in evaluation.models if name != focus), None)
    if baseline not in evaluation.models:
        there = ", ".join(evaluation.models) or f"none: there is no {EVALUATION}"
        raise ReportError(f"no model {baseline!r} to compare with; the evaluation's models are {there}")
    return baseline


def _of_checkpoint(folder: Path, output: Path, evaluation: Evaluation, baseline: str | None) -> Inputs:
    mine = _own_records(folder)
    focus = _find(folder, evaluation)
    base = _baseline(evaluation, baseline, focus)
    subjects = [_subject(entry) for entry in evaluation.models.values() if entry.name != focus]
    name = focus or mine.name
    mine = replace(mine, name=name, entry=evaluation.models.get(name))
    if base is None:
        trained = mine.recovery.source if mine.recovery is not None else None
        source = trained or (mine.quantization.quantized_from if mine.quantization is not None else None)
        dense = read_card(folder).dense or (source if mine.plan is None else None) or "the dense model"
        base = dense if dense != name else f"{dense} (dense)"
        subjects.append(Subject(base, mine.parameters if mine.plan is None else mine.plan.shape_before.parameters))
    position = 1 if subjects and subjects[0].name == base else 0
    subjects.insert(position, mine)
    file = output / "verification.json"
    verification = read_object(file) if file.is_file() else None
    return Inputs(output, evaluation, tuple(subjects), base, name, verification)


def _own_records(folder: Path) -> Subject:
    """Reads what the checkpoint that a report is of says about itself."""
    try:
        made, _ = read_made(folder), read_record(folder)
        if made.plan is not None:
            parameters = made.plan.shape_after.parameters
        elif made.quantization is not None:
            parameters = made.quantization.parameters
        else:
            parameters = inspect(folder).shape.parameters
    except AmpruneError as error:
        raise ReportError(f"the checkpoint's records are damaged: {error}; make the checkpoint again") from error
    return _with_records(folder, Subject(resolved(folder).name, parameters))


def _find(folder: Path, evaluation: Evaluation) -> str | None:
    """Finds a checkpoint among the models: by its path, or, where it has moved, by its content."""
    for name, entry in evaluation.models.items():
        if Path(entry.source).is_dir() and resolved(Path(entry.source)) == resolved(folder):
            return name
    if not evaluation.models:
        return None
    digest = _attempt(lambda: content_hash(folder)) if (folder / "config.json").is_file() else None
    for name, entry in evaluation.models.items():
        if entry.sha256 == digest:
            return name
    raise ReportError(
        f"the evaluation has no figures of {folder}; its models are {', '.join(evaluation.models)}. Measure it "
        f"with `amprune evaluate DENSE {folder} -o {folder / RECORDS / EVALUATION}`"
    )


def _subject(entry: ModelEntry) -> Subject:
    return _with_records(Path(entry.source), Subject(entry.name, entry.parameters, entry))


def _with_records(folder: Path, subject: Subject) -> Subject:
    """Adds what lies beside a model's weights, where it is still the model that was measured."""
    plan = _attempt(lambda: PruningPlan.load(folder / RECORDS / "plan.json"))
    if plan is not None and plan.shape_after.parameters != subject.parameters:
        return subject
    if is_recovered(folder):
        recovery = _attempt(lambda: read_recovery(folder))
        subject = replace(subject, trained=True, recovery=recovery, log=read_training_log(folder))
    if is_quantized(folder):
        subject = replace(subject, quantization=_attempt(lambda: read_quantization(folder)))
    if plan is not None:
        scores = _attempt(lambda: ImportanceScores.load(folder / RECORDS / "scores.safetensors"))
        fits = scores is not None and scores.shape == plan.shape_before
        refit = _attempt(lambda: read_record(folder))
        subject = replace(subject, plan=plan, scores=scores if fits else None, reconstruction=refit)
    if (folder / "config.json").is_file():
        parts = _attempt(lambda: inspect(folder).parameters_by_part)
        if parts is not None and sum(parts.values()) == subject.parameters:
            subject = replace(subject, parts=parts)
    return subject


def _attempt(read: Callable[[], _Read]) -> _Read | None:
    """Reads what a report can do without."""
    try:
        return read()
    except AmpruneError:
        return None
