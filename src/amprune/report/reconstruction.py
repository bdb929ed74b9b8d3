"""The section on reconstruction: how well refitted output projections give what they should, and its figure."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from amprune.cut.refit.record import ReconstructionRecord
from amprune.report.drawing import BASELINE_COLOUR, logarithmic, new_figure, style, tick
from amprune.report.grid import Grid
from amprune.report.inputs import Inputs
from amprune.report.numbers import percent
from amprune.report.page import Block, Picture, Section

_LEAD = (
    "After pruning, what is left of the output projections was refitted in closed form, layer by layer, so that each "
    "layer gives what it gave before: ridge least squares, no training. An error is the sum of squares by which a "
    "projection misses what the dense model has there, as a share of the squares of that: 100 % is as wrong as giving "
    "nothing. It is measured on held-out tokens, which no fit has seen; before the refit means with the kept weights "
    "as they were, on top of layers that are refitted already. The drift is the error of the hidden states that leave "
    "a layer, in the same terms."
)
_DECADES = 20
"""Values that differ by this factor are drawn on a logarithmic axis."""
_MARKED = 50
"""Layers up to which each gets a mark."""


def reconstruction_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Tells of every model whose output projections were refitted."""
    known = [(s.name, s.reconstruction) for s in inputs.subjects if s.reconstruction is not None]
    known = [(name, record) for name, record in known if record.layers]
    if not known:
        return None
    header = ("model", "attention before", "after", "MLP before", "after", "drift of the last layer")
    blocks: list[Block] = [
        _LEAD,
        tuple(_sentence(name, record) for name, record in known),
        Grid("Error on held-out tokens, mean over the layers", header, tuple(_row(*one) for one in known)),
    ]
    for index, (name, record) in enumerate(known, start=1):
        suffix = f"-{index}" if index > 1 else ""
        figure = reconstruction_figure(record, colour=colours[name])
        caption = (
            f"{name}: errors of the output projections on held-out tokens, and drift of the hidden states, as shares "
            "of what they should be. What is 0 has no place on a logarithmic axis."
        )
        blocks.append(Picture(f"reconstruction{suffix}", figure, f"{caption} {_course(record)}", caption))
    return Section("Reconstruction", tuple(blocks))


def _sentence(name: str, record: ReconstructionRecord) -> str:
    """Says on what a model was refitted, and how strongly the weights were held."""
    tokens, fits = max(one.tokens for one in record.projections), len(record.projections)
    strengths = [one.strength for one in record.projections if one.strength is not None]
    fitted = f"fitted on {tokens:,} tokens of {record.calibration}"
    held = f"{record.held_out_rows:,} of {record.rows:,} rows of {record.row_tokens:,} tokens were held out"
    whole = sum(one.strength is None and one.held_out_before == 0 for one in record.projections)
    stayed = fits - len(strengths) - whole
    sentences = [f"{name}: {fitted} ({held})"]
    if strengths:
        low, high = (f"{value:.1g}" for value in (min(strengths), max(strengths)))
        ridge = f"a ridge of {low}" if low == high else f"ridges of {low} to {high}"
        sentences[0] += f", with {ridge} times the mean square of the inputs, as the held-out tokens liked best"
    if whole:
        sentences.append(f"{whole} of {fits} projections had nothing to make up for")
    if stayed:
        sentences.append(f"{stayed} of {fits} stayed as they were, since no ridge lowered their error")
    return ". ".join(sentences) + "."


def _row(name: str, record: ReconstructionRecord) -> tuple[str, ...]:
    attention, mlp = [layer.attention for layer in record.layers], [layer.mlp for layer in record.layers]
    means = [
        fmean([getattr(one, field) for one in part])
        for part in (attention, mlp)
        for field in ("held_out_before", "held_out_after")
    ]
    return (name, *map(_share, means), _share(record.layers[-1].drift))


def _share(value: float) -> str:
    """Writes a share with as many digits as a small one needs."""
    return percent(value) if value >= 0.01 else f"{100 * value:.2g} %"


def _course(record: ReconstructionRecord) -> str:
    first, last = record.layers[0], record.layers[-1]
    parts = [
        f"{words}: {_share(one.held_out_before)} to {_share(one.held_out_after)} in the first layer, "
        f"{_share(other.held_out_before)} to {_share(other.held_out_after)} in the last"
        for words, one, other in (
            ("attention", first.attention, last.attention),
            ("MLP", first.mlp, last.mlp),
        )
    ]
    return f"{'; '.join(parts)}; drift {_share(first.drift)} and {_share(last.drift)}."


@style()
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
    panels[2].set(xlabel="layer", xlim=(-0.6, len(layers) - 0.4))
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
