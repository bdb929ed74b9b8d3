"""What is shown of speed: measured and ideal, with whole blocks removed beside; what a workload costs."""

from dataclasses import replace
from pathlib import Path

from amprune.experiments.figures import Point, lines_figure
from amprune.experiments.recipes import DENSE, percentage
from amprune.experiments.tables import Shown
from amprune.report.drawing import colours_of
from amprune.report.grid import Grid
from amprune.report.inputs import Inputs, Subject
from amprune.report.measures import Measure, change, find_measures, ideal_speedup
from amprune.report.numbers import MISSING, percent, times
from amprune.report.page import Block, Picture, Section
from amprune.report.speed import latency_section, resources_section, speedup_words, workload_section
from amprune.settings import Workload


def speedup(shown: Shown) -> list[Section]:
    """Sets measured and ideal speedups of every case side by side; the times behind them follow."""
    measures = find_measures(shown.evaluation, "latency", "decode")
    rows = []
    for cell in shown.cells:
        share, state = shown.removed(cell), shown.state(cell)
        ideal, missing = ideal_speedup(shown.evaluation, cell.name, DENSE), MISSING if state == "done" else state
        changes = [change(measure, cell.name, DENSE) for measure in measures]
        figures = [missing if found is None else speedup_words(found) for found in changes]
        rows.append((cell.name, percent(share, 2), times(ideal) if ideal else missing, *figures))
    header = ("model", "removed", "ideal", *(m.label for m in measures))
    blocks: list[Block] = [Grid("Speedup of decoding", header, tuple(rows))]
    if lines := tuple(line for measure in measures for line in _rivals(shown, measure)):
        blocks.insert(0, lines)
    words = (
        "Speedup of decoding: the median over rounds of the dense model's time over the model's, with its quartiles. "
        "Ideal: the dense model's weight bytes read for a token over the model's."
    )
    pictures = [_picture(shown, measure, index) for index, measure in enumerate(measures, start=1)]
    blocks += [words, *(picture for picture in pictures if picture is not None)]
    return [Section(shown.recipe.title, tuple(blocks)), *_measured(shown)]


def cost(shown: Shown) -> list[Section]:
    """Says what a workload takes with each model, beside what making it took."""
    workload = workload_section(_inputs(shown), Workload())
    made = tuple(
        f"Making {cell.name}, {'trained' if cell.trained else 'not trained'}, took {result.making_seconds:,.0f} s."
        for cell in shown.cells
        if (result := shown.result(cell)) is not None and result.making_seconds is not None
    )
    scoring = sum(shown.found.scoring_seconds.values())
    said: list[Block] = [(f"Scoring took {scoring:,.0f} s.", *made)] if made else []
    blocks = (*said, *(workload.blocks if workload is not None else ()))
    return [Section(shown.recipe.title, blocks), *_measured(shown)]


def _measured(shown: Shown) -> list[Section]:
    """Returns the sections of the report on latency, memory and energy."""
    inputs, colours = _inputs(shown), colours_of(shown.evaluation.models, DENSE)
    latency = latency_section(inputs, colours)
    if latency is not None:
        named = [
            replace(block, name=f"{shown.prefix}{block.name}") if isinstance(block, Picture) else block
            for block in latency.blocks
        ]
        latency = Section(latency.title, tuple(named))
    return [section for section in (latency, resources_section(inputs)) if section is not None]


def _inputs(shown: Shown) -> Inputs:
    models = shown.evaluation.models.values()
    subjects = tuple(Subject(entry.name, entry.parameters, entry) for entry in models)
    baseline = DENSE if DENSE in shown.evaluation.models else None
    return Inputs(Path(shown.found.folder), shown.evaluation, subjects, baseline, None)


def _rivals(shown: Shown, measure: Measure) -> list[str]:
    """Says of each ratio what each method gains of what it could."""
    lines = []
    for ratio in shown.ratios:
        parts = []
        for cell in shown.at(ratio):
            found, ideal = change(measure, cell.name, DENSE), ideal_speedup(shown.evaluation, cell.name, DENSE)
            if found is not None:
                of = f" of {times(ideal)} ideal" if ideal is not None else ""
                parts.append(f"{cell.method} {times(found.difference.value)}{of}")
        if parts:
            lines.append(f"At {percentage(ratio)}, {measure.label}: {'; '.join(parts)}.")
    return lines


def _picture(shown: Shown, measure: Measure, index: int) -> Picture | None:
    lines: dict[str, list[Point]] = {}
    ideals: dict[str, list[Point]] = {}
    for cell in sorted(shown.cells, key=lambda cell: cell.ratio):
        found, share = change(measure, cell.name, DENSE), shown.removed(cell)
        if found is None or share is None:
            continue
        value, (low, high) = found.difference.value, found.difference.quartiles or (found.difference.value,) * 2
        bars = max(0.0, value - low), max(0.0, high - value)
        lines.setdefault(cell.method, []).append(Point(100 * share, value, *bars))
        if (ideal := ideal_speedup(shown.evaluation, cell.name, DENSE)) is not None:
            ideals.setdefault(cell.method, []).append(Point(100 * share, ideal))
    if not lines:
        return None
    figure = lines_figure(
        lines, level=None, x_label="parameters removed, %", y_label="speedup of decoding (higher is better)",
        dashed=ideals,
    )  # fmt: skip
    words = "; ".join(f"{name}: " + ", ".join(times(point.y) for point in points) for name, points in lines.items())
    caption = f"Speedup of decoding against the share removed, {measure.label}; bars are quartiles, dashed is ideal."
    return Picture(f"{shown.prefix}speedup-{index}", figure, f"Speedup of decoding. {words}.", caption)
