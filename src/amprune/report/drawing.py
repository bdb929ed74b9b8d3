"""How every figure looks, names beside points, and how a figure becomes bytes: the same one gives the same bytes."""

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from amprune.report.numbers import number, shortened

WIDTH = 5.4
"""Inches; legible on a phone, too."""
BASELINE_COLOUR = "#4d4d4d"
_COLOURS = (
    # Okabe and Ito's, without black and yellow, then two of Tol's: told apart by colour-blind readers.
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#882255", "#999933", "#332288",
)  # fmt: skip
ROW_COLOUR = _COLOURS[0]
"""Of marks that are told apart by their place."""
_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.parse_math": False,  # a name may hold dollar signs
    "svg.hashsalt": "amprune",
    "svg.fonttype": "path",
    "savefig.facecolor": "white",
    "figure.dpi": 100.0,
}


@contextmanager
def style() -> Iterator[None]:
    """Sets how figures are drawn, also around a function that draws one; a user's own settings do not count."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name may hold characters that the font lacks; the tables show them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def colours_of(names: Iterable[str], baseline: str | None) -> dict[str, str]:
    """Gives every model a colour of its own, grey to the baseline."""
    others = [name for name in names if name != baseline]
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(others)}
    return colours if baseline is None else {baseline: BASELINE_COLOUR, **colours}


def new_figure(height: float, *, width: float = WIDTH) -> Figure:
    """Returns an empty figure, without global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_svg(figure: Figure) -> bytes:
    """Draws a figure as SVG, text as outlines, so that it looks the same everywhere."""
    return _saved(figure, format="svg", metadata={"Date": None, "Creator": None})


def to_png(figure: Figure) -> bytes:
    """Draws a figure as PNG."""
    return _saved(figure, format="png", dpi=160, metadata={"Software": None})


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with style():
        if figure.get_layout_engine() is not None:  # laid out once, for both formats
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def named_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names the bars of a figure at its left, from the top."""
    axes.set_yticks(range(len(names)), [shortened(name, 22) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def logarithmic(axes: Axes, which: str) -> None:
    """Makes an axis logarithmic with plain numbers at its ticks."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    subs = (1.0, 2.0, 5.0) if high / max(low, 1e-30) < 300 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())


def tick(value: float) -> str:
    """Returns a number as short as it can be at a tick."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


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
            covered = sum(_overlap(box, other) for other in taken) + 3 * (box.width * box.height - _overlap(box, frame))
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
