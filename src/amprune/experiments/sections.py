"""What is shown of quality: the tables of methods, orders and parts, perplexity against ratio, epochs."""

from collections.abc import Mapping, Sequence

from amprune.experiments.figures import Level, Panel, Point, lines_figure, rows_figure
from amprune.experiments.recipes import DENSE, Cell, percentage
from amprune.experiments.tables import Column, Shown, columns_of, difference_table, quality_table, summary_columns
from amprune.report.numbers import number
from amprune.report.page import Block, Picture, Section
from amprune.settings import PRESETS


def table1(shown: Shown) -> list[Section]:
    """Sets methods side by side at each ratio, with their differences from AMP."""
    blocks: list[Block] = []
    beside = tuple(cell for cell in shown.cells if cell.checkpoint is not None)
    for ratio in shown.ratios:
        pruned = (*shown.at(ratio), *beside)
        cells, amp = (shown.dense, *pruned), next((cell for cell in pruned if cell.criterion == "amp"), None)
        if amp is not None and (verdicts := _verdicts(shown, pruned, amp)):
            blocks.append(verdicts)
        # Which models lack another share than asked for, by more than half a point.
        off = [cell for cell in pruned if (share := shown.removed(cell)) is not None and abs(share - ratio) > 0.005]
        names = ", ".join(cell.method for cell in off)
        uneven = f" Not of the same size, which their figures have to be read with: {names}." if off else ""
        blocks.append(quality_table(shown, cells, ratio))
        blocks.append("Bold: the best of the pruned models. Accuracies in %." + uneven)
        blocks += [*_own_sets(shown, cells), *_rows_picture(shown, pruned, ratio)]
        if amp is not None:
            blocks += _differences(shown, cells, amp)
    return [Section(shown.recipe.title, tuple(blocks))]


def _differences(shown: Shown, cells: Sequence[Cell], baseline: Cell) -> list[Block]:
    if (table := difference_table(shown, cells, baseline)) is None:
        return []
    words = (
        "Differences are taken window by window and question by question, so that their errors are smaller than those "
        "of the two figures. Below zero is better for perplexity, above zero for accuracy, in percentage points."
    )
    return [table, words]


def _rows_picture(shown: Shown, cells: Sequence[Cell], ratio: float) -> list[Picture]:
    """Draws perplexity and average accuracy of cells at one ratio."""
    done, panels, words = shown.done(cells), [], []
    for column in summary_columns(shown):
        if values := {cell.method: point for cell in done if (point := column.point(cell)) is not None}:
            label = column.kind if column.low_is_better else f"{column.kind}, %"
            panels.append(Panel(label, values, _level(shown, column)))
            words.append(f"{_capital(label)}: " + ", ".join(f"{name} {number(p.y)}" for name, p in values.items()))
    if not panels:
        return []
    what = " and ".join(panel.label.removesuffix(", %") for panel in panels)
    caption = f"{_capital(what)} at {percentage(ratio)}; bars are standard errors, dashed: the dense model."
    name = f"{shown.prefix}{shown.recipe.name}-{shown.ratios.index(ratio) + 1}"
    return [Picture(name, rows_figure([cell.method for cell in done], panels), f"{'. '.join(words)}.", caption)]


def _own_sets(shown: Shown, cells: Sequence[Cell]) -> list[str]:
    """Says of presets on what they were calibrated, which is not the set of the others."""
    drawn = {
        cell.preset: f", {result.calibration['tokens']:,} tokens"
        for cell in cells
        if cell.preset and (result := shown.result(cell)) is not None and result.calibration
    }
    return [
        (
            f"{preset}: preset of amprune, calibrated on its own {PRESETS[preset].pruning.calibration} set"
            f"{drawn.get(preset, '')}."
        )
        for preset in dict.fromkeys(cell.preset for cell in cells if cell.preset)
    ]


def _verdicts(shown: Shown, cells: Sequence[Cell], amp: Cell) -> tuple[str, ...]:
    """Says how AMP does among the others, by perplexity and on average."""
    found = []
    for column in summary_columns(shown):
        ranked = sorted(
            (cell for cell in shown.done(cells) if column.record(cell) is not None),
            key=lambda cell: (column.value(cell) or 0.0) * (1 if column.low_is_better else -1),
        )
        if len(ranked) < 2 or amp not in ranked:
            continue
        what, place = column.title if column.low_is_better else column.kind, ranked.index(amp)
        other = ranked[0] if place else ranked[1]
        words = (
            f"{_capital(what)}: {amp.name} has {column.text(amp)}, place {place + 1} of {len(ranked)}; "
            f"{'first' if place else 'next'} is {other.name}, {column.text(other)}"
        )
        if (gap := column.against(other, amp)) is not None:
            clear = gap.standard_error is None or abs(gap.value) > 2 * gap.standard_error
            apart = number(gap.value, gap.standard_error, signed=True, scale=column.measure.scale)
            words += f" ({apart}{'' if clear else ', within twice its error'})"
        found.append(f"{words}.")
    return tuple(found)


def table2(shown: Shown) -> list[Section]:
    """Says whether the order of the scores is that of the losses."""
    lines: list[str] = []
    blocks: list[Block] = []
    for ratio in shown.ratios:
        for column in [c for c in columns_of(shown.evaluation) if c.low_is_better]:
            done = shown.done(shown.at(ratio))
            values = {cell.method: value for cell in done if (value := column.value(cell)) is not None}
            if len(values) == 3:
                coherent = values["amp"] < values["random"] < values["reversed"]
                words = ", ".join(f"{name} {number(value)}" for name, value in values.items())
                verdict = "amp < random < reversed, as it should be" if coherent else "NOT amp < random < reversed"
                lines.append(f"At {percentage(ratio)}, {column.title}: {words}: {verdict}.")
        blocks.append(quality_table(shown, (shown.dense, *shown.at(ratio)), ratio, heading="removed first"))
        blocks += _rows_picture(shown, shown.at(ratio), ratio)
    said = "amp removes the least important units, reversed the most important. Bold: the best of the pruned."
    first = [tuple(lines)] if lines else []
    return [Section(shown.recipe.title, (*first, *blocks, said))]


def table3(shown: Shown) -> list[Section]:
    """Sets heads, neurons and both side by side."""
    blocks: list[Block] = []
    for ratio in shown.ratios:
        cells = (shown.dense, *shown.at(ratio))
        blocks.append(quality_table(shown, cells, ratio, heading="removed units"))
        blocks += [*_rows_picture(shown, cells[1:], ratio), *_differences(shown, cells, cells[1])]
    return [Section(shown.recipe.title, tuple(blocks))]


def figure1(shown: Shown) -> list[Section]:
    """Draws perplexity against ratio, the lines of untrained models first."""
    blocks: list[Block] = []
    found = dict.fromkeys((cell.method, cell.trained) for cell in shown.cells if cell.is_pruned)
    methods = sorted(found, key=lambda line: line[1])
    for index, column in enumerate([c for c in columns_of(shown.evaluation) if c.low_is_better], start=1):
        lines = {}
        for method, trained in methods:
            of_line = (method,) if trained else (DENSE, method)  # the dense model is not trained
            cells = shown.done([cell for cell in shown.cells if cell.method in of_line])
            if any(cell.is_pruned for cell in cells):
                lines[method] = {cell: 100 * (shown.removed(cell) or 0.0) for cell in cells}
        if not lines:
            continue
        level, points = _level(shown, column), _points(column, lines)
        figure = lines_figure(
            points, level=level, x_label="parameters removed, %", y_label="perplexity (lower is better)"
        )
        dashed = f"; dashed: the dense model, {number(level.y)}" if level is not None else ""
        what = f"{_capital(column.title)}, against the share of parameters removed"
        caption = f"{what}; bars are standard errors{dashed}."
        name, words = f"{shown.prefix}perplexity-{index}", f"Perplexity. {_courses(points)}."
        blocks.append(Picture(name, figure, words, caption))
    order = [DENSE, *(method for method, _ in methods)]
    ordered = sorted(shown.cells, key=lambda cell: (order.index(cell.method), cell.ratio))
    # Models of several ratios compete for nothing.
    blocks.append(quality_table(shown, ordered, None, heading="model", label=lambda cell: cell.name))
    return [Section(shown.recipe.title, (*blocks, *_own_sets(shown, ordered)))]


def _level(shown: Shown, column: Column) -> Level | None:
    point = column.point(shown.dense)
    return None if point is None else Level(DENSE, point.y)


def _points(column: Column, lines: Mapping[str, Mapping[Cell, float]]) -> dict[str, list[Point]]:
    """Returns the points of lines of which each cell has a place."""
    return {
        name: [point for cell, x in line.items() if (point := column.point(cell, x)) is not None]
        for name, line in lines.items()
    }


def _courses(lines: Mapping[str, Sequence[Point]]) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{number(point.y)} at {point.x:.3g}" for point in points)
        for name, points in lines.items()
    )


def epochs(shown: Shown) -> list[Section]:
    """Sets the epochs of each training side by side, and draws them."""
    blocks: list[Block] = [
        quality_table(shown, (shown.dense, *shown.at(ratio)), ratio, heading="trained for") for ratio in shown.ratios
    ]
    lines = {
        percentage(ratio): {cell: float(cell.epoch or 0) for cell in cells}
        for ratio in shown.ratios
        if (cells := shown.done(shown.at(ratio)))
    }
    for column in summary_columns(shown) if lines else ():
        better, short = ("", "lower") if column.low_is_better else (", %", "higher")
        points, level = _points(column, lines), _level(shown, column)
        label = f"{column.kind}{better} ({short} is better)"
        figure = lines_figure(points, level=level, x_label="epochs of training", y_label=label)
        caption = f"{_capital(column.kind)} after each epoch, by the ratio removed; dashed: the dense model."
        name = f"{shown.prefix}epochs-{column.kind.removeprefix('average ')}"
        blocks.append(Picture(name, figure, f"{_capital(column.kind)} by epoch. {_courses(points)}.", caption))
    said = (
        "Each ratio is trained once, for all epochs, and measured on the way: the learning rate falls over the whole "
        "training, so that an early epoch is no shorter training of its own. Bold: the best of the pruned."
    )
    return [Section(shown.recipe.title, (*blocks, said))]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
