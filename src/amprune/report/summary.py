"""An evaluation in few figures: what the terminal shows of it, and what a model card's front matter says."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from amprune.evaluation.records import Evaluation
from amprune.report.grid import Grid
from amprune.report.measures import Measure, average_change, averages, find_measures, headlines
from amprune.report.numbers import number, scaled, seconds, times

_DATASETS = {
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "piqa": "ybisk/piqa",
}
"""Where the hub has the data of a task."""
_CONFIGS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "winogrande": "winogrande_xl"}


def evaluation_grid(evaluation: Evaluation, models: Sequence[str], output: Path) -> Grid:
    """Returns a row for each figure and a column for each model, the difference from the first in brackets."""
    tasks = headlines(evaluation)
    measures = [
        *find_measures(evaluation, "size", "parameters"),
        *find_measures(evaluation, "size", "weight_bytes"),
        *find_measures(evaluation, "perplexity"),
        *find_measures(evaluation, "bits_per_byte"),
        *tasks,
        *averages(evaluation),
        *find_measures(evaluation, "latency", "total"),
        *find_measures(evaluation, "memory"),
        *find_measures(evaluation, "energy"),
    ]
    rows = [(_row_name(m), *(_figure(m, name, tasks, baseline=models[0]) for name in models)) for m in measures]
    return Grid(f"Evaluation in {output}", ("", *models), tuple(row for row in rows if any(row[1:])))


def _row_name(measure: Measure) -> str:
    metric = measure.metric.replace("_", " ")
    if measure.measurement == "size":
        return metric
    what = {"latency": f"{metric} latency", "memory": f"{metric} memory", "energy": measure.first.unit}
    kind = what.get(measure.measurement, metric)
    return f"{measure.label}: {kind}" + (", %" if measure.first.unit == "accuracy" else "")


def _figure(measure: Measure, model: str, tasks: Sequence[Measure], *, baseline: str) -> str:
    """Writes one cell: the value, and how it differs from the baseline's."""
    record, theirs = measure.records.get(model), measure.records.get(baseline)
    if record is None:
        return ""
    if measure.measurement in ("size", "memory"):
        less = f" ({record.value / theirs.value - 1:+.1%})" if theirs is not None and model != baseline else ""
        return scaled(record.value, "B" if record.unit == "bytes" else "") + less
    found = average_change(measure, tasks if measure.task == "average" else (), model, baseline)
    if measure.measurement == "latency":
        middle = statistics.median(record.items or (record.value,))
        return seconds(middle) + (f" ({times(found.difference.value)})" if found else "")
    text = number(record.value, record.standard_error, scale=measure.scale)
    if found is None:
        return text
    apart = found.difference
    return f"{text} ({number(apart.value, apart.standard_error, scale=measure.scale, signed=True)})"


def model_index(evaluation: Evaluation, name: str) -> list[dict[str, Any]]:
    """Returns the quality of a model as the hub's `model-index`; empty where nothing was measured."""
    measures = (*find_measures(evaluation, "perplexity"), *headlines(evaluation), *averages(evaluation))
    results = [_result(measure, name) for measure in measures if name in measure.records]
    return eval_results_to_model_index(name, results) if results else []


def _result(measure: Measure, name: str) -> EvalResult:
    """The settings stand in the metric's name: the hub would merge figures that differ in them alone."""
    record, asked = measure.records[name], measure.settings.get("limit")
    words = f"{measure.metric}, {measure.label}" + (f", first {asked} questions" if asked else "")
    wikitext = measure.task.startswith("wikitext2")
    slug = "-".join("".join(c if c.isalnum() else " " for c in measure.task.lower()).split()) or "unnamed"
    return EvalResult(
        task_type="text-generation",
        dataset_type="Salesforce/wikitext" if wikitext else _DATASETS.get(measure.task, slug),
        dataset_config=_CONFIGS.get(measure.task, "wikitext-2-raw-v1" if wikitext else None),
        dataset_name=measure.task,
        metric_type="perplexity" if measure.metric == "perplexity" else "accuracy",
        metric_name=words,
        metric_value=float(f"{record.value:.6g}"),
    )
