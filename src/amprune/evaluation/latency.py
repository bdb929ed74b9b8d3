"""Seconds of generating, and the peak memory: what `model/latency.py` times, as records."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from amprune.errors import EvaluationError
from amprune.evaluation.comparison import standard_error
from amprune.evaluation.identity import Subject
from amprune.evaluation.measurement import Job, halve_until_it_fits
from amprune.evaluation.records import Record
from amprune.model.latency import Latency, LatencySettings, Timed, check_positions, dtype_of, measure_latency
from amprune.model.llama_cpp import LlamaCppModel
from amprune.running import Progress


def latency_jobs(cases: Sequence[LatencySettings]) -> list[Job]:
    """Returns a job a case."""
    return [
        Job(f"latency: {case.label}", partial(latency_records, case), joint=True, check=partial(check_case, case))
        for case in cases
    ]


def check_case(case: LatencySettings, subject: Subject) -> None:
    """Raises EvaluationError for a model that cannot be timed so."""
    check_positions(subject.name, subject.positions, case)
    if subject.gguf is not None and (case.batch_size, case.mode) != (1, "eager"):
        raise EvaluationError(
            f"{subject.name} is a GGUF file, which llama.cpp runs one sequence at a time and as it is; ask for "
            "--latency-batch 1 --mode eager, or leave it out"
        )


def latency_records(case: LatencySettings, models: Mapping[str, Timed], progress: Progress) -> dict[str, list[Record]]:
    """Times one case, with a smaller batch where memory runs out; `items_hash` tells which models were interleaved."""

    def timed(batch_size: int) -> dict[str, Latency]:
        return measure_latency(models, replace(case, batch_size=batch_size), progress=progress)

    found, fitted = halve_until_it_fits(timed, case.batch_size, what=f"latency, {case.label}")
    smaller = None if fitted == case.batch_size else f"instead of a batch of {case.batch_size}: memory ran out"
    session, records = uuid.uuid4().hex, {}
    for name, model in models.items():
        by = f"by llama.cpp, xllamacpp {model.version}" if isinstance(model, LlamaCppModel) else None
        run = as_run(replace(case, batch_size=fitted), model)
        note = "; ".join(filter(None, (by, smaller))) or None
        records[name] = records_of(found[name], run, session=session, dtype=dtype_of(model), note=note)
    return records


def records_of(latency: Latency, run: LatencySettings, *, session: str, dtype: str, note: str | None) -> list[Record]:
    """Makes the records of what was timed of one model."""
    common = Record(
        measurement="latency", task=run.label, metric="", value=0, unit="s", note=note,
        settings={**run.to_dict(), "dtype": dtype},
    )  # fmt: skip
    parts = {"total": latency.total, "prefill": latency.prefill, "decode": latency.decode}
    records = [
        replace(
            common, metric=metric, value=sum(seconds) / len(seconds), n=len(seconds), seed=run.seed,
            standard_error=standard_error(seconds), items=tuple(seconds), items_hash=session,
        )
        for metric, seconds in parts.items()
    ]  # fmt: skip
    if latency.peak_memory is not None:
        records.append(replace(common, measurement="memory", metric="peak", value=latency.peak_memory, unit="bytes"))
    return records


def as_run(case: LatencySettings, model: Timed) -> LatencySettings:
    """Returns the case as it was run: what llama.cpp does is neither of the modes of transformers."""
    return replace(case, mode="llama.cpp") if isinstance(model, LlamaCppModel) else case
