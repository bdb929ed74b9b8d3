"""Seconds of generating, and the peak memory: what `model/latency.py` times, as records."""

import uuid
from collections.abc import Mapping
from dataclasses import replace

from amprune.evaluation.comparison import standard_error
from amprune.evaluation.guards import halve_until_it_fits
from amprune.evaluation.records import Record
from amprune.model.latency import Latency, LatencySettings, Timed, dtype_of, measure_latency
from amprune.model.llama_cpp import LlamaCppModel
from amprune.running import Progress


def latency_records(models: Mapping[str, Timed], case: LatencySettings, progress: Progress) -> dict[str, list[Record]]:
    """Times one case, with a smaller batch where memory runs out; `items_hash` tells which models were interleaved."""

    def timed(batch_size: int) -> dict[str, Latency]:
        return measure_latency(models, replace(case, batch_size=batch_size), progress=progress)

    found, fitted = halve_until_it_fits(timed, case.batch_size, what=f"latency, {case.label}")
    smaller = None if fitted == case.batch_size else f"instead of a batch of {case.batch_size}: memory ran out"
    together, records = uuid.uuid4().hex, {}
    for name, model in models.items():
        by = f"by llama.cpp, xllamacpp {model.version}" if isinstance(model, LlamaCppModel) else None
        run = as_run(replace(case, batch_size=fitted), model)
        note = "; ".join(filter(None, (by, smaller))) or None
        records[name] = records_of(found[name], run, session=together, dtype=dtype_of(model), note=note)
    return records


def records_of(
    latency: Latency, settings: LatencySettings, *, session: str, dtype: str, note: str | None
) -> list[Record]:
    """Makes the records of what was timed of one model."""
    told = {**settings.to_dict(), "dtype": dtype}
    parts = {"total": latency.total, "prefill": latency.prefill, "decode": latency.decode}
    records = [
        Record(
            measurement="latency", task=settings.label, metric=metric, value=sum(seconds) / len(seconds), unit="s",
            n=len(seconds), standard_error=standard_error(seconds), settings=told, seed=settings.seed,
            items=tuple(seconds), items_hash=session, note=note,
        )
        for metric, seconds in parts.items()
    ]  # fmt: skip
    if latency.peak_memory is not None:
        peak = Record(
            measurement="memory", task=settings.label, metric="peak", value=latency.peak_memory, unit="bytes",
            settings=told, note=note,
        )  # fmt: skip
        records.append(peak)
    return records


def as_run(case: LatencySettings, model: Timed) -> LatencySettings:
    """Returns the case as it was run: what llama.cpp does is neither of the modes of transformers."""
    return replace(case, mode="llama.cpp") if isinstance(model, LlamaCppModel) else case
