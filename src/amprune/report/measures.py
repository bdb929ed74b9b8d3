"""The same measurement of several models, and how they differ in it."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from amprune.evaluation.comparison import Difference, average, paired
from amprune.evaluation.records import Evaluation, Record
from amprune.evaluation.zero_shot import headline_metric

_PAPER_AVERAGE = "average"


@dataclass(frozen=True)
class Measure:
    """Records that may be set side by side: the same task, metric, settings and device."""

    measurement: str
    task: str
    metric: str
    device: str
    settings: Mapping[str, Any]
    records: Mapping[str, Record]
    """By name of the model."""
    label: str
    """The task, with the settings that tell it from another measurement of the same task."""

    @property
    def first(self) -> Record:
        """Returns the record that was measured first."""
        return next(iter(self.records.values()))

    @property
    def scale(self) -> float:
        """Returns by what its figures are multiplied to be shown: accuracies are in percent."""
        return 100.0 if self.first.unit == "accuracy" else 1.0


@dataclass(frozen=True)
class Change:
    """What a model has more or less than the baseline; of a latency, the speedup."""

    difference: Difference
    paired: bool


def find_measures(evaluation: Evaluation, measurement: str, metric: str | None = None) -> tuple[Measure, ...]:
    """Sorts an evaluation's records into measures, in the order in which they were first measured."""
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in evaluation.records.values():
        if record.measurement == measurement and metric in (None, record.metric):
            settings = json.dumps(record.settings, sort_keys=True)
            groups.setdefault((record.task, record.metric, record.device, settings), []).append(record)
    order = {name: index for index, name in enumerate(evaluation.models)}
    found = []
    for (task, name, device, _), records in groups.items():
        known = sorted((record for record in records if record.model in order), key=lambda r: order[r.model])
        if known:
            by_model = {record.model: record for record in known}
            found.append(Measure(measurement, task, name, device, known[0].settings, by_model, task))
    return tuple(_labelled(measure, found) for measure in found)


def _labelled(measure: Measure, others: Iterable[Measure]) -> Measure:
    same = [other for other in others if (other.task, other.metric) == (measure.task, measure.metric)]
    names = dict.fromkeys(name for other in same for name in other.settings)
    differing = [n for n in names if len({json.dumps(other.settings.get(n), sort_keys=True) for other in same}) > 1]
    parts = [setting(name, measure.settings.get(name)) for name in differing]
    if len({other.device for other in same}) > 1:
        parts.append(measure.device)
    return replace(measure, label=", ".join([measure.task, *parts]))


def setting(name: str, value: object) -> str:
    """Returns one setting as a reader wants it: `limit 100`, `no limit`."""
    words = name.replace("_", " ")
    if name == "windows":
        return "all windows" if value is None else f"first {value} windows"
    if name == "num_fewshot":
        return f"{value}-shot"
    if value is None:
        return f"no {words}"
    return str(value) if name in ("dtype", "mode") else f"{words} {value}"


def change(measure: Measure, model: str, baseline: str | None) -> Change | None:
    """Compares a model with the baseline: paired where the items are the same, otherwise by the two values."""
    ours, theirs = measure.records.get(model), measure.records.get(baseline or "")
    if ours is None or theirs is None or model == baseline:
        return None
    if (difference := paired(ours, theirs)) is not None:
        return Change(difference, True)
    if measure.measurement == "latency":
        return Change(Difference(theirs.value / ours.value, None, 1), False) if ours.value > 0 else None
    errors = (ours.standard_error, theirs.standard_error)
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) if len(known) == len(errors) else None
    return Change(Difference(ours.value - theirs.value, error, min(ours.n, theirs.n)), False)


def headlines(evaluation: Evaluation) -> tuple[Measure, ...]:
    """Returns the zero-shot measures of the metric that stands for each task, the average apart."""
    measures = [m for m in find_measures(evaluation, "zero_shot") if m.task != _PAPER_AVERAGE]
    metrics: dict[str, list[str]] = {}
    for measure in measures:
        metrics.setdefault(measure.task, []).append(measure.metric)
    chosen = {task: headline_metric(task, list(dict.fromkeys(names))) for task, names in metrics.items()}
    return tuple(measure for measure in measures if measure.metric == chosen[measure.task])


def averages(evaluation: Evaluation) -> tuple[Measure, ...]:
    """Returns the measures of the average over tasks."""
    return tuple(m for m in find_measures(evaluation, "zero_shot") if m.task == _PAPER_AVERAGE)


def average_change(measure: Measure, tasks: Iterable[Measure], model: str, baseline: str | None) -> Change | None:
    """Compares two averages: by the tasks' paired differences where the averages are over these tasks and no others."""
    plain = change(measure, model, baseline)
    if plain is None or baseline is None:
        return plain
    members = [
        task for task in tasks if {model, baseline} <= set(task.records) and _agree(task.settings, measure.settings)
    ]
    changes = [change(task, model, baseline) for task in members]
    differences = [found.difference for found in changes if found is not None and found.paired]
    if not differences or len(differences) < len(members):
        return plain
    for name in (model, baseline):
        mean = statistics.fmean(task.records[name].value for task in members)
        if not math.isclose(mean, measure.records[name].value, abs_tol=1e-6):
            return plain
    value, error = average([(difference.value, difference.standard_error) for difference in differences])
    return Change(Difference(value, error, sum(difference.n for difference in differences)), True)


def _agree(settings: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return all(settings[name] == value for name, value in others.items() if name in settings)


def ideal_speedup(evaluation: Evaluation, model: str, baseline: str | None) -> float | None:
    """Returns the baseline's weight bytes read for one decoded token over the model's."""
    for measure in find_measures(evaluation, "size", "weight_bytes_per_token"):
        ours, theirs = measure.records.get(model), measure.records.get(baseline or "")
        if ours is not None and theirs is not None and model != baseline and ours.value > 0:
            return theirs.value / ours.value
    return None


def quartiles(record: Record) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile of a latency's runs."""
    if len(record.items) < 2:
        return record.value, record.value, record.value
    low, middle, high = statistics.quantiles(record.items, n=4, method="inclusive")
    return low, middle, high


def tokens_per_second(record: Record) -> float | None:
    """Returns the generated tokens a second of a total latency, by its median."""
    settings = record.settings
    new, batch = settings.get("new_tokens"), settings.get("batch_size", 1)
    if not isinstance(new, int) or not isinstance(batch, int) or (seconds := quartiles(record)[1]) <= 0:
        return None
    return new * batch / seconds


def decode_steps(measure: Measure) -> int:
    """Returns how many tokens a decode latency is for: all new ones but the first, which the prefill gives; else 1."""
    new = measure.settings.get("new_tokens")
    return max(1, new - 1) if isinstance(new, int) and measure.metric == "decode" else 1
