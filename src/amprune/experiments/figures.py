"""Figures of experiments: lines against a number, rows side by side, with a level to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from amprune.report.drawing import BASELINE_COLOUR, ROW_COLOUR, colours_of, logarithmic, new_figure, style
from amprune.report.labels import Label, write_column
from amprune.report.numbers import shortened

_LOG_RANGE = 10.0


@dataclass(frozen=True)
class Point:
    """A figure and its standard error, or the quartiles around it."""

    x: float
    y: float
    below: float = 0.0
    above: float = 0.0


@dataclass(frozen=True)
class Level:
    """A dashed line across: what the dense model has."""

    name: str
    y: float


def lines_figure(
    lines: Mapping[str, Sequence[Point]],
    *,
    level: Level | None,
    x_label: str,
    y_label: str,
    dashed: Mapping[str, Sequence[Point]] | None = None,
) -> Figure:
    """Draws a line of points each, named at its end; logarithmic where the values differ by more than ten times.

    Args:
        lines: points by name.
        level: across, dashed.
        x_label: what the points are at.
        y_label: what they are.
        dashed: under some of the names another line each, in the same colour.
    """
    with style():
        figure = new_figure(3.3)
        axes = figure.add_subplot()
        colours = colours_of(lines, None)
        for kind, drawn in (("o-", lines), ("s--", dashed or {})):
            for name, points in drawn.items():
                _draw(axes, points, kind, colours[name])
        every = [point for drawn in (lines, dashed or {}) for points in drawn.values() for point in points]
        _scale(axes, [point.y for point in every] + ([level.y] if level else []))
        left, right = min(point.x for point in every), max(point.x for point in every)
        room = (right - left) or 1.0
        axes.set_xlim(left - 0.06 * room, right + 0.42 * room)
        axes.set_xticks([x for x in MaxNLocator(6, integer=True).tick_values(left, right) if left <= x <= right])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        labels = [Label(points[-1].x, points[-1].y, name, colours[name]) for name, points in lines.items()]
        if level is not None:
            across = [left - 0.06 * room, right]
            axes.plot(across, [level.y] * 2, color=BASELINE_COLOUR, linestyle="--", linewidth=1.1, zorder=2)
            labels.append(Label(right, level.y, level.name, BASELINE_COLOUR))
        write_column(figure, axes, labels, right)
        return figure


def _draw(axes: Axes, points: Sequence[Point], kind: str, colour: str) -> None:
    x, y = [point.x for point in points], [point.y for point in points]
    bars = [[point.below for point in points], [point.above for point in points]]
    axes.errorbar(x, y, yerr=bars, fmt=kind, color=colour, markersize=4.5, capsize=2.5, linewidth=1.2, zorder=3)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_RANGE:
        axes.set_ylim(low / (high / low) ** 0.08, high * (high / low) ** 0.08)
        logarithmic(axes, "y")


@dataclass(frozen=True)
class Panel:
    """A figure of every row, with its standard error."""

    label: str
    values: Mapping[str, Point]
    """By name of the row; the figure is `x`, its error `below` and `above`."""
    level: float | None
    """What the dense model has."""


def rows_figure(names: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """Draws a row each, from the top, and a panel for each kind of figure, with the dense model dashed."""
    with style():
        figure = new_figure(0.75 + 0.24 * len(names))
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        places = {name: index for index, name in enumerate(names)}
        for axes, panel in zip(every, panels, strict=True):
            if panel.level is not None:
                axes.axvline(panel.level, color=BASELINE_COLOUR, linestyle="--", linewidth=1.1, zorder=2)
            _draw_rows(axes, panel, places)
            axes.set_xlabel(panel.label)
            axes.grid(axis="x")
        every[0].set_yticks(range(len(names)), [shortened(name) for name in names])
        every[0].set_ylim(len(names) - 0.4, -0.6)
        return figure


def _draw_rows(axes: Axes, panel: Panel, places: Mapping[str, int]) -> None:
    points = panel.values.values()
    bars = [[point.below for point in points], [point.above for point in points]]
    x, y = [point.x for point in points], [places[name] for name in panel.values]
    axes.errorbar(x, y, xerr=bars, fmt="o", color=ROW_COLOUR, markersize=4.5, capsize=2.5, linewidth=1.2, zorder=3)
    found = [*x, *([] if panel.level is None else [panel.level])]
    low, high = min(found), max(found)
    if low > 0 and high / low > _LOG_RANGE:
        axes.set_xlim(low / (high / low) ** 0.08, high * (high / low) ** 0.08)
        logarithmic(axes, "x")
        if high / low > 300:  # half as wide as other figures
            axes.xaxis.set_major_locator(LogLocator(base=10, numticks=4))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
