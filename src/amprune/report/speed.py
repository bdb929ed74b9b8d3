"""Latency, memory, energy and what a workload costs: tables, the figure and what they say."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amprune.evaluation.records import Record
from amprune.evaluation.workload import Costs, costs, saving, time_saved
from amprune.report.drawing import named_rows, new_figure, style
from amprune.report.grid import Grid, grid_of
from amprune.report.inputs import Inputs
from amprune.report.measures import (
    Change,
    Measure,
    change,
    decode_steps,
    find_measures,
    ideal_speedup,
    quartiles,
    tokens_per_second,
)
from amprune.report.numbers import number, percent, scaled, seconds, times
from amprune.report.page import Block, Picture, Section
from amprune.settings import Workload

_MEDIANS = (
    "Times are medians over the runs. A speedup is the median over pairs of runs in the same round, with its quartiles "
    "in brackets."
)
_IDEAL = (
    "The ideal is the baseline's weight bytes read for a decoded token over the model's: what decoding would gain if "
    "reading weights were all that it took. Attention over the context, kernel launches and the sampling of tokens do "
    "not shrink with the weights; with large batches, arithmetic counts instead of bytes. The prefill has no such "
    "ideal. "
)


def latency_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Sets the measured speedup beside the ideal, prefill and decoding apart."""
    stages = {name: find_measures(inputs.evaluation, "latency", name) for name in ("prefill", "decode", "total")}
    if not any(stages.values()):
        return None
    blocks: list[Block] = []
    if sentences := _latency_sentences(inputs):
        blocks.append(tuple(sentences))
    for case in {(m.label, m.device): m for measures in stages.values() for m in measures}.values():
        same = (case.label, case.device, case.settings)
        blocks.append(_latency_grid(inputs, case.label, {
            name: next((m for m in measures if (m.label, m.device, m.settings) == same), None)
            for name, measures in stages.items()
        }))  # fmt: skip
    blocks.append(_MEDIANS)
    if stages["decode"]:
        blocks.append(_latency_picture(inputs, stages["decode"], colours))
    if _ideals(inputs):
        blocks.append(_IDEAL)
    return Section("Latency", tuple(blocks))


def _ideals(inputs: Inputs) -> dict[str, float]:
    found = {s.name: ideal_speedup(inputs.evaluation, s.name, inputs.baseline) for s in inputs.compared}
    return {name: ideal for name, ideal in found.items() if ideal is not None}


def _latency_grid(inputs: Inputs, label: str, stages: Mapping[str, Measure | None]) -> Grid:
    """Returns the times of a case, each stage with its speedup, decoding with the ideal as well."""
    there = {name for measure in stages.values() if measure is not None for name in measure.records}
    names, ideals = [s.name for s in inputs.subjects if s.name in there], _ideals(inputs)
    columns: list[tuple[str, dict[str, str]]] = []
    for stage, measure in stages.items():
        times_of = {} if measure is None else {name: _time(measure, name) for name in measure.records}
        found = {} if measure is None else {name: change(measure, name, inputs.baseline) for name in measure.records}
        gains = {name: gain for name, gain in found.items() if gain is not None}
        columns.append(("decode per token" if stage == "decode" else stage, times_of))
        columns.append((f"{stage} speedup", {name: speedup_words(gain) for name, gain in gains.items()}))
        if stage == "decode":
            shares = {n: gains[n].difference.value / ideal for n, ideal in ideals.items() if n in gains and ideal > 1}
            columns.append(("ideal", {name: times(ideal) for name, ideal in ideals.items()}))
            columns.append(("of the ideal", {name: percent(share, 0) for name, share in shares.items()}))
    return grid_of(f"Latency, {label}", names, columns)


def _time(measure: Measure, name: str) -> str:
    """Returns the median time, of decoding for a token."""
    return seconds(quartiles(measure.records[name])[1] / decode_steps(measure))


def speedup_words(found: Change) -> str:
    """Returns a speedup with its quartiles, marked where it is not paired."""
    text = times(found.difference.value)
    if found.difference.quartiles is not None:
        low, high = found.difference.quartiles
        text += f"\n({low:.2f} to {high:.2f})"
    return text if found.paired else f"{text}, not paired"


def _latency_sentences(inputs: Inputs) -> list[str]:
    """Returns a sentence a case on the report's model, or one a model on the first case."""
    measures = find_measures(inputs.evaluation, "latency", "decode")
    if inputs.focus is None:
        chosen = [(m, s.name) for m in measures[:1] for s in inputs.compared if s.name in m.records]
        chosen = chosen if len(chosen) <= 3 else []
    else:
        chosen = [(m, inputs.focus) for m in measures]
    return [text for measure, name in chosen if (text := _latency_sentence(inputs, measure, name))]


def _latency_sentence(inputs: Inputs, measure: Measure, name: str) -> str:
    found = change(measure, name, inputs.baseline)
    if found is None:
        return ""
    speedup, ideal = found.difference.value, ideal_speedup(inputs.evaluation, name, inputs.baseline)
    text = f"{name} decodes ({measure.label}) at {times(speedup)} the speed of {inputs.baseline}"
    if ideal is None or ideal <= 1:
        return f"{text}."
    text += f": {times(speedup)} measured of {times(ideal)} ideal, {percent(speedup / ideal, 0)} of the ideal"
    if speedup >= ideal:
        return f"{text}. Nothing is left of what fewer weight bytes can give."
    if speedup <= 1:
        return f"{text}; {times(ideal / speedup)} is left."
    saved, possible = percent(time_saved(speedup), 0), percent(time_saved(ideal), 0)
    return f"{text}; {saved} of the time is saved where {possible} could be, and {times(ideal / speedup)} is left."


def _latency_picture(inputs: Inputs, measures: Sequence[Measure], colours: dict[str, str]) -> Picture:
    ideals = _ideals(inputs)
    figure = _latency_figure(measures, baseline=inputs.baseline, ideals=ideals, colours=colours)
    words = "; ".join(
        f"{measure.label}: " + ", ".join(f"{name} {_time(measure, name)}" for name in measure.records)
        for measure in measures
    )
    caption = "Median time for a decoded token; whiskers are quartiles" + (
        ", a black mark is where the ideal lies." if ideals else "."
    )
    return Picture("latency", figure, f"Milliseconds a decoded token. {words}.", caption)


@style()
def _latency_figure(
    measures: Sequence[Measure],
    *,
    baseline: str | None,
    ideals: Mapping[str, float],
    colours: Mapping[str, str],
) -> Figure:
    """Draws milliseconds per decoded token, a panel for each case, with a mark where the ideal lies."""
    heights = [0.62 + 0.3 * len(measure.records) for measure in measures]
    figure = new_figure(sum(heights) + 0.35)
    panels = figure.subplots(len(measures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, measure in zip(panels, measures, strict=True):
        _latency_panel(axes, measure, baseline=baseline, ideals=ideals, colours=colours)
    panels[-1].set_xlabel("decoding, milliseconds a token (shorter is better)")
    return figure


def _latency_panel(
    axes: Axes, measure: Measure, *, baseline: str | None, ideals: Mapping[str, float], colours: Mapping[str, str]
) -> None:
    steps, records = decode_steps(measure), measure.records
    spreads = {name: [1000 * value / steps for value in quartiles(record)] for name, record in records.items()}
    milliseconds = {name: middle for name, (_, middle, _) in spreads.items()}
    dense = milliseconds.get(baseline or "")
    for row, (name, value) in enumerate(milliseconds.items()):
        low, _, high = spreads[name]
        axes.barh(row, value, height=0.68, color=colours[name])
        axes.errorbar(value, row, xerr=[[value - low], [high - value]], color="#222222", capsize=2, linewidth=1.0)
        words = number(value)
        found = change(measure, name, baseline)
        if found is not None:
            words += f"  ({times(found.difference.value)}"
        if dense is not None and name in ideals:
            ideal = dense / ideals[name]
            axes.plot([ideal, ideal], [row - 0.42, row + 0.42], color="black", linewidth=1.8)
            words += f" of {times(ideals[name])} ideal"
        words += ")" if found is not None else ""
        axes.annotate(words, (high, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    named_rows(axes, list(milliseconds))
    axes.set(title=measure.label, xlim=(0, max(milliseconds.values()) * 1.75))


def resources_section(inputs: Inputs) -> Section | None:
    """Sets peak memory and energy of every case side by side."""
    blocks: list[Block] = []
    for measurement, words in (("memory", "Peak memory"), ("energy", "Energy")):
        measures = find_measures(inputs.evaluation, measurement)
        if not measures:
            continue
        units = dict.fromkeys(measure.first.unit for measure in measures)
        unit = "" if "bytes" in units else f", {' or '.join(units)}"
        against = f", with the change from {inputs.baseline}" if inputs.compared and inputs.baseline else ""
        columns = [(m.label, {n: " ".join([amount(m.records[n]), *(f"({r})" for r in rise(m, n, inputs.baseline))])
                              for n in m.records}) for m in measures]  # fmt: skip
        blocks.append(grid_of(f"{words}{unit}{against}", [s.name for s in inputs.subjects], columns))
        notes = dict.fromkeys(record.note for measure in measures for record in measure.records.values())
        blocks += [f"{words}: {note.rstrip('.')}." for note in notes if note]
    return Section("Memory and energy", tuple(blocks)) if blocks else None


def amount(record: Record) -> str:
    """Returns bytes or watt-hours as text."""
    return scaled(record.value, "B") if record.unit == "bytes" else number(record.value, record.standard_error)


def rise(measure: Measure, name: str, baseline: str | None) -> tuple[str, ...]:
    """Returns by which share a figure is above the baseline's; nothing where there is no baseline."""
    base = measure.records.get(baseline or "")
    if base is None or name == baseline or base.value <= 0:
        return ()
    share = measure.records[name].value / base.value - 1
    return (f"{'+' if share > 0 else ''}{percent(share)}",)


def workload_section(inputs: Inputs, workload: Workload) -> Section | None:
    """Says what the workload takes with each model, by the measured speed."""
    measure = next(iter(find_measures(inputs.evaluation, "latency", "total")), None)
    speeds = {} if measure is None else {n: v for n, r in measure.records.items() if (v := tokens_per_second(r))}
    if measure is None or not speeds:
        return None
    taken = {name: costs(workload, tokens_per_second=speed) for name, speed in speeds.items()}
    base = taken.get(inputs.baseline or "")
    others = {name: found for name, found in taken.items() if name != inputs.baseline and base is not None}
    columns = [
        ("tokens a second", {name: number(speed) for name, speed in speeds.items()}),
        ("hours", {name: f"{found.hours:,.1f}" for name, found in taken.items()}),
        (workload.currency, {name: f"{found.money:,.2f}" for name, found in taken.items()}),
        ("kWh", {name: f"{found.energy_kwh:,.2f}" for name, found in taken.items()}),
        ("kg CO2e", {name: f"{found.co2_kg:,.2f}" for name, found in taken.items()}),
        ("time saved", {n: percent(saving(base.hours, one.hours)) for n, one in others.items() if base is not None}),
    ]
    words = tuple(_saving_sentence(inputs, name, taken, workload) for name in inputs.spoken(others))
    title = f"{workload.days:g} days of {workload.tokens_per_day:,.0f} tokens a day"
    blocks = (grid_of(title, list(taken), columns), _assumptions(workload, measure.label))
    return Section("Cost and carbon of a workload", (*([words] if words else []), *blocks))


def _saving_sentence(inputs: Inputs, name: str, taken: dict[str, Costs], workload: Workload) -> str:
    ours, theirs = taken[name], taken[inputs.baseline or ""]
    hours, money, co2 = theirs.hours - ours.hours, theirs.money - ours.money, theirs.co2_kg - ours.co2_kg
    verb = "saves" if hours >= 0 else "costs an extra"
    return (
        f"{name} {verb} {abs(hours):,.1f} of {theirs.hours:,.1f} hours, {abs(money):,.2f} of {theirs.money:,.2f} "
        f"{workload.currency} and {abs(co2):,.2f} of {theirs.co2_kg:,.2f} kg CO2e against {inputs.baseline}."
    )


def _assumptions(workload: Workload, case: str) -> str:
    billing = "" if workload.billing == "exact" else "; every hour of a day that is begun is paid"
    return (
        f"Assumed: {workload.price_per_hour:g} {workload.currency} an hour{billing}, a device that draws "
        f"{workload.device_power:g} W while it computes, {workload.grid_intensity:g} kg CO2e a kWh, and the speed "
        f"measured for {case} on the device named below. This is arithmetic on one measured speed, no measurement of "
        "energy: hours, money and carbon all save the same share as time."
    )
