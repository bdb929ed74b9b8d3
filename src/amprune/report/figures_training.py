"""The figure of training: losses against steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from amprune.model.recovered import TrainingLog
from amprune.report.drawing import new_figure, tick
from amprune.report.labels import Label, write_column
from amprune.report.numbers import number, shortened

_SPOKEN = 2
"""Runs whose labels tell both losses; of more runs they tell one."""
_FEWEST = 12
"""Points below which a running mean hides more than it shows."""
_SHARE = 40
"""A running mean reaches as far as this part of the run, to both sides."""

Points = tuple[tuple[int, float], ...]


def training_figure(runs: Sequence[tuple[Sequence[str], TrainingLog]], *, colours: Mapping[str, str]) -> Figure:
    """Draws the losses of each run, given with the names of the models that it made."""
    figure = new_figure(3.5)
    axes = figure.add_subplot()
    labels: list[Label] = []
    for names, log in runs:
        colour = colours[names[0]]
        smooth = _draw_training(axes, log.training, colour, alpha=0.35 if len(runs) <= _SPOKEN else 0.2)
        if log.validation:
            x, y = zip(*log.validation, strict=True)
            axes.plot(x, y, "o--", color=colour, markerfacecolor="white", markersize=5.5, linewidth=1.0, zorder=4)
        labels.append(_label(", ".join(names), log, smooth, colour, spoken=len(runs) <= _SPOKEN))
    last = max(step for _, log in runs for step, _ in (*log.training, *log.validation))
    axes.set_xlim(-0.02 * last, 1.38 * max(last, 1))
    axes.set_xticks(
        [
            value
            for value in MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]).tick_values(0, last)
            if 0 <= value <= last
        ]
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: tick(value))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss, nats a token (lower is better)")
    axes.grid(axis="y")
    write_column(figure, axes, labels, last)
    return figure


def _draw_training(axes: Axes, points: Points, colour: str, *, alpha: float) -> Points:
    """Draws the logged losses and, where there are enough, their running mean; returns the line."""
    if not points:
        return ()
    steps, losses = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    few = not is_averaged(points)
    axes.scatter(steps, losses, s=16 if few else 7, color=colour, alpha=0.8 if few else alpha, linewidths=0, zorder=2)
    if few:
        return points
    mean = running_mean(losses, max(1, len(points) // _SHARE))
    axes.plot(steps, mean, color=colour, linewidth=1.1, alpha=0.9, zorder=3)
    return tuple(zip(map(int, steps), map(float, mean), strict=True))


def is_averaged(points: Points) -> bool:
    """Tells whether a running mean is drawn through the losses."""
    return len(points) >= _FEWEST


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Returns the mean of each value and of `reach` values on both of its sides, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    found: np.ndarray = (sums[end] - sums[first]) / (end - first)
    return found


def _label(names: str, log: TrainingLog, smooth: Points, colour: str, *, spoken: bool) -> Label:
    """Names a run at its end, with its last losses beside the marks that they are drawn by."""
    ends = [(sign, kind, points[-1]) for sign, kind, points in _curves(log, smooth) if points]
    name, (step, loss) = shortened(names, 24), ends[0][2]
    if not spoken:
        return Label(step, loss, f"{name} {number(loss)}", colour)
    lines = [f"{sign} {kind} {number(value)}" for sign, kind, (_, value) in ends]
    return Label(step, loss, "\n".join([name, *lines]), colour)


def _curves(log: TrainingLog, smooth: Points) -> tuple[tuple[str, str, Points], ...]:
    return (("\u25cb", "validation", log.validation), ("\u25cf", "training", smooth))
