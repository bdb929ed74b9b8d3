"""Latency, memory, energy and what a workload costs: tables, figures and what they say."""

from amprune.evaluation.records import Record
from amprune.evaluation.workload import Costs, costs, saving, time_saved
from amprune.report.blocks import Block, Bullets, Picture, Section, Table, Text, drop_empty_columns
from amprune.report.drawing import style
from amprune.report.figures_measured import latency_figure
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
from amprune.report.numbers import MISSING, number, percent, scaled, seconds, times
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
    if sentences := latency_sentences(inputs):
        blocks.append(Bullets(tuple(sentences)))
    cases = {(m.label, m.device): m for measures in stages.values() for m in measures}
    for (label, device), case in cases.items():
        found = {
            name: next((m for m in measures if (m.label, m.device, m.settings) == (label, device, case.settings)), None)
            for name, measures in stages.items()
        }
        blocks.append(_latency_table(inputs, label, found))
    blocks.append(Text(_MEDIANS))
    if stages["decode"]:
        blocks.append(_latency_picture(inputs, stages["decode"], colours))
    if any(ideal_speedup(inputs.evaluation, subject.name, inputs.baseline) for subject in inputs.compared):
        blocks.append(Text(_IDEAL))
    return Section("Latency", tuple(blocks))


def _latency_table(inputs: Inputs, label: str, stages: dict[str, Measure | None]) -> Table:
    rows = []
    for subject in inputs.subjects:
        name = subject.name
        if not any(measure is not None and name in measure.records for measure in stages.values()):
            continue
        ideal = ideal_speedup(inputs.evaluation, name, inputs.baseline)
        decode = stages["decode"]
        gained = change(decode, name, inputs.baseline) if decode is not None else None
        share = percent(gained.difference.value / ideal, 0) if gained and ideal and ideal > 1 else MISSING
        rows.append(
            (
                name,
                _time(stages["prefill"], name),
                _speedup(stages["prefill"], name, inputs.baseline),
                _time(decode, name, per_token=True),
                _speedup(decode, name, inputs.baseline),
                times(ideal) if ideal is not None else MISSING,
                share,
                _time(stages["total"], name),
                _speedup(stages["total"], name, inputs.baseline),
            )
        )
    header = (
        *("model", "prefill", "prefill speedup", "decode per token", "decode speedup", "ideal", "of the ideal"),
        *("total", "total speedup"),
    )
    return drop_empty_columns(Table(f"Latency, {label}", header, tuple(rows)), MISSING)


def _time(measure: Measure | None, name: str, *, per_token: bool = False) -> str:
    if measure is None or name not in measure.records:
        return MISSING
    return seconds(quartiles(measure.records[name])[1] / (decode_steps(measure) if per_token else 1))


def _speedup(measure: Measure | None, name: str, baseline: str | None) -> str:
    found = change(measure, name, baseline) if measure is not None else None
    return MISSING if found is None else speedup_words(found)


def speedup_words(found: Change) -> str:
    """Returns a speedup with its quartiles, marked where it is not paired."""
    text = times(found.difference.value)
    if found.difference.quartiles is not None:
        low, high = found.difference.quartiles
        text += f"\n({low:.2f} to {high:.2f})"
    return text if found.paired else f"{text}, not paired"


def latency_sentences(inputs: Inputs) -> list[str]:
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


def _latency_picture(inputs: Inputs, measures: tuple[Measure, ...], colours: dict[str, str]) -> Picture:
    ideals = {
        subject.name: ideal
        for subject in inputs.compared
        if (ideal := ideal_speedup(inputs.evaluation, subject.name, inputs.baseline)) is not None
    }
    with style():
        figure = latency_figure(measures, baseline=inputs.baseline, ideals=ideals, colours=colours)
    words = "; ".join(
        f"{measure.label}: " + ", ".join(f"{name} {_time(measure, name, per_token=True)}" for name in measure.records)
        for measure in measures
    )
    caption = "Median time for a decoded token; whiskers are quartiles" + (
        ", a black mark is where the ideal lies." if ideals else "."
    )
    return Picture("latency", figure, f"Milliseconds a decoded token. {words}.", caption)


def resources_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Sets peak memory and energy of every case side by side."""
    blocks: list[Block] = []
    for measurement, words in (("memory", "Peak memory"), ("energy", "Energy")):
        measures = find_measures(inputs.evaluation, measurement)
        if not measures:
            continue
        units = dict.fromkeys(measure.first.unit for measure in measures)
        unit = "" if "bytes" in units else f", {' or '.join(units)}"
        rows = tuple((s.name, *(_amount(m, s.name, inputs.baseline) for m in measures)) for s in inputs.subjects)
        header = ("model", *(measure.label for measure in measures))
        against = f", with the change from {inputs.baseline}" if inputs.compared and inputs.baseline else ""
        blocks.append(drop_empty_columns(Table(f"{words}{unit}{against}", header, rows), MISSING))
        notes = dict.fromkeys(record.note for measure in measures for record in measure.records.values())
        blocks += [Text(f"{words}: {note.rstrip('.')}.") for note in notes if note]
    return Section("Memory and energy", tuple(blocks)) if blocks else None


def amount(record: Record) -> str:
    """Returns bytes or watt-hours as text."""
    return scaled(record.value, "B") if record.unit == "bytes" else number(record.value, record.standard_error)


def _amount(measure: Measure, name: str, baseline: str | None) -> str:
    record, base = measure.records.get(name), measure.records.get(baseline or "")
    if record is None:
        return MISSING
    if base is None or base is record or base.value <= 0:
        return amount(record)
    return f"{amount(record)} ({', '.join(rise(measure, name, baseline))})"


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
    rows = tuple(
        (
            name,
            f"{number(speeds[name])}",
            f"{found.hours:,.1f}",
            f"{found.money:,.2f}",
            f"{found.energy_kwh:,.2f}",
            f"{found.co2_kg:,.2f}",
            MISSING if base is None or name == inputs.baseline else percent(saving(base.hours, found.hours)),
        )
        for name, found in taken.items()
    )
    header = ("model", "tokens a second", "hours", workload.currency, "kWh", "kg CO2e", "time saved")
    words = tuple(_saving_sentence(inputs, name, taken, workload) for name in taken if _is_spoken(inputs, name, taken))
    table = Table(f"{workload.days:g} days of {workload.tokens_per_day:,.0f} tokens a day", header, rows)
    said: list[Block] = [Bullets(words)] if words else []
    blocks = (*said, drop_empty_columns(table, MISSING), Text(_assumptions(workload, measure.label)))
    return Section("Cost and carbon of a workload", blocks)


def _is_spoken(inputs: Inputs, name: str, taken: dict[str, Costs]) -> bool:
    if name == inputs.baseline or inputs.baseline not in taken:
        return False
    return name == inputs.focus if inputs.focus is not None else len(taken) <= 4


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
