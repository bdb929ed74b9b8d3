"""What is shown of quality: the tables of methods, orders and parts, perplexity against ratio, epochs."""

from collections.abc import Sequence
from dataclasses import replace

from amprune.experiments.figures import Level, Panel, Point, lines_figure, rows_figure
from amprune.experiments.recipes import DENSE, Cell, percentage
from amprune.experiments.tables import Column, Shown, columns_of, difference_table, quality_table
from amprune.report.blocks import Block, Bullets, Picture, Section, Text
from amprune.report.numbers import number
from amprune.settings import PRESETS

_DIFFERENCES = (
    "Differences are taken window by window and question by question, so that their errors are smaller than those of "
    "the two figures. Below zero is better for perplexity, above zero for accuracy, in percentage points."
)


def dense_of(shown: Shown) -> Cell:
    """Returns the cell of the dense model."""
    return next(cell for cell in shown.cells if cell.name == DENSE)


def table1(shown: Shown) -> list[Section]:
    """Sets methods side by side at each ratio, with their differences from AMP."""
    blocks: list[Block] = []
    for ratio in shown.ratios:
        cells = (dense_of(shown), *shown.at(ratio), *shown.beside)
        amp = next((cell for cell in cells if cell.criterion == "amp"), None)
        if amp is not None and (verdicts := _verdicts(shown, cells[1:], amp)):
            blocks.append(Bullets(verdicts))
        blocks.append(quality_table(shown, cells, f"{percentage(ratio)} of the parameters \u00b1 standard error"))
        blocks.append(Text("Bold: the best of the pruned models. Accuracies in %." + _uneven(shown, cells[1:], ratio)))
        blocks += _own_sets(shown, cells)
        blocks += _rows_picture(shown, cells[1:], ratio)
        if amp is not None and (table := difference_table(shown, cells, amp)) is not None:
            blocks += [table, Text(_DIFFERENCES)]
    return [Section(shown.recipe.title, tuple(blocks))]


def _rows_picture(shown: Shown, cells: Sequence[Cell], ratio: float) -> list[Picture]:
    """Draws perplexity and average accuracy of cells at one ratio."""
    done, dense = [cell for cell in cells if shown.state(cell) == "done"], dense_of(shown)
    panels, words = [], []
    for column in [column for column in columns_of(shown.evaluation) if column.low_is_better or column.tasks]:
        values = {cell.method: point for cell in done if (point := _sideways(column, cell)) is not None}
        if values:
            level = _sideways(column, dense)
            kind = "perplexity" if column.low_is_better else "average accuracy, %"
            panels.append(Panel(kind, values, None if level is None else level.x))
            words.append(f"{_capital(kind)}: " + ", ".join(f"{name} {number(p.x)}" for name, p in values.items()))
    if not panels:
        return []
    figure = rows_figure([cell.method for cell in done], panels)
    what = " and ".join(panel.label.removesuffix(", %") for panel in panels)
    caption = f"{_capital(what)} at {percentage(ratio)}; bars are standard errors, dashed: the dense model."
    name = f"{shown.prefix}{shown.recipe.name}-{shown.ratios.index(ratio) + 1}"
    return [Picture(name, figure, f"{'. '.join(words)}.", caption)]


def _sideways(column: Column, cell: Cell) -> Point | None:
    record = column.measure.records.get(cell.name)
    if record is None:
        return None
    error = column.scale * (record.standard_error or 0.0)
    return Point(column.scale * record.value, 0.0, error, error)


def _uneven(shown: Shown, cells: Sequence[Cell], ratio: float) -> str:
    """Says which models lack another share than asked for, by more than half a point."""
    off = [cell for cell in cells if (share := shown.removed(cell)) is not None and abs(share - ratio) > 0.005]
    names = ", ".join(cell.method for cell in off)
    return f" Not of the same size, which their figures have to be read with: {names}." if off else ""


def _own_sets(shown: Shown, cells: Sequence[Cell]) -> list[Text]:
    """Says of presets on what they were calibrated, which is not the set of the others."""
    drawn = {cell.preset: found["tokens"] for cell in cells if cell.preset and (found := shown.calibration(cell))}
    return [
        Text(
            f"{preset}: preset of amprune, calibrated on its own {PRESETS[preset].calibration} set"
            + (f", {drawn[preset]:,} tokens." if preset in drawn else ".")
        )
        for preset in dict.fromkeys(cell.preset for cell in cells if cell.preset)
    ]


def _verdicts(shown: Shown, cells: Sequence[Cell], amp: Cell) -> tuple[str, ...]:
    """Says how AMP does among the others, by perplexity and on average."""
    if shown.state(amp) != "done":
        return ()
    columns = [c for c in columns_of(shown.evaluation) if c.low_is_better or c.tasks]
    found = []
    for column in columns:
        ranked = sorted(
            (cell for cell in cells if shown.state(cell) == "done" and column.value(cell) is not None),
            key=lambda cell: (column.value(cell) or 0.0) * (1 if column.low_is_better else -1),
        )
        if len(ranked) > 1 and amp in ranked:
            found.append(_verdict(column, ranked, amp))
    return tuple(found)


def _verdict(column: Column, ranked: Sequence[Cell], amp: Cell) -> str:
    what = column.title if column.low_is_better else "average accuracy"
    place = ranked.index(amp)
    words = f"{_capital(what)}: {amp.name} has {column.text(amp)}, place {place + 1} of {len(ranked)}"
    other = ranked[0] if place else ranked[1]
    gap = column.against(other, amp)
    kind = ("first" if place else "next") + f" is {other.name}, {column.text(other)}"
    if gap is None:
        return f"{words}; {kind}."
    error = None if gap.standard_error is None else gap.standard_error * column.scale
    apart = number(gap.value * column.scale, error, signed=True)
    clear = "" if gap.standard_error is None or abs(gap.value) > 2 * gap.standard_error else ", within twice its error"
    return f"{words}; {kind} ({apart}{clear})."


def table2(shown: Shown) -> list[Section]:
    """Says whether the order of the scores is that of the losses."""
    blocks: list[Block] = []
    if lines := tuple(line for ratio in shown.ratios for line in _coherence(shown, ratio)):
        blocks.append(Bullets(lines))
    for ratio in shown.ratios:
        caption = f"{percentage(ratio)} of the parameters \u00b1 standard error"
        blocks.append(quality_table(shown, (dense_of(shown), *shown.at(ratio)), caption, heading="removed first"))
        blocks += _rows_picture(shown, shown.at(ratio), ratio)
    blocks.append(
        Text("amp removes the least important units, reversed the most important. Bold: the best of the pruned.")
    )
    return [Section(shown.recipe.title, tuple(blocks))]


def _coherence(shown: Shown, ratio: float) -> list[str]:
    """Says whether perplexity rises from AMP over a random draw to the reversed order."""
    cells = [cell for cell in shown.at(ratio) if shown.state(cell) == "done"]
    lines = []
    for column in [c for c in columns_of(shown.evaluation) if c.low_is_better]:
        values = {cell.method: value for cell in cells if (value := column.value(cell)) is not None}
        if len(values) < 3:
            continue
        coherent = values["amp"] < values["random"] < values["reversed"]
        words = ", ".join(f"{name} {number(value)}" for name, value in values.items())
        verdict = "amp < random < reversed, as it should be" if coherent else "NOT amp < random < reversed"
        lines.append(f"At {percentage(ratio)}, {column.title}: {words}: {verdict}.")
    return lines


def table3(shown: Shown) -> list[Section]:
    """Sets heads, neurons and both side by side."""
    blocks: list[Block] = []
    for ratio in shown.ratios:
        cells = (dense_of(shown), *shown.at(ratio))
        caption = f"{percentage(ratio)} of the parameters \u00b1 standard error"
        blocks.append(quality_table(shown, cells, caption, heading="removed units"))
        blocks += _rows_picture(shown, shown.at(ratio), ratio)
        if (table := difference_table(shown, cells, shown.at(ratio)[0])) is not None:
            blocks += [table, Text(_DIFFERENCES)]
    return [Section(shown.recipe.title, tuple(blocks))]


def figure1(shown: Shown) -> list[Section]:
    """Draws perplexity against ratio."""
    blocks: list[Block] = []
    for index, column in enumerate([c for c in columns_of(shown.evaluation) if c.low_is_better], start=1):
        lines = {}
        for method, trained in _lines(shown):
            of_line = (method,) if trained else (DENSE, method)  # the dense model is not trained
            cells = [cell for cell in shown.cells if cell.method in of_line and shown.state(cell) == "done"]
            if any(cell.is_pruned for cell in cells):
                lines[method] = [_point(column, cell, 100 * (shown.removed(cell) or 0.0)) for cell in cells]
        if not lines:
            continue
        level, words = _level(column), "; ".join(_course(name, points) for name, points in lines.items())
        figure = lines_figure(
            lines, level=level, x_label="parameters removed, %", y_label="perplexity (lower is better)"
        )
        dashed = f"; dashed: the dense model, {number(level.y)}" if level is not None else ""
        what = f"{_capital(column.title)}, against the share of parameters removed"
        caption = f"{what}; bars are standard errors{dashed}."
        blocks.append(Picture(f"{shown.prefix}perplexity-{index}", figure, f"Perplexity. {words}.", caption))
    order = [DENSE, *(method for method, _ in _lines(shown))]
    cells = sorted(shown.cells, key=lambda cell: (order.index(cell.method), cell.ratio))
    table = quality_table(shown, cells, "", heading="model", label=lambda cell: cell.name)
    blocks.append(replace(table, bold=frozenset()))  # models of several ratios compete for nothing
    return [Section(shown.recipe.title, (*blocks, *_own_sets(shown, cells)))]


def _lines(shown: Shown) -> list[tuple[str, bool]]:
    """Returns the lines of figure1 and whether they are of trained models, those without training first."""
    found = dict.fromkeys((cell.method, cell.trained) for cell in shown.cells if cell.is_pruned)
    return sorted(found, key=lambda line: line[1])


def _point(column: Column, cell: Cell, x: float) -> Point:
    record = column.measure.records[cell.name]
    error = column.scale * (record.standard_error or 0.0)
    return Point(x, column.scale * record.value, error, error)


def _level(column: Column) -> Level | None:
    record = column.measure.records.get(DENSE)
    return None if record is None else Level(DENSE, column.scale * record.value)


def _course(name: str, points: Sequence[Point]) -> str:
    return f"{name}: " + ", ".join(f"{number(point.y)} at {point.x:.3g}" for point in points)


def epochs(shown: Shown) -> list[Section]:
    """Sets the epochs of each training side by side, and draws them."""
    blocks: list[Block] = []
    for ratio in shown.ratios:
        caption = f"{percentage(ratio)} of the parameters \u00b1 standard error"
        blocks.append(quality_table(shown, (dense_of(shown), *shown.at(ratio)), caption, heading="trained for"))
    columns = [column for column in columns_of(shown.evaluation) if column.low_is_better or column.tasks]
    blocks += [picture for column in columns if (picture := _epochs_picture(shown, column)) is not None]
    blocks.append(
        Text(
            "Each ratio is trained once, for all epochs, and measured on the way: the learning rate falls over the "
            "whole training, so that an early epoch is no shorter training of its own. Bold: the best of the pruned."
        )
    )
    return [Section(shown.recipe.title, tuple(blocks))]


def _epochs_picture(shown: Shown, column: Column) -> Picture | None:
    lines = {}
    for ratio in shown.ratios:
        cells = [cell for cell in shown.at(ratio) if shown.state(cell) == "done"]
        if points := [_point(column, cell, float(cell.epoch or 0)) for cell in cells]:
            lines[percentage(ratio)] = points
    if not lines:
        return None
    kind = "perplexity" if column.low_is_better else "average accuracy"
    better = "perplexity (lower is better)" if column.low_is_better else "average accuracy, % (higher is better)"
    figure = lines_figure(
        lines, level=_level(column), x_label="epochs of training", y_label=better,
    )  # fmt: skip
    words = "; ".join(_course(name, points) for name, points in lines.items())
    caption = f"{_capital(kind)} after each epoch, by the ratio removed; dashed: the dense model."
    name = f"{shown.prefix}epochs-{'perplexity' if column.low_is_better else 'accuracy'}"
    return Picture(name, figure, f"{_capital(kind)} by epoch. {words}.", caption)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
