"""Every measurement of one model or several, in order, into one `evaluation.json`. START HERE in this folder."""

import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from amprune.errors import EvaluationError, required
from amprune.evaluation.energy import energy_jobs
from amprune.evaluation.identity import Subject, open_subjects
from amprune.evaluation.latency import latency_jobs
from amprune.evaluation.measurement import Job, Loaded, nan_refused
from amprune.evaluation.perplexity import perplexity_jobs
from amprune.evaluation.records import Evaluation, Record
from amprune.evaluation.size import size_records
from amprune.evaluation.zero_shot import zero_shot_jobs
from amprune.model.architecture import quiet_transformers
from amprune.model.latency import LatencySettings, latency_cases
from amprune.model.llama_cpp import llama_cpp_model
from amprune.model.loading import device_of, load_tokenizer, loaded_model
from amprune.model.writer import check_target
from amprune.records import alone, go_on
from amprune.running import Advance, Progress, no_progress, out_of_memory
from amprune.settings import MEASURED_BY, MEASUREMENTS, EvaluationSettings, Measurement, PathLike, settle

logger = logging.getLogger(__name__)
_REQUESTED = (
    "sequence_length", "start_token", "windows", "tasks", "limit", "num_fewshot", "dtype", "energy_seconds", "country",
)  # fmt: skip
"""Settings that decide figures: an interrupted run is gone on with where they are the same."""
_PACKAGES = ("amprune", "torch", "transformers", "tokenizers", "lm-eval", "codecarbon")


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
    jobs = jobs_of(asked, cases)
    given = [models] if isinstance(models, str | os.PathLike) else list(models)
    subjects = open_subjects(given, asked, progress)
    for subject in subjects:
        for job in jobs:
            job.check(subject)
    path = Path(output).expanduser()
    check_target(path, [*(place for one in subjects for place in one.protected), *map(Path, asked.texts)], records=True)
    with alone(path.with_name(f"{path.name}.lock"), str(path), error=EvaluationError):
        session = _begin(path, subjects, jobs, asked, cases)
        for subject in subjects:
            _measure_alone(session, subject, [job for job in jobs if not job.joint], asked, progress)
        joint = [job for job in jobs if job.joint and job.label not in session.done]
        if joint:
            with _loaded(subjects, asked, cases) as loaded:
                for job in joint:
                    session.keep(job.label, job.measure(loaded, progress))
        session.evaluation.unfinished = None  # the same request then measures anew
        session.evaluation.save(session.path)
    return session.evaluation


def jobs_of(asked: EvaluationSettings, cases: Sequence[LatencySettings]) -> list[Job]:
    """Opens all that is measured on; settings and data that make no sense are refused before any model is loaded."""
    _check(asked, cases)
    openers: dict[Measurement, Callable[[], list[Job]]] = {  # to add a measurement, add a line
        "perplexity": lambda: perplexity_jobs(asked),
        "zero_shot": lambda: zero_shot_jobs(asked),
        "latency": lambda: latency_jobs(cases),
        "energy": lambda: energy_jobs(cases[:1], asked),
    }
    # Backwards, since tasks are found at once and texts may have to be fetched.
    opened = {kind: openers[kind]() for kind in reversed(openers) if kind in asked.measure}
    return [Job("size", size_records), *(job for kind in openers for job in opened.get(kind, ()))]


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


@dataclass(frozen=True)
class _Session:
    """Keeps records as they come, so that a run can go on where it was interrupted."""

    path: Path
    evaluation: Evaluation
    device: str
    done: list[str]
    """Labels of what this run, or the interrupted one that it goes on with, has finished."""

    def keep(self, label: str, records: Mapping[str, Sequence[Record]]) -> None:
        """Saves the records of one measurement, by model; `label` is then done."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        for model, found in records.items():
            common: dict[str, Any] = {"model": model, "device": self.device, "versions": versions(), "time": now}
            self.evaluation.add(replace(record, **common) for record in found)
        self.done.append(label)
        self.evaluation.save(self.path)


def _begin(
    path: Path,
    subjects: Sequence[Subject],
    jobs: Sequence[Job],
    asked: EvaluationSettings,
    cases: Sequence[LatencySettings],
) -> _Session:
    """Reads the file when it is there and finds what an interrupted run of the same request had finished."""
    evaluation = Evaluation.load(path) if path.exists() else Evaluation()
    for subject in subjects:
        evaluation.add_model(subject.entry)
    device = f"device map {asked.device_map}" if asked.device_map else device_name(device_of(asked.device))
    request = {
        "measure": asked.measure,
        "data": [job.data for job in jobs if job.data is not None],
        **{name: getattr(asked, name) for name in _REQUESTED},
        "latency": [asdict(case) for case in cases],
        "device": device,
        "models": {subject.name: subject.entry.sha256 for subject in subjects},
    }
    run = go_on(evaluation.unfinished, request)
    if run.done:
        logger.info("going on with an interrupted run; done already: %s", ", ".join(run.done))
    evaluation.unfinished = run.begun()
    evaluation.save(path)
    return _Session(path, evaluation, device, run.done)


def _measure_alone(
    session: _Session, subject: Subject, jobs: Sequence[Job], asked: EvaluationSettings, progress: Progress
) -> None:
    """Loads a model once and measures what is not done yet."""
    open_jobs = [job for job in jobs if f"{subject.name}: {job.label}" not in session.done]
    if not open_jobs:
        return
    tokenizer = None
    if any(job.data is not None for job in open_jobs):
        tokenizer = load_tokenizer(subject.folder, trust_remote_code=asked.trust_remote_code)
    note = None if subject.gguf is None else f"{subject.gguf.type} weights, dequantised and run by transformers"

    def watched(description: str, total: int) -> AbstractContextManager[Advance]:
        return progress(f"{subject.name}: {description}", total)

    with _loaded([subject], asked) as models, nan_refused(model := models[subject.name], subject.name):
        for job in open_jobs:
            kept = [one for one in session.evaluation.of(subject.name) if one.device == session.device]
            with quiet_transformers():
                found = job.measure(Loaded(model, tokenizer, subject.gguf, kept, watched))
            noted = [replace(one, note="; ".join(filter(None, (note, one.note))) or None) for one in found]
            session.keep(f"{subject.name}: {job.label}", {subject.name: noted})


@contextmanager
def _loaded(
    subjects: Sequence[Subject], asked: EvaluationSettings, cases: Sequence[LatencySettings] = ()
) -> Iterator[dict[str, Any]]:
    """Loads models side by side: where cases are timed, GGUF files in llama.cpp, and else all in transformers."""
    with ExitStack() as stack:
        models: dict[str, Any] = {}
        for subject in subjects:
            found: AbstractContextManager[Any]
            try:
                if subject.gguf is not None and cases:
                    positions = max(case.prompt_tokens + case.new_tokens for case in cases)
                    gpu = device_of(asked.device) != "cpu"
                    threads = torch.get_num_threads()
                    found = llama_cpp_model(subject.gguf, positions=positions, threads=threads, gpu=gpu)
                else:
                    where = {"device": asked.device, "device_map": asked.device_map}
                    found = loaded_model(subject.folder, dtype=asked.dtype, **where)
                models[subject.name] = stack.enter_context(found)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                others = f" beside {', '.join(models)}" if models else ""
                raise EvaluationError(
                    f"{subject.name} does not fit into memory{others}; measure fewer models at a time, or use a "
                    "smaller --dtype, --device cpu or --device-map auto"
                ) from error
        yield models


def device_name(device: str) -> str:
    """Returns what a device is: the processor and its threads, or the accelerator."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{device} ({processor}, {threads} thread{'' if threads == 1 else 's'})"


@lru_cache
def versions() -> dict[str, str]:
    """Returns the versions that can change a figure."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
