"""From what was read to what is shown: title, summary, sections."""

from amprune.report.drawing import colours_of
from amprune.report.grid import grid_of
from amprune.report.importance import importance_section
from amprune.report.inputs import Inputs, Subject
from amprune.report.measures import average_change, averages, change, find_measures, headlines, ideal_speedup
from amprune.report.numbers import number, percent, scaled, times
from amprune.report.page import Contents, Section, Tile
from amprune.report.provenance import LIMITS, limits, made_section, measuring_section, removed_words, settings_section
from amprune.report.quality import accuracy, accuracy_section, difference, heading, perplexity_section
from amprune.report.reconstruction import reconstruction_section
from amprune.report.sizes import removed, size_section
from amprune.report.speed import amount, latency_section, resources_section, rise, workload_section
from amprune.report.training import recovery_section
from amprune.settings import Workload

_TILED = 3
"""Models that get a summary of their own; more of them are read in the table."""


def make_contents(inputs: Inputs, *, workload: Workload) -> Contents:
    """Puts a report together; sections of which nothing is known are left out."""
    colours = colours_of([subject.name for subject in inputs.subjects], inputs.baseline)
    measured = bool(inputs.evaluation.records)
    sections = [
        _overview(inputs) if measured else measuring_section(inputs),
        perplexity_section(inputs, colours),
        accuracy_section(inputs),
        latency_section(inputs, colours),
        resources_section(inputs),
        size_section(inputs),
        importance_section(inputs, colours),
        reconstruction_section(inputs, colours),
        recovery_section(inputs, colours),
        workload_section(inputs, workload),
        made_section(inputs),
        settings_section(inputs),
        Section(LIMITS, (limits(inputs),)) if limits(inputs) else None,
    ]
    shown = [inputs.subject(inputs.focus)] if inputs.focus is not None else list(inputs.compared or inputs.subjects)
    summaries = {subject.name: _tiles(inputs, subject) for subject in shown if subject is not None}
    return Contents(
        title=_title(inputs),
        lead=_lead(inputs),
        summaries=summaries if len(summaries) <= _TILED else {},
        sections=tuple(section for section in sections if section is not None),
        colours=colours,
    )


def _title(inputs: Inputs) -> str:
    focus = inputs.subject(inputs.focus)
    if focus is not None:
        return f"{focus.name}: {inputs.baseline}{_what_was_done(focus, removed(inputs, focus))}"
    if len(inputs.subjects) == 1:
        return f"{inputs.subjects[0].name}, measured"
    if len(inputs.compared) == 1:
        return f"{inputs.compared[0].name} against {inputs.baseline}"
    return f"{len(inputs.compared)} models against {inputs.baseline}"


def _what_was_done(subject: Subject, share: float) -> str:
    later = ["trained"] if subject.trained else []
    later += [f"quantised to {subject.quantization.type}"] if subject.quantization is not None else []
    if share or not later:
        return ", then ".join([f" with {percent(share)} of its parameters removed", *later])
    return f", {' and '.join(later)}"


def _lead(inputs: Inputs) -> str:
    if inputs.focus is None and len(inputs.subjects) == 1:
        return "There is one model, and nothing to compare it with. Every figure was measured by amprune evaluate."
    if not inputs.evaluation.records:
        return f"What {_known_from(inputs.subject(inputs.focus))} tell of {inputs.focus}."
    others = [subject.name for subject in inputs.compared if subject.name != inputs.focus]
    listed = ", ".join(others) if len(others) <= _TILED else f"{len(others)} other models"
    beside = f" Beside it: {listed}." if inputs.focus is not None and others else ""
    return f"Compared with {inputs.baseline}, question by question and run by run where both had the same.{beside}"


def _known_from(subject: Subject | None) -> str:
    if subject is None or not (subject.trained or subject.quantization):
        return "the plan, the scores and the verification"
    stages = {"pruning": subject.plan, "training": subject.trained, "quantisation": subject.quantization}
    return f"the records of the {' and of the '.join(stage for stage, record in stages.items() if record)}"


def _tiles(inputs: Inputs, subject: Subject) -> tuple[Tile, ...]:
    share = removed(inputs, subject)
    compared = subject.name != inputs.baseline and inputs.baseline is not None
    fewer = (removed_words(share),) if compared else ()
    tiles = [Tile("parameters", scaled(subject.parameters), fewer)]
    tiles += _quality_tiles(inputs, subject.name) + _speed_tiles(inputs, subject.name)
    return tuple(tiles)


def _quality_tiles(inputs: Inputs, name: str) -> list[Tile]:
    tiles = []
    for measure in [m for m in find_measures(inputs.evaluation, "perplexity") if name in m.records][:1]:
        record, base = measure.records[name], measure.records.get(inputs.baseline or "")
        against = (f"{inputs.baseline}: {number(base.value)}",) if base is not None and base is not record else ()
        tiles.append(Tile("perplexity", number(record.value, record.standard_error), (*against, measure.label)))
    for measure in [m for m in averages(inputs.evaluation) if name in m.records][:1]:
        found = average_change(measure, headlines(inputs.evaluation), name, inputs.baseline)
        notes = (f"{difference(found, scale=100)} points",) if found is not None else ()
        tiles.append(Tile("mean accuracy, %", accuracy(measure, name), notes))
    return tiles


def _speed_tiles(inputs: Inputs, name: str) -> list[Tile]:
    tiles = []
    ideal = ideal_speedup(inputs.evaluation, name, inputs.baseline)
    for measure in find_measures(inputs.evaluation, "latency", "decode"):
        found = change(measure, name, inputs.baseline)
        if found is not None:
            of = (f"measured, of {times(ideal)} ideal",) if ideal is not None else ("measured",)
            tiles.append(Tile("decode speedup", times(found.difference.value), (*of, measure.label)))
            break
    else:
        if ideal is not None:
            tiles.append(Tile("ideal decoding speedup", times(ideal), ("from weight bytes; not measured",)))
    for measurement, words in (("memory", "peak memory"), ("energy", "energy")):
        for measure in [m for m in find_measures(inputs.evaluation, measurement) if name in m.records][:1]:
            record = measure.records[name]
            unit = () if record.unit == "bytes" else (record.unit,)
            tiles.append(Tile(words, amount(record), (*rise(measure, name, inputs.baseline), *unit)))
    return tiles


def _overview(inputs: Inputs) -> Section:
    """One row a model with the figure of each kind that was measured first."""
    columns = [
        ("parameters", {s.name: scaled(s.parameters) for s in inputs.subjects}),
        ("removed", {s.name: percent(removed(inputs, s)) for s in inputs.compared}),
    ]
    cases: list[str] = []
    for measure in find_measures(inputs.evaluation, "perplexity")[:1]:
        values = {name: number(record.value, record.standard_error) for name, record in measure.records.items()}
        columns.append(("perplexity", values))
        cases.append(f"perplexity: {measure.label}")
    means = averages(inputs.evaluation)[:1]
    for measure in means or headlines(inputs.evaluation)[:1]:
        title = "average accuracy, %" if means else heading(measure)
        columns.append((title, {name: accuracy(measure, name) for name in measure.records}))
    speed, case = _speed_columns(inputs)
    grid = grid_of("", [subject.name for subject in inputs.subjects], [*columns, *speed])
    shown = "; ".join([*cases, *case])
    note = f"Of each kind, what was measured first{f' ({shown})' if shown else ''}. The sections below have the rest."
    return Section("Overview", (grid, note))


def _speed_columns(inputs: Inputs) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    columns, cases = [], []
    for measure in find_measures(inputs.evaluation, "latency", "decode")[:1]:
        changes = {name: change(measure, name, inputs.baseline) for name in measure.records}
        ideals = {name: ideal_speedup(inputs.evaluation, name, inputs.baseline) for name in changes}
        columns.append(("decoding speedup", {n: times(c.difference.value) for n, c in changes.items() if c}))
        columns.append(("ideal", {name: times(value) for name, value in ideals.items() if value is not None}))
        cases.append(f"speed: {measure.label}")
    for measurement, words in (("memory", "peak memory"), ("energy", "energy")):
        for measure in find_measures(inputs.evaluation, measurement)[:1]:
            unit = "" if measure.first.unit == "bytes" else f", {measure.first.unit}"
            columns.append((f"{words}{unit}", {name: amount(record) for name, record in measure.records.items()}))
    return columns, cases
