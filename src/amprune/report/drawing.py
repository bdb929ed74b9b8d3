"""How every figure looks, and how it becomes bytes: the same figure gives the same bytes."""

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from amprune.report.numbers import number

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
    """Sets how figures are drawn; a user's own settings do not count."""
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
