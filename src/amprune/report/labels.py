"""Names beside points, each where it covers as little as possible."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox


@dataclass(frozen=True)
class Label:
    """A name to write beside a point."""

    x: float
    y: float
    text: str
    colour: str
    places: Sequence[tuple[float, float, str]] = (
        *((8, up, "left") for up in (0, 12, -12, 24, -24)),
        *((-8, up, "right") for up in (0, 12, -12, 24, -24)),
        *((sign * 2, sign * up, side) for sign, side in ((1, "left"), (-1, "right")) for up in (20, -20)),
        *((16 * sign, up, "left" if sign > 0 else "right") for up in (34, -34, 48, -48) for sign in (1, -1)),
    )
    """Offsets in points, and which side of the text is nearest."""


ENDS = tuple((across, up, "left") for across in (3, 110, 200, 270) for up in (7, -8))
"""Places of the dense model's name along its line."""


def write_labels(
    figure: Figure, axes: Axes, labels: Sequence[Label], lines: Sequence[Any], level: float | None
) -> None:
    """Writes names beside their points, each where it covers neither another nor a line."""
    canvas: Any = figure.canvas  # matplotlib's is untyped
    canvas.draw()
    renderer, frame = canvas.get_renderer(), axes.get_window_extent()
    points = [axes.transData.transform((label.x, label.y)) for label in labels if label.places is not ENDS]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for line in lines:
        for (x0, y0), (x1, y1) in itertools.pairwise(axes.transData.transform(line)):
            steps = np.linspace(0, 1, 40)
            taken += [Bbox.from_bounds(x0 + t * (x1 - x0) - 2, y0 + t * (y1 - y0) - 2, 4, 4) for t in steps]
    if level is not None:
        height = axes.transData.transform((0, level))[1]
        taken.append(Bbox.from_extents(frame.x0, height - 2, frame.x1, height + 2))
    for label in labels:
        best: tuple[float, Annotation, Bbox] | None = None
        for dx, dy, side in label.places:
            note = axes.annotate(label.text, (label.x, label.y), xytext=(dx, dy), textcoords="offset points",
                                 color=label.colour, fontsize=8, ha=side, va="center", linespacing=1.05)  # fmt: skip
            box = note.get_window_extent(renderer)
            covered = sum(_overlap(box, other) for other in taken) + 3 * _outside(box, frame)
            cost = covered + (0.02 if label.places is ENDS else 0.5) * math.hypot(dx, dy)
            note.set_visible(False)
            if best is None or cost < best[0]:
                best = (cost, note, box)
        if best is not None:
            best[1].set_visible(True)
            taken.append(best[2])
    for text in [text for text in axes.texts if not text.get_visible()]:
        text.remove()


def write_column(figure: Figure, axes: Axes, labels: Sequence[Label], x: float) -> None:
    """Writes names in a column at `x`, in the order of their heights, apart from each other."""
    canvas: Any = figure.canvas  # matplotlib's is untyped
    canvas.draw()
    frame, points = axes.get_window_extent(), 72 / figure.dpi
    ordered = sorted(labels, key=lambda label: label.y)
    wanted = [axes.transData.transform((x, label.y))[1] * points for label in ordered]
    heights = [8 * 1.2 * (1 + label.text.count("\n")) + 1 for label in ordered]
    places = _apart(wanted, heights, frame.y0 * points, frame.y1 * points)
    for label, before, after in zip(ordered, wanted, places, strict=True):
        axes.annotate(label.text, (x, label.y), xytext=(8, after - before), textcoords="offset points",
                      color=label.colour, fontsize=8, ha="left", va="center", linespacing=1.05)  # fmt: skip


def _apart(centres: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Moves ascending centres up until nothing overlaps, then down until they end below `high` where they fit."""
    found: list[float] = []
    edge = low
    for centre, height in zip(centres, heights, strict=True):
        found.append(max(centre, edge + height / 2))
        edge = found[-1] + height / 2
    edge = max(high, low + sum(heights))
    for index in reversed(range(len(found))):
        found[index] = min(found[index], edge - heights[index] / 2)
        edge = found[index] - heights[index] / 2
    return found


def _overlap(box: Bbox, other: Bbox) -> float:
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Bbox, frame: Bbox) -> float:
    inside = _overlap(box, frame)
    return box.width * box.height - inside
