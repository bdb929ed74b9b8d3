"""Every measurement of one model or several, in order, into one `evaluation.json`. START HERE in this folder."""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from amprune.errors import EvaluationError, required
from amprune.evaluation.data import load_text, load_wikitext
from amprune.evaluation.energy import interleaved_energy
from amprune.evaluation.figures import (
    Figures,
    average_figures,
    dtype_of,
    energy_figures,
    latency_figures,
    perplexity_figures,
    size_figures,
    zero_shot_figures,
)
from amprune.evaluation.guards import halve_until_it_fits, nan_refused, out_of_memory
from amprune.evaluation.identity import Subject, open_subjects
from amprune.evaluation.perplexity import check_windows
from amprune.evaluation.records import Evaluation
from amprune.evaluation.session import Session, device_name, open_session
from amprune.evaluation.zero_shot import open_tasks
from amprune.model.architecture import quiet_transformers
from amprune.model.latency import (
    Latency,
    LatencySettings,
    Timed,
    check_positions,
    generation_run,
    latency_cases,
    measure_latency,
)
from amprune.model.llama_cpp import LlamaCppModel, llama_cpp_model
from amprune.model.loading import default_device, input_device, load_tokenizer, loaded_model
from amprune.running import Progress, no_progress
from amprune.settings import MEASURED_BY, MEASUREMENTS, EvaluationSettings, PathLike, settle


@dataclass(frozen=True)
class _Job:
    """One measurement of one model."""

    label: str
    figures: Callable[[PreTrainedModel, Any, Progress], Figures]
    needs_tokenizer: bool = True


@dataclass(frozen=True)
class _JointJob:
    """One measurement of all models in turn."""

    label: str
    figures: Callable[[Mapping[str, Timed]], dict[str, Figures]]


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
        latency: the cases to time, in the place of the settings'; energy is measured on the first.
        progress: told how far it is.
        options: of `EvaluationSettings`, such as `measure=["perplexity"]`.

    Raises:
        EvaluationError: data or settings are wrong, logits are NaN, or the file holds another model under a name.
        CheckpointError: one of the models is none, or lacks a tokenizer.
    """
    asked = settle(EvaluationSettings, settings, options)
    measure, texts, tasks, data_dir = asked.measure, asked.texts, asked.tasks, asked.data_dir
    limit, batch_size, num_fewshot = asked.limit, asked.batch_size, asked.num_fewshot
    sequence_length, windows, split = asked.sequence_length, asked.windows, asked.split
    energy_seconds, country = asked.energy_seconds, asked.country
    device, dtype, device_map = asked.device, asked.dtype, asked.device_map
    revision, trust_remote_code = asked.revision, asked.trust_remote_code
    latency = latency_cases(asked) if latency is None else latency
    folder = None if data_dir is None else Path(data_dir).expanduser()
    _check(measure, texts, tasks, limit, batch_size, latency)
    jobs, data = list[_Job](), []
    opened = open_tasks(tasks, data_dir=folder) if "zero_shot" in measure else ()  # before a text is fetched
    if "perplexity" in measure:
        found = [load_text(Path(text)) for text in texts] or [load_wikitext(split, data_dir=folder)]
        windowed = partial(perplexity_figures, sequence_length=sequence_length, windows=windows)
        jobs += [_Job(text.name, partial(windowed, text=text)) for text in found]
        data += [text.sha256 for text in found]
    if "zero_shot" in measure:
        of_task = partial(zero_shot_figures, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
        jobs += [_Job(task.name, partial(of_task, task=task)) for task in opened]
        data += [task.data.sha256 if task.data else task.name for task in opened]
    given = [models] if isinstance(models, str | os.PathLike) else list(models)
    subjects = open_subjects(given, revision=revision, dtype=dtype, progress=progress)
    for subject in subjects:
        if "perplexity" in measure:
            check_windows(subject.positions, sequence_length, windows)
        for case in latency if {"latency", "energy"} & set(measure) else ():
            check_positions(subject.name, subject.positions, case)
            _check_case(subject, case)
    request = {
        "measure": list(measure), "data": data, "sequence_length": sequence_length, "windows": windows,
        "tasks": list(tasks), "limit": limit, "num_fewshot": num_fewshot,
        "latency": [asdict(case) for case in latency], "dtype": dtype,
        "energy_seconds": energy_seconds, "country": country,
    }  # fmt: skip
    where = f"device map {device_map}" if device_map else device_name(device or default_device())
    session = open_session(Path(output).expanduser(), subjects, request, device=where)
    load = partial(loaded_model, dtype=dtype, device=device, device_map=device_map)
    for subject in subjects:
        alone = [_Job("size", partial(size_figures, gguf=subject.gguf), needs_tokenizer=False), *jobs]
        if "zero_shot" in measure:
            mean = partial(average_figures, evaluation=session.evaluation, name=subject.name, device=where)
            mean = partial(mean, limit=limit, num_fewshot=num_fewshot)
            alone = [*alone, _Job("average", mean, needs_tokenizer=False)]
        _measure_alone(session, subject, alone, load, trust_remote_code=trust_remote_code, progress=progress)
    together = []
    if "latency" in measure:
        timed = partial(_timed, progress=progress)
        together += [_JointJob(f"latency: {case.label}", partial(timed, case=case)) for case in latency]
    if "energy" in measure:
        metered = partial(_metered, seconds=energy_seconds, country=country, progress=progress)
        together += [_JointJob(f"energy: {case.label}", partial(metered, case=case)) for case in latency[:1]]
    _measure_together(session, subjects, together, partial(_loaded, load=load, cases=latency, device=device))
    return session.finish()


def _check(
    measure: Sequence[str],
    texts: Sequence[PathLike],
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    latency: Sequence[LatencySettings],
) -> None:
    unknown = [name for name in measure if name not in MEASUREMENTS]
    if unknown:
        raise EvaluationError(f"cannot measure {unknown[0]!r}; choose from {', '.join(MEASUREMENTS)}")
    for kind, chosen in (("zero_shot", tasks), ("latency", latency), ("energy", latency)):
        if kind in measure and not chosen:
            raise EvaluationError(f"{kind}: no {'task' if kind == 'zero_shot' else 'case'} is given; give one or more")
    names = [Path(text).name for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"two texts are called {twice[0]!r}, and figures are kept by name; rename one")
    for name, value in (("limit", limit), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise EvaluationError(f"the {name} is {value}, expected 1 or more")
    for case in latency:
        case.check()
    required("measuring", *(library for kind in measure for library in MEASURED_BY.get(kind, ())))


def _check_case(subject: Subject, case: LatencySettings) -> None:
    if subject.gguf is not None and (case.batch_size, case.mode) != (1, "eager"):
        raise EvaluationError(
            f"{subject.name} is a GGUF file, which llama.cpp runs one sequence at a time and as it is; ask for "
            "--latency-batch 1 --mode eager, or leave it out"
        )


def _loaded(
    subject: Subject, *, load: Any, cases: Sequence[LatencySettings], device: str | None
) -> AbstractContextManager[Timed]:
    """Loads a model to be timed: a GGUF file in llama.cpp, others in transformers."""
    if subject.gguf is None:
        found: AbstractContextManager[Timed] = load(subject.folder)
        return found
    return llama_cpp_model(
        subject.gguf,
        positions=max(case.prompt_tokens + case.new_tokens for case in cases),
        threads=torch.get_num_threads(),
        gpu=(device or default_device()) != "cpu",
    )


def _measure_alone(
    session: Session, subject: Subject, jobs: Sequence[_Job], load: Any, *, trust_remote_code: bool, progress: Progress
) -> None:
    """Loads a model once and measures what is not done yet."""
    open_jobs = [job for job in jobs if not session.is_done(f"{subject.name}: {job.label}")]
    if not open_jobs:
        return
    needed = any(job.needs_tokenizer for job in open_jobs)
    tokenizer = load_tokenizer(subject.folder, trust_remote_code=trust_remote_code) if needed else None
    note = None if subject.gguf is None else f"{subject.gguf.type} weights, dequantised and run by transformers"
    with _fitting(lambda one: load(one.folder), [subject]) as models, nan_refused(models[subject.name], subject.name):
        for job in open_jobs:
            watched = _named(progress, subject.name)
            with quiet_transformers():
                figures = job.figures(models[subject.name], tokenizer, watched)
            told = [{**figure, "note": _and(note, figure.get("note"))} for figure in figures]
            session.keep(f"{subject.name}: {job.label}", {subject.name: told})


def _measure_together(session: Session, subjects: Sequence[Subject], jobs: Sequence[_JointJob], load: Any) -> None:
    """Loads all models at once and measures them in turn, case by case."""
    open_jobs = [job for job in jobs if not session.is_done(job.label)]
    if open_jobs:
        with _fitting(load, subjects) as loaded:
            for job in open_jobs:
                session.keep(job.label, job.figures(loaded))


def _and(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _timed(models: Mapping[str, Timed], *, case: LatencySettings, progress: Progress) -> dict[str, Figures]:
    """Times one case, with a smaller batch where memory runs out."""

    def timed(batch_size: int) -> dict[str, Latency]:
        return measure_latency(models, replace(case, batch_size=batch_size), progress=progress)

    found, fitted = halve_until_it_fits(timed, case.batch_size, what=f"latency, {case.label}")
    smaller = None if fitted == case.batch_size else f"instead of a batch of {case.batch_size}: memory ran out"
    together, settings = uuid.uuid4().hex, replace(case, batch_size=fitted)
    return {
        name: latency_figures(
            found[name],
            _as_run(settings, model),
            session=together,
            dtype=dtype_of(model),
            note=_and(_by(model), smaller),
        )
        for name, model in models.items()
    }


def _as_run(case: LatencySettings, model: Timed) -> LatencySettings:
    """Returns the case as it was run: what llama.cpp does is neither of the modes of transformers."""
    return replace(case, mode="llama.cpp") if isinstance(model, LlamaCppModel) else case


def _by(model: Timed) -> str | None:
    return f"by llama.cpp, xllamacpp {model.version}" if isinstance(model, LlamaCppModel) else None


def _metered(
    models: Mapping[str, Timed], *, case: LatencySettings, seconds: float, country: str, progress: Progress
) -> dict[str, Figures]:
    """Measures the energy of generating in one case."""
    devices = [input_device(model) for model in models.values() if not isinstance(model, LlamaCppModel)]
    device = devices[0] if devices else torch.device("cpu")
    runs = {name: generation_run(model, case) for name, model in models.items()}
    found = interleaved_energy(runs, device=str(device), country=country, block_seconds=seconds, progress=progress)
    together = uuid.uuid4().hex
    return {
        name: energy_figures(
            found[name], _as_run(case, model), session=together, dtype=dtype_of(model), country=country
        )
        for name, model in models.items()
    }


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


def _named(progress: Progress, name: str) -> Progress:
    """Puts the model's name in front of what is going on."""
    return lambda description, total: progress(f"{name}: {description}", total)
