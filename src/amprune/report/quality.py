"""Perplexity and zero-shot accuracy: tables, figures and what they say."""

import json
from collections.abc import Sequence

from amprune.report.blocks import Block, Picture, Section, Table, Text, drop_empty_columns
from amprune.report.drawing import style
from amprune.report.figures_measured import perplexity_figure
from amprune.report.inputs import Inputs
from amprune.report.measures import Change, Measure, average_change, averages, change, find_measures, headlines
from amprune.report.numbers import MISSING, number, percent, probability, times
from amprune.report.sizes import removed

_UNPAIRED = " (not paired)"


def perplexity_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Says what each text's perplexity is, with its difference from the baseline's."""
    blocks: list[Block] = []
    for index, measure in enumerate(find_measures(inputs.evaluation, "perplexity"), start=1):
        changes = {name: change(measure, name, inputs.baseline) for name in measure.records}
        if spoken := _spoken(measure, inputs):
            blocks.append(Text(_perplexity_words(measure, spoken, inputs)))
        rows = tuple(
            (
                name,
                number(record.value, record.standard_error),
                difference(changes[name]),
                times(record.value / measure.records[inputs.baseline].value)
                if changes[name] is not None and inputs.baseline is not None
                else MISSING,
                f"{record.n:,}",
            )
            for name, record in measure.records.items()
        )
        header = ("model", "perplexity \u00b1 standard error", "difference", "ratio", "windows")
        blocks.append(drop_empty_columns(Table(f"Perplexity, {measure.label}", header, rows), MISSING))
        if any(name != inputs.baseline for name in measure.records):
            blocks.append(_perplexity_picture(inputs, measure, colours, f"perplexity-{index}"))
    return Section("Perplexity", tuple(blocks)) if blocks else None


def _spoken(measure: Measure, inputs: Inputs, most: int = 3) -> list[str]:
    """Names the models that sentences are about: the report's own, or all of a few."""
    names = [name for name in measure.records if name != inputs.baseline]
    if inputs.focus in names:
        return [name for name in names if name == inputs.focus]
    return names if len(names) <= most else []


def _perplexity_words(measure: Measure, spoken: list[str], inputs: Inputs) -> str:
    base = measure.records.get(inputs.baseline or "")
    parts = []
    for name in spoken:
        record, found = measure.records[name], change(measure, name, inputs.baseline)
        words = f"that of {name} is {number(record.value, record.standard_error)}"
        if found is not None and base is not None:
            words += f", {times(record.value / base.value)} as high ({difference(found)})"
        parts.append(words)
    if base is not None:
        parts.insert(0, f"the perplexity of {inputs.baseline} is {number(base.value, base.standard_error)}")
    else:
        parts[0] = parts[0].replace("that of", "the perplexity of", 1)
    return f"On {measure.label}, {'; '.join(parts)}."


def _perplexity_picture(inputs: Inputs, measure: Measure, colours: dict[str, str], name: str) -> Picture:
    ratios = {subject.name: removed(inputs, subject) for subject in inputs.subjects}
    with style():
        figure = perplexity_figure(
            measure, ratios=ratios, baseline=inputs.baseline, colours=colours, lines=_lines(inputs)
        )
    points = "; ".join(f"{n}: {number(r.value)} at {percent(ratios[n])} removed" for n, r in measure.records.items())
    caption = f"Perplexity on {measure.label} against the share of parameters removed; bars are standard errors."
    return Picture(name, figure, f"Perplexity against ratio. {points}.", caption)


def _lines(inputs: Inputs) -> list[list[str]]:
    """Joins models that were made alike, but for the ratio; where two have the same, something else differs."""
    groups: dict[str, list[str]] = {}
    for subject in inputs.compared:
        plan, made = subject.plan, None
        if plan is not None:
            made = {**plan.provenance, "options": plan.choices}
        elif subject.entry is not None and subject.entry.pruned is not None:
            made = subject.entry.pruned.get("provenance")
        if made is not None:
            options = {k: v for k, v in (made.get("options") or {}).items() if k not in ("ratio", "heads_ratio")}
            taught = None if subject.recovery is None else [subject.recovery.data, subject.recovery.settings]
            alike = [made.get("fingerprint"), made.get("calibration"), options, subject.trained, taught]
            key = json.dumps(alike, sort_keys=True, default=str)
            groups.setdefault(key, []).append(subject.name)
    sizes = {subject.name: subject.parameters for subject in inputs.compared}
    return [names for names in groups.values() if 1 < len(names) == len({sizes[name] for name in names})]


def difference(found: Change | None, *, scale: float = 1.0) -> str:
    """Returns a difference with its standard error, marked where it is not paired."""
    if found is None:
        return MISSING
    error = found.difference.standard_error
    text = number(found.difference.value * scale, None if error is None else error * scale, signed=True)
    return text if found.paired else text + _UNPAIRED


def accuracy_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Says what each task's zero-shot accuracy is, with the differences question by question."""
    tasks, means = headlines(inputs.evaluation), averages(inputs.evaluation)
    if not tasks and not means:
        return None
    columns = [*tasks, *means]
    blocks: list[Block] = [Text(_accuracy_words(inputs, tasks, means))]
    header = ("model", *(heading(measure) for measure in columns))
    values = tuple((s.name, *(accuracy(m, s.name) for m in columns)) for s in inputs.subjects)
    blocks.append(drop_empty_columns(Table("Accuracy, % \u00b1 standard error", header, values), MISSING))
    changes = tuple(
        (s.name, *(_accuracy_change(m, tasks, means, s.name, inputs.baseline) for m in columns))
        for s in inputs.compared
    )
    if any(cell != MISSING for row in changes for cell in row[1:]):
        caption = f"Difference from {inputs.baseline} in percentage points \u00b1 standard error"
        blocks.append(drop_empty_columns(Table(caption, header, changes), MISSING))
        blocks.append(
            Text(
                "Differences are taken question by question, so that their errors are smaller than those of the two "
                "accuracies. p: two-sided exact McNemar test; with several tasks and models, a few small values are "
                "expected by chance."
            )
        )
    return Section("Zero-shot accuracy", tuple(blocks))


def heading(measure: Measure) -> str:
    """Returns the title of a task's column."""
    metric = "" if measure.metric == "accuracy" else f", {measure.metric}"
    few = measure.settings.get("num_fewshot")
    return f"{measure.label}{metric}" + (f", {few}-shot" if few and "fewshot" not in measure.label else "")


def accuracy(measure: Measure, model: str | None) -> str:
    """Returns an accuracy in percent with its standard error, another metric as it is."""
    record = measure.records.get(model or "")
    if record is None:
        return MISSING
    scale, error = _scale(measure), record.standard_error
    return number(scale * record.value, None if error is None else scale * error)


def _scale(measure: Measure) -> float:
    return 100.0 if measure.first.unit == "accuracy" else 1.0


def _accuracy_change(
    measure: Measure, tasks: Sequence[Measure], means: Sequence[Measure], model: str, baseline: str | None
) -> str:
    if measure in means:
        return difference(average_change(measure, tasks, model, baseline), scale=100)
    found = change(measure, model, baseline)
    if found is None or found.difference.p_value is None:
        return difference(found, scale=_scale(measure))
    value = probability(found.difference.p_value)
    return f"{difference(found, scale=_scale(measure))}\n(p {value if value.startswith('<') else '= ' + value})"


def _accuracy_words(inputs: Inputs, tasks: Sequence[Measure], means: Sequence[Measure]) -> str:
    sentences = []
    for measure in means:
        suffix = measure.label.removeprefix(measure.task).removeprefix(", ")
        parts = []
        for name in _spoken(measure, inputs):
            found = average_change(measure, tasks, name, inputs.baseline)
            points = f" ({difference(found, scale=100)} points)" if found is not None else ""
            parts.append(f"{name} {accuracy(measure, name)} %{points}")
        if parts and inputs.baseline in measure.records:
            parts.insert(0, f"{inputs.baseline} {accuracy(measure, inputs.baseline)} %")
        if parts:
            where = f" ({suffix})" if suffix else ""
            sentences.append(f"Questions answered correctly, averaged over the tasks{where}: {'; '.join(parts)}.")
    limits = sorted({m.settings["limit"] for m in tasks if isinstance(m.settings.get("limit"), int)})
    if limits:
        words = " or ".join(map(str, limits))
        sentences.append(f"Only the first {words} questions of a task were asked where a limit is set.")
    return " ".join(sentences) or "No example precedes a question unless the column says so."
