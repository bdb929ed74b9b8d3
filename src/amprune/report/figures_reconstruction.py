"""The figure of a refit: errors of the output projections before and after it, and the drift of the hidden states."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from amprune.cut.refit.record import ReconstructionRecord
from amprune.report.drawing import BASELINE_COLOUR, logarithmic, new_figure, tick

_DECADES = 20
"""Values that differ by this factor are drawn on a logarithmic axis."""
_MARKED = 50
"""Layers up to which each gets a mark."""


def reconstruction_figure(record: ReconstructionRecord, *, colour: str) -> Figure:
    """Draws, over the layers, held-out errors of attention and MLP projection, and how far hidden states drift."""
    figure = new_figure(4.9)
    panels = figure.subplots(3, 1, sharex=True)
    layers = record.layers
    for axes, title, errors in (
        (panels[0], "error of the attention's projection", [layer.attention for layer in layers]),
        (panels[1], "error of the MLP's projection", [layer.mlp for layer in layers]),
    ):
        before = [100 * one.held_out_before for one in errors]
        after = [100 * one.held_out_after for one in errors]
        _prepare(axes, title, [*before, *after])
        _line(axes, before, BASELINE_COLOUR, "before the refit", dashed=True)
        _line(axes, after, colour, "after the refit")
    drift = [100 * layer.drift for layer in layers]
    _prepare(panels[2], "drift of the hidden states", drift)
    _line(panels[2], drift, colour, "after the refit")
    panels[2].set_xlabel("layer")
    panels[2].set_xlim(-0.6, len(layers) - 0.4)
    panels[2].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    figure.supylabel("% of what they should be (lower is better)", fontsize=9.0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9.0)
    return figure


def _line(axes: Axes, values: Sequence[float], colour: str, label: str, *, dashed: bool = False) -> None:
    drawn = [value if value > 0 or axes.get_yscale() == "linear" else np.nan for value in values]
    size = 3.6 if len(values) <= _MARKED else 0.0
    axes.plot(
        range(len(values)), drawn, "--" if dashed else "-", marker="o", markersize=size, color=colour, label=label,
        markerfacecolor="white" if dashed else colour, linewidth=1.1, zorder=2 if dashed else 3, clip_on=False,
    )  # fmt: skip


def _prepare(axes: Axes, title: str, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    axes.set_title(title)
    axes.grid(axis="y")
    if positive and max(positive) > _DECADES * min(positive):
        axes.set_ylim(min(positive) / 1.6, max(positive) * 1.6)
        logarithmic(axes, "y")
    else:
        axes.set_ylim(0, 1.1 * max(positive) if positive else 1)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
