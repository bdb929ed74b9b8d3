"""Figures of experiments: lines against a number, rows side by side, with a level to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from amprune.report.drawing import (
    BASELINE_COLOUR,
    ROW_COLOUR,
    Label,
    colours_of,
    logarithmic,
    new_figure,
    style,
    write_column,
)
from amprune.report.numbers import shortened

_LOG_RANGE = 10.0
_DASHED: dict[str, Any] = {"color": BASELINE_COLOUR, "linestyle": "--", "linewidth": 1.1, "zorder": 2}


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
    lines: Mapping[str, Sequence[Point]], *, level: Level | None, x_label: str, y_label: str,
    dashed: Mapping[str, Sequence[Point]] | None = None,
) -> Figure:  # fmt: skip
    """Draws a line of points each, named at its end; logarithmic where the values differ by more than ten times.

    `dashed` has under some of the names another line each, in the same colour.
    """
    with style():
        figure = new_figure(3.3)
        axes = figure.add_subplot()
        colours = colours_of(lines, None)
        for kind, drawn in (("o-", lines), ("s--", dashed or {})):
            for name, points in drawn.items():
                x, y = [point.x for point in points], [point.y for point in points]
                _draw(axes, x, y, kind, colours[name], yerr=_bars(points))
        every = [point for drawn in (lines, dashed or {}) for points in drawn.values() for point in points]
        _scale(axes, "y", [point.y for point in every] + ([level.y] if level else []))
        left, right = min(point.x for point in every), max(point.x for point in every)
        room = (right - left) or 1.0
        axes.set_xlim(left - 0.06 * room, right + 0.42 * room)
        axes.set_xticks([x for x in MaxNLocator(6, integer=True).tick_values(left, right) if left <= x <= right])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        labels = [Label(points[-1].x, points[-1].y, name, colours[name]) for name, points in lines.items()]
        if level is not None:
            axes.plot([left - 0.06 * room, right], [level.y] * 2, **_DASHED)
            labels.append(Label(right, level.y, level.name, BASELINE_COLOUR))
        write_column(figure, axes, labels, right)
        return figure


def _bars(points: Sequence[Point]) -> list[list[float]]:
    return [[point.below for point in points], [point.above for point in points]]


def _draw(axes: Axes, x: Sequence[float], y: Sequence[float], kind: str, colour: str, **bars: Any) -> None:
    axes.errorbar(x, y, fmt=kind, color=colour, markersize=4.5, capsize=2.5, linewidth=1.2, zorder=3, **bars)


def _scale(axes: Axes, which: str, values: Sequence[float]) -> float:
    """Makes an axis logarithmic where it is of use; returns by how many times the values differ, then."""
    low, high = min(values), max(values)
    if low <= 0 or high / low <= _LOG_RANGE:
        return 0.0
    room = (high / low) ** 0.08
    (axes.set_xlim if which == "x" else axes.set_ylim)(low / room, high * room)
    logarithmic(axes, which)
    return high / low


@dataclass(frozen=True)
class Panel:
    """A figure of every row, with its standard error."""

    label: str
    values: Mapping[str, Point]
    """By name of the row; its place counts for nothing."""
    level: Level | None
    """What the dense model has."""


def rows_figure(names: Sequence[str], panels: Sequence[Panel]) -> Figure:
    """Draws a row each, from the top, and a panel for each kind of figure, with the dense model dashed."""
    with style():
        figure = new_figure(0.75 + 0.24 * len(names))
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        places = {name: index for index, name in enumerate(names)}
        for axes, panel in zip(every, panels, strict=True):
            if panel.level is not None:
                axes.axvline(panel.level.y, **_DASHED)
            x, points = [point.y for point in panel.values.values()], list(panel.values.values())
            _draw(axes, x, [places[name] for name in panel.values], "o", ROW_COLOUR, xerr=_bars(points))
            spread = _scale(axes, "x", [*x, *([] if panel.level is None else [panel.level.y])])
            if spread > 300:  # half as wide as other figures
                axes.xaxis.set_major_locator(LogLocator(base=10, numticks=4))
            elif not spread:
                axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel(panel.label)
            axes.grid(axis="x")
        every[0].set_yticks(range(len(names)), [shortened(name) for name in names])
        every[0].set_ylim(len(names) - 0.4, -0.6)
        return figure
