"""Perplexity and zero-shot accuracy: tables, the figure and what they say."""

import json
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amprune.report.drawing import BASELINE_COLOUR, ENDS, Label, logarithmic, new_figure, style, write_labels
from amprune.report.grid import grid_of
from amprune.report.inputs import Inputs
from amprune.report.measures import Change, Measure, average_change, averages, change, find_measures, headlines
from amprune.report.numbers import MISSING, number, percent, probability, shortened, times
from amprune.report.page import Block, Picture, Section
from amprune.report.sizes import removed

_LOG_RANGE = 10.0


def perplexity_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Says what each text's perplexity is, with its difference from the baseline's."""
    blocks: list[Block] = []
    for index, measure in enumerate(find_measures(inputs.evaluation, "perplexity"), start=1):
        records, base = measure.records, measure.records.get(inputs.baseline or "")
        changes = {name: found for name in records if (found := change(measure, name, inputs.baseline)) is not None}
        if spoken := inputs.spoken(records):
            blocks.append(_perplexity_words(measure, spoken, inputs))
        columns = [
            ("perplexity \u00b1 standard error", {n: number(r.value, r.standard_error) for n, r in records.items()}),
            ("difference", {name: difference(found) for name, found in changes.items()}),
            ("ratio", {name: times(records[name].value / base.value) for name in changes if base is not None}),
            ("bits per byte", _bits_per_byte(inputs, measure)),
            ("windows", {name: f"{record.n:,}" for name, record in records.items()}),
        ]
        blocks.append(grid_of(f"Perplexity, {measure.label}", list(records), columns))
        if any(name != inputs.baseline for name in records):
            blocks.append(_perplexity_picture(inputs, measure, colours, f"perplexity-{index}"))
    return Section("Perplexity", tuple(blocks)) if blocks else None


def _bits_per_byte(inputs: Inputs, measure: Measure) -> dict[str, str]:
    """Returns the same loss over the bytes of the text, which may be compared between tokenizers."""
    found = find_measures(inputs.evaluation, "bits_per_byte")
    same = [m for m in found if (m.task, m.device, m.settings) == (measure.task, measure.device, measure.settings)]
    return {name: number(one.value, one.standard_error) for m in same for name, one in m.records.items()}


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
    figure = _perplexity_figure(inputs, measure, ratios, colours)
    points = "; ".join(f"{n}: {number(r.value)} at {percent(ratios[n])} removed" for n, r in measure.records.items())
    caption = f"Perplexity on {measure.label} against the share of parameters removed; bars are standard errors."
    return Picture(name, figure, f"Perplexity against ratio. {points}.", caption)


@style()
def _perplexity_figure(inputs: Inputs, measure: Measure, ratios: dict[str, float], colours: dict[str, str]) -> Figure:
    """Draws perplexity against the share of parameters removed, models that differ in the ratio alone joined."""
    figure = new_figure(3.3)
    axes = figure.add_subplot()
    baseline, lines = inputs.baseline, _lines(inputs)
    names = [name for name in measure.records if name != baseline]
    values = {name: record.value for name, record in measure.records.items()}
    for line in lines:
        points = sorted((ratios[name], values[name]) for name in line if name in values)
        axes.plot([100 * x for x, _ in points], [y for _, y in points], color="#bdbdbd", linewidth=1.2, zorder=1)
    for name in names:
        error = measure.records[name].standard_error
        x, y, colour = 100 * ratios[name], values[name], colours[name]
        axes.errorbar(x, y, yerr=error, fmt="o", color=colour, markersize=5.5, capsize=2.5, linewidth=1.2, zorder=3)
    _scale_perplexity(axes, list(values.values()), [ratios[name] for name in names])
    axes.set(xlabel="parameters removed, %", ylabel="perplexity (lower is better)")
    axes.grid(axis="y")
    shown = {n: number(r.value, r.standard_error) for n, r in measure.records.items()}
    labels = [Label(100 * ratios[n], values[n], f"{shortened(n, 24)}\n{shown[n]}", colours[n]) for n in names]
    if baseline in values and baseline is not None:
        axes.axhline(values[baseline], color=BASELINE_COLOUR, linestyle="--", linewidth=1.1, zorder=2)
        ends = [(values[baseline], f"{shortened(baseline, 24)}: {shown[baseline]}")]
        labels = [Label(x, y, text, BASELINE_COLOUR, ENDS) for y, text in ends for x in axes.get_xlim()[:1]] + labels
    write_labels(
        figure, axes, labels, [line.get_xydata() for line in axes.lines[: len(lines)]], values.get(baseline or "")
    )
    return figure


def _scale_perplexity(axes: Axes, values: Sequence[float], ratios: Sequence[float]) -> None:
    low, high = min(values), max(values)
    left, right = min([0.0, *ratios]), max([0.0, *ratios])
    room = max(right - left, 0.05)
    axes.set_xlim(100 * (left - 0.04 * room), 100 * (right + 0.28 * room))
    if low > 0 and high / low > _LOG_RANGE:
        logarithmic(axes, "y")
        axes.set_ylim(low / (high / low) ** 0.08, high * (high / low) ** 0.16)
        logarithmic(axes, "y")
    else:
        axes.set_ylim(max(0.0, low - 0.25 * (high - low) - 0.05 * low), high + 0.22 * (high - low) + 0.05 * high)


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
    text = number(found.difference.value, found.difference.standard_error, signed=True, scale=scale)
    return text if found.paired else f"{text} (not paired)"


def accuracy_section(inputs: Inputs) -> Section | None:
    """Says what each task's zero-shot accuracy is, with the differences question by question."""
    tasks, means = headlines(inputs.evaluation), averages(inputs.evaluation)
    if not tasks and not means:
        return None
    names, compared = [s.name for s in inputs.subjects], [s.name for s in inputs.compared]
    figures = [(heading(m), {name: accuracy(m, name) for name in names}) for m in (*tasks, *means)]
    blocks: list[Block] = [
        _accuracy_words(inputs, tasks, means), grid_of("Accuracy, % \u00b1 standard error", names, figures)
    ]  # fmt: skip
    changes = [
        (heading(m), {name: _accuracy_change(m, tasks, means, name, inputs.baseline) for name in compared})
        for m in (*tasks, *means)
    ]
    if any(cell != MISSING for _, cells in changes for cell in cells.values()):
        title = f"Difference from {inputs.baseline} in percentage points \u00b1 standard error"
        words = (
            "Differences are taken question by question, so that their errors are smaller than those of the two "
            "accuracies. p: two-sided exact McNemar test; with several tasks and models, a few small values are "
            "expected by chance."
        )
        blocks += [grid_of(title, compared, changes), words]
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
    return number(record.value, record.standard_error, scale=measure.scale)


def _accuracy_change(
    measure: Measure, tasks: Iterable[Measure], means: Iterable[Measure], model: str, baseline: str | None
) -> str:
    if measure in means:
        return difference(average_change(measure, tasks, model, baseline), scale=100)
    found = change(measure, model, baseline)
    if found is None or found.difference.p_value is None:
        return difference(found, scale=measure.scale)
    value = probability(found.difference.p_value)
    return f"{difference(found, scale=measure.scale)}\n(p {value if value.startswith('<') else '= ' + value})"


def _accuracy_words(inputs: Inputs, tasks: Sequence[Measure], means: Sequence[Measure]) -> str:
    sentences = []
    for measure in means:
        suffix = measure.label.removeprefix(measure.task).removeprefix(", ")
        parts = []
        for name in inputs.spoken(measure.records):
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
