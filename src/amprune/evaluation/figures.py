"""What each measurement puts into its records."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from amprune.evaluation.comparison import average, standard_error
from amprune.evaluation.data import Text
from amprune.evaluation.energy import Energy
from amprune.evaluation.perplexity import measure_perplexity
from amprune.evaluation.records import Evaluation, Record
from amprune.evaluation.size import UNITS, measure_size
from amprune.evaluation.zero_shot import TASKS, Task, headline_metric, measure_zero_shot
from amprune.model.gguf_file import GgufFile
from amprune.model.latency import Latency, LatencySettings
from amprune.model.llama_cpp import LlamaCppModel
from amprune.running import Progress

Figures = list[dict[str, Any]]
"""Fields of records, but for the model and what is common to a run."""


def size_figures(
    model: PreTrainedModel, tokenizer: Any, progress: Progress, *, gguf: GgufFile | None = None
) -> Figures:
    """Parameters, bytes and multiply-accumulates; the bytes of a GGUF file are its own."""
    dtype, sizes = dtype_of(model), measure_size(model).to_dict()
    if gguf is not None:
        sizes |= {
            "weight_bytes": gguf.weight_bytes,
            "weight_bytes_per_token": gguf.weight_bytes_per_token,
            "kv_cache_bytes_per_token": gguf.cache_bytes_per_token,
        }
    return [
        {"measurement": "size", "task": "model", "metric": name, "value": value, "unit": UNITS[name],
         "settings": {"dtype": dtype}}
        for name, value in sizes.items()
    ]  # fmt: skip


def perplexity_figures(
    model: PreTrainedModel,
    tokenizer: Any,
    progress: Progress,
    *,
    text: Text,
    sequence_length: int,
    windows: int | None,
) -> Figures:
    """Perplexity of one text."""
    found, _ = measure_perplexity(
        model, tokenizer, text, sequence_length=sequence_length, limit=windows, progress=progress
    )
    return [
        {
            "measurement": "perplexity",
            "task": text.name,
            "metric": "perplexity",
            "value": found.value,
            "unit": "perplexity",
            "n": len(found.losses),
            "standard_error": found.standard_error,
            "settings": {"sequence_length": sequence_length, "windows": windows, "dtype": dtype_of(model)},
            "items": found.losses,
            "items_hash": found.tokens_hash,
            "data": {
                "name": text.name,
                "sha256": text.sha256,
                "tokens": found.tokens,
                "predicted": found.predicted,
            },
        }
    ]


def zero_shot_figures(
    model: PreTrainedModel,
    tokenizer: Any,
    progress: Progress,
    *,
    task: Task,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
) -> Figures:
    """Every metric of one task of the harness."""
    found, fitted = measure_zero_shot(
        model, tokenizer, task, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, progress=progress
    )
    note = None if fitted == batch_size else f"a batch of {fitted} instead of {batch_size}: memory ran out"
    where = {"name": task.data.file.name, "sha256": task.data.sha256} if task.data else {"name": "hub"}
    return [
        {
            "measurement": "zero_shot",
            "task": accuracy.task,
            "metric": accuracy.metric,
            "value": accuracy.value,
            "unit": "accuracy" if accuracy.metric.startswith("acc") else accuracy.metric,
            "n": accuracy.n,
            "standard_error": accuracy.standard_error,
            "settings": {
                "limit": limit,
                "num_fewshot": accuracy.num_fewshot,
                "task_version": accuracy.version,
                "dtype": dtype_of(model),
            },
            "items": accuracy.items,
            "items_hash": accuracy.items_hash,
            "data": where,
            "note": note,
        }
        for accuracy in found
    ]


def average_figures(
    model: PreTrainedModel,
    tokenizer: Any,
    progress: Progress,
    *,
    evaluation: Evaluation,
    name: str,
    limit: int | None,
    num_fewshot: int | None,
    device: str,
) -> Figures:
    """The unweighted mean of the paper's five tasks, each by the metric that the paper reports; none if one lacks."""
    same = {"limit": limit, "num_fewshot": num_fewshot or 0, "dtype": dtype_of(model)}
    records = [
        record
        for record in evaluation.of(name, "zero_shot")
        if record.device == device and same.items() <= record.settings.items()
    ]
    chosen: list[Record] = []
    for task in TASKS:
        metrics = {record.metric: record for record in records if record.task == task}
        if not metrics:
            return []
        chosen.append(metrics[headline_metric(task, list(metrics))])
    mean, error = average([(record.value, record.standard_error) for record in chosen])
    return [
        {
            "measurement": "zero_shot",
            "task": "average",
            "metric": "accuracy",
            "value": mean,
            "unit": "accuracy",
            "n": sum(record.n for record in chosen),
            "standard_error": error,
            "settings": {**same, "tasks": list(TASKS)},
        }
    ]


def latency_figures(
    latency: Latency, settings: LatencySettings, *, session: str, dtype: str, note: str | None
) -> Figures:
    """Seconds of one case and the peak memory; `session` tells which models were interleaved."""
    common = {"task": settings.label, "settings": {**settings.to_dict(), "dtype": dtype}, "note": note}
    parts: dict[str, Sequence[float]] = {
        "total": latency.total,
        "prefill": latency.prefill,
        "decode": latency.decode,
    }
    figures: Figures = [
        {
            **common,
            "measurement": "latency",
            "metric": metric,
            "value": sum(seconds) / len(seconds),
            "unit": "s",
            "n": len(seconds),
            "standard_error": standard_error(seconds),
            "seed": settings.seed,
            "items": tuple(seconds),
            "items_hash": session,
        }
        for metric, seconds in parts.items()
    ]
    if latency.peak_memory is not None:
        peak = {"measurement": "memory", "metric": "peak", "value": latency.peak_memory, "unit": "bytes"}
        figures.append({**common, **peak})
    return figures


def energy_figures(energy: Energy, settings: LatencySettings, *, session: str, dtype: str, country: str) -> Figures:
    """Watt-hours of generating; `session` tells which models were interleaved."""
    return [
        {
            "measurement": "energy",
            "task": settings.label,
            "metric": "energy",
            "value": energy.watt_hours_per_1000_tokens,
            "unit": "Wh per 1,000 tokens",
            "n": len(energy.items),
            "standard_error": energy.standard_error,
            "settings": {**settings.to_dict(), "dtype": dtype, "country": country},
            "seed": settings.seed,
            "items": energy.items,
            "items_hash": session,
            "note": energy.note,
        }
    ]


def dtype_of(model: PreTrainedModel | LlamaCppModel) -> str:
    """Returns the dtype of a model's computation."""
    if isinstance(model, LlamaCppModel):
        return "as stored"
    return str(model.dtype).removeprefix("torch.")
