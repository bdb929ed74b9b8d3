"""Every measurement of one model or several, in order, into one `evaluation.json`. START HERE in this folder."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from amprune.errors import EvaluationError, required
from amprune.evaluation.data import Text, load_text, load_wikitext
from amprune.evaluation.energy import energy_records
from amprune.evaluation.guards import nan_refused, out_of_memory
from amprune.evaluation.identity import Subject, open_subjects
from amprune.evaluation.latency import latency_records
from amprune.evaluation.perplexity import check_windows, perplexity_records
from amprune.evaluation.records import Evaluation, Record
from amprune.evaluation.session import Session, device_name, open_session
from amprune.evaluation.size import size_records
from amprune.evaluation.zero_shot import Task, average_records, open_tasks, zero_shot_records
from amprune.model.architecture import quiet_transformers
from amprune.model.latency import LatencySettings, Timed, check_positions, dtype_of, latency_cases
from amprune.model.llama_cpp import llama_cpp_model
from amprune.model.loading import default_device, load_tokenizer, loaded_model
from amprune.running import Advance, Progress, no_progress
from amprune.settings import MEASURED_BY, MEASUREMENTS, EvaluationSettings, PathLike, settle

_Job = Callable[..., list[Record]]
"""Measures `(model, tokenizer, progress=...)` and returns its records."""
_REQUESTED = (
    "sequence_length", "windows", "tasks", "limit", "num_fewshot", "dtype", "energy_seconds", "country",
)  # fmt: skip
"""Settings that decide figures: an interrupted run is gone on with where they are the same."""


def evaluate(
    models: PathLike | Sequence[PathLike],
    output: PathLike = "evaluation.json",
    settings: EvaluationSettings | None = None,
    *,
    latency: Sequence[LatencySettings] | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> Evaluation:
    """Measures models into one `evaluation.json`; sizes are always counted.

    The file is saved after every measurement. A run that was interrupted goes on where it stopped when the same is
    asked for again; a run that was finished is measured anew and its figures are replaced.

    Args:
        models: MODEL or NAME=MODEL each; the first is the baseline of comparisons.
        output: read when it is there, and written.
        settings: what is measured, on what.
        latency: the cases to time, instead of the settings'; energy is measured on the first.
        progress: told how far it is.
        options: of `EvaluationSettings`, such as `measure=["perplexity"]`.

    Raises:
        EvaluationError: data or settings are wrong, logits are NaN, or the file holds another model under a name.
        CheckpointError: one of the models is none, or lacks a tokenizer.
    """
    asked = settle(EvaluationSettings, settings, options)
    cases = latency_cases(asked) if latency is None else latency
    _check(asked, cases)
    folder = None if asked.data_dir is None else Path(asked.data_dir).expanduser()
    tasks = open_tasks(asked.tasks, data_dir=folder) if "zero_shot" in asked.measure else ()  # before a text is fetched
    texts: list[Text] = []
    if "perplexity" in asked.measure:
        texts = [load_text(Path(text)) for text in asked.texts] or [load_wikitext(asked.split, data_dir=folder)]
    given = [models] if isinstance(models, str | os.PathLike) else list(models)
    subjects = open_subjects(given, revision=asked.revision, dtype=asked.dtype, progress=progress)
    for subject in subjects:
        _check_subject(subject, asked, cases)
    request = {
        "measure": list(asked.measure),
        "data": [one.sha256 for one in texts] + [one.data.sha256 if one.data else one.name for one in tasks],
        **{name: getattr(asked, name) for name in _REQUESTED},
        "latency": [asdict(case) for case in cases],
    }
    where = f"device map {asked.device_map}" if asked.device_map else device_name(asked.device or default_device())
    session = open_session(Path(output).expanduser(), subjects, request, device=where)
    for subject in subjects:
        _measure_alone(session, subject, _alone(session, subject, texts, tasks, asked), asked, progress)
    together: dict[str, Callable[[Mapping[str, Timed]], dict[str, list[Record]]]] = {}
    if "latency" in asked.measure:
        for case in cases:
            together[f"latency: {case.label}"] = partial(latency_records, case=case, progress=progress)
    if "energy" in asked.measure:
        metered = partial(energy_records, case=cases[0], asked=asked, progress=progress)
        together[f"energy: {cases[0].label}"] = metered
    open_jobs = {label: job for label, job in together.items() if label not in session.done}
    if open_jobs:
        with _fitting(partial(_loaded, asked=asked, cases=cases), subjects) as loaded:
            for label, measured in open_jobs.items():
                session.keep(label, measured(loaded))
    return session.finish()


def _check(asked: EvaluationSettings, cases: Sequence[LatencySettings]) -> None:
    if unknown := [name for name in asked.measure if name not in MEASUREMENTS]:
        raise EvaluationError(f"cannot measure {unknown[0]!r}; choose from {', '.join(MEASUREMENTS)}")
    for kind, chosen in (("zero_shot", asked.tasks), ("latency", cases), ("energy", cases)):
        if kind in asked.measure and not chosen:
            raise EvaluationError(f"{kind}: no {'task' if kind == 'zero_shot' else 'case'} is given; give one or more")
    names = [Path(text).name for text in asked.texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"two texts are called {twice[0]!r}, and figures are kept by name; rename one")
    for name, value in (("limit", asked.limit), ("batch size", asked.batch_size)):
        if value is not None and value < 1:
            raise EvaluationError(f"the {name} is {value}, expected 1 or more")
    for case in cases:
        case.check()
    required("measuring", *(library for kind in asked.measure for library in MEASURED_BY.get(kind, ())))


def _check_subject(subject: Subject, asked: EvaluationSettings, cases: Sequence[LatencySettings]) -> None:
    if "perplexity" in asked.measure:
        check_windows(subject.positions, asked.sequence_length, asked.windows)
    for case in cases if {"latency", "energy"} & set(asked.measure) else ():
        check_positions(subject.name, subject.positions, case)
        if subject.gguf is not None and (case.batch_size, case.mode) != (1, "eager"):
            raise EvaluationError(
                f"{subject.name} is a GGUF file, which llama.cpp runs one sequence at a time and as it is; ask for "
                "--latency-batch 1 --mode eager, or leave it out"
            )


def _alone(
    session: Session, subject: Subject, texts: Sequence[Text], tasks: Sequence[Task], asked: EvaluationSettings
) -> dict[str, _Job]:
    """Returns what is measured of each model alone: to add a measurement, add a line here."""

    def average(model: PreTrainedModel, tokenizer: Any, *, progress: Progress) -> list[Record]:
        records = session.evaluation.of(subject.name, "zero_shot")
        same = {"limit": asked.limit, "num_fewshot": asked.num_fewshot or 0, "dtype": dtype_of(model)}
        return average_records((one for one in records if one.device == session.device), same)

    jobs: dict[str, _Job] = {"size": lambda model, tokenizer, *, progress: size_records(model, subject.gguf)}
    jobs |= {text.name: partial(perplexity_records, text=text, asked=asked) for text in texts}
    jobs |= {task.name: partial(zero_shot_records, task=task, asked=asked) for task in tasks}
    return jobs | ({"average": average} if tasks else {})


def _measure_alone(
    session: Session, subject: Subject, jobs: Mapping[str, _Job], asked: EvaluationSettings, progress: Progress
) -> None:
    """Loads a model once and measures what is not done yet."""
    open_jobs = {name: job for name, job in jobs.items() if f"{subject.name}: {name}" not in session.done}
    if not open_jobs:
        return
    tokenizer = None
    if open_jobs.keys() - {"size", "average"}:
        tokenizer = load_tokenizer(subject.folder, trust_remote_code=asked.trust_remote_code)
    note = None if subject.gguf is None else f"{subject.gguf.type} weights, dequantised and run by transformers"
    load = partial(_in_transformers, asked=asked)

    def watched(description: str, total: int) -> AbstractContextManager[Advance]:
        return progress(f"{subject.name}: {description}", total)

    with _fitting(load, [subject]) as models, nan_refused(models[subject.name], subject.name):
        for name, job in open_jobs.items():
            with quiet_transformers():
                found = job(models[subject.name], tokenizer, progress=watched)
            noted = (replace(one, note="; ".join(filter(None, (note, one.note))) or None) for one in found)
            session.keep(f"{subject.name}: {name}", {subject.name: noted})


def _in_transformers(subject: Subject, *, asked: EvaluationSettings) -> AbstractContextManager[PreTrainedModel]:
    return loaded_model(subject.folder, dtype=asked.dtype, device=asked.device, device_map=asked.device_map)


def _loaded(
    subject: Subject, *, asked: EvaluationSettings, cases: Sequence[LatencySettings]
) -> AbstractContextManager[Timed]:
    """Loads a model to be timed: a GGUF file in llama.cpp, others in transformers."""
    if subject.gguf is None:
        return _in_transformers(subject, asked=asked)
    return llama_cpp_model(
        subject.gguf,
        positions=max(case.prompt_tokens + case.new_tokens for case in cases),
        threads=torch.get_num_threads(),
        gpu=(asked.device or default_device()) != "cpu",
    )


@contextmanager
def _fitting(load: Any, subjects: Sequence[Subject]) -> Iterator[Mapping[str, Any]]:
    """Loads models side by side."""
    with ExitStack() as stack:
        models: dict[str, Any] = {}
        for subject in subjects:
            try:
                models[subject.name] = stack.enter_context(load(subject))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                others = f" beside {', '.join(models)}" if models else ""
                raise EvaluationError(
                    f"{subject.name} does not fit into memory{others}; measure fewer models at a time, or use a "
                    "smaller --dtype, --device cpu or --device-map auto"
                ) from error
        yield models
