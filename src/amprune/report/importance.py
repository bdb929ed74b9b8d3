"""The section on importance scores: which heads were removed, and where the cut through the neurons lies."""

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from amprune.plan.artefact import PruningPlan
from amprune.report.drawing import logarithmic, new_figure, style, tick
from amprune.report.inputs import Inputs
from amprune.report.numbers import shortened
from amprune.report.page import Block, Picture, Section
from amprune.scoring.scores import ImportanceScores

_POINTS = 400
_NAMED = 3
"""Cuts that are named beside their lines."""
_MAP = "viridis"
Scores = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]
Cut = tuple[str, PruningPlan]
"""A model, and what was cut from it."""


def importance_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Draws the scores once for all models that were planned from them."""
    planned: dict[str, tuple[ImportanceScores, list[Cut]]] = {}
    for subject in inputs.subjects:
        if subject.plan is not None and subject.scores is not None:
            alike = planned.setdefault(_identity(subject.scores), (subject.scores, []))
            alike[1].append((subject.name, subject.plan))
    if not planned:
        return None
    blocks: list[Block] = []
    for index, (scores, cuts) in enumerate(planned.values(), start=1):
        if scores.blocks is not None:
            blocks += _blocks(scores, scores.blocks, cuts, _suffix(index))
        else:
            blocks += [*_heads(scores, cuts, _suffix(index)), _neurons(scores, cuts, _suffix(index), colours)]
    return Section("Importance", (_lead([scores for scores, _ in planned.values()]), *blocks))


def _suffix(index: int) -> str:
    return f"-{index}" if index > 1 else ""


def _lead(scored: Sequence[ImportanceScores]) -> str:
    """Says what the scores are, and how figures show them."""
    width = list(dict.fromkeys(scores.criterion for scores in scored if scores.blocks is None))
    depth = list(dict.fromkeys(scores.criterion for scores in scored if scores.blocks is not None))
    said = []
    if width == ["amp"]:
        said.append("A score is what a unit adds to the residual stream, averaged over the calibration set.")
    elif width:
        said.append(f"Heads and neurons were scored by the criterion {', '.join(width)}.")
    if width:
        said.append(
            "Units compete within their layer, and every layer loses as many; the colours are therefore relative to "
            "the mean of the layer."
        )
    if depth:
        said.append(
            f"By the criterion {', '.join(depth)} whole decoder blocks were scored: the higher, the more a block is "
            "worth."
        )
    return " ".join(said)


def _identity(scores: ImportanceScores) -> str:
    digest = hashlib.sha256(json.dumps([scores.fingerprint, scores.criterion], sort_keys=True).encode())
    for layer in scores.layers:
        for values in (layer.heads, layer.groups, layer.neurons):
            digest.update(values.tobytes())
    if scores.blocks is not None:
        digest.update(scores.blocks.tobytes())
    return digest.hexdigest()


def _alike(cuts: Sequence[Cut], key: Callable[[PruningPlan], Hashable]) -> list[tuple[str, PruningPlan]]:
    """Returns the plans that differ in what they keep, each with the names of all models that it holds for."""
    groups: dict[Hashable, list[Cut]] = {}
    for name, plan in cuts:
        groups.setdefault(key(plan), []).append((name, plan))
    return [(", ".join(name for name, _ in group), group[0][1]) for group in groups.values()]


def _blocks(scores: ImportanceScores, blocks: Scores, cuts: Sequence[Cut], suffix: str) -> list[Picture]:
    """Draws the blocks once for every choice of kept blocks."""
    pictures, total = [], scores.shape.num_layers
    for index, (names, plan) in enumerate(_alike(cuts, lambda plan: plan.kept_layers), start=1):
        gone = total - len(plan.kept_layers)
        caption = f"Blocks of {names}: {gone} of {total} were removed (hatched)."
        alt = f"Bar chart of the scores of {total} decoder blocks. {caption}"
        pictures.append(Picture(f"blocks{suffix}{_suffix(index)}", blocks_figure(blocks, plan), alt, caption))
    return pictures


def _heads(scores: ImportanceScores, cuts: Sequence[Cut], suffix: str) -> list[Picture]:
    """Draws the heads once for every choice of kept heads; where some went, of those models alone."""
    choices = _alike(cuts, lambda plan: tuple(() if layer is None else layer.query_heads for layer in plan.layers))
    heads, pictures = scores.shape.num_attention_heads, []
    lost = {names: heads - plan.shape_after.num_attention_heads for names, plan in choices}
    drawn = [choice for choice in choices if lost[choice[0]]] or choices
    for index, (names, plan) in enumerate(drawn, start=1):
        what = f"{lost[names]} of {heads} query heads of every layer were removed (crosses)"
        caption = f"Heads of {names}: {what if lost[names] else 'none was removed'}."
        alt = f"Heat map of the head scores, {scores.shape.num_layers} layers by {heads} heads. {caption}"
        pictures.append(Picture(f"heads{suffix}{_suffix(index)}", heads_figure(scores, plan), alt, caption))
    return pictures


def _neurons(scores: ImportanceScores, cuts: Sequence[Cut], suffix: str, colours: dict[str, str]) -> Picture:
    width = scores.shape.intermediate_size
    ranked = [(name, plan) for name, plan in cuts if plan.options.get("order", "amp") == "amp"]
    shown = [(name, plan) for name, plan in ranked if plan.shape_after.intermediate_size < width]
    caption = "Neurons of every layer (a line each) in falling order of their score."
    if shown:
        caption += " What lies to the right of a dashed line was removed."
    if others := [name for name, plan in cuts if (name, plan) not in ranked]:
        caption += f" {', '.join(others)} kept others than the best, on purpose; no line shows that cut."
    words = "; ".join(f"{name} keeps {plan.shape_after.intermediate_size:,} of {width:,}" for name, plan in shown)
    alt = f"Neuron scores in falling order, layer by layer. {words}{'.' if words else ''}"
    return Picture(f"neurons{suffix}", neurons_figure(scores, shown, colours=colours), alt.strip(), caption)


@style()
def heads_figure(scores: ImportanceScores, plan: PruningPlan) -> Figure:
    """Draws layers by heads, each score over the mean of its layer, with the removed ones crossed out.

    Where whole key-value groups went, a second panel shows the scores of the groups, by which they were chosen.
    """
    heads = relative(np.stack([layer.heads for layer in scores.layers]))
    removed = [
        (row, unit)
        for row, layer in enumerate(plan.layers)
        for unit in _gone(() if layer is None else layer.query_heads, heads.shape[1])
    ]
    shape = scores.shape
    by_group = shape.group_size > 1 and plan.shape_after.num_key_value_heads < shape.num_key_value_heads
    figure = new_figure(min(8.0, max(2.4, 1.3 + 0.115 * shape.num_layers)))
    groups = relative(np.stack([layer.groups for layer in scores.layers]))
    widths = [shape.num_attention_heads, max(shape.num_key_value_heads, shape.num_attention_heads // 3)]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=widths) if by_group else [figure.add_subplot()]
    norm = _norm([heads, groups] if by_group else [heads])
    _map(panels[0], heads, norm, removed)
    _separate_groups(panels[0], shape.num_attention_heads, shape.group_size)
    panels[0].set(xlabel="query head" + _grouping(shape.group_size, shape.num_key_value_heads), ylabel="layer")
    if by_group:
        lost = [
            (row, k)
            for row, layer in enumerate(plan.layers)
            for k in _gone(() if layer is None else layer.key_value_heads, groups.shape[1])
        ]
        _map(panels[1], groups, norm, lost)
        panels[1].set_xlabel("key-value group")
    bar = figure.colorbar(ScalarMappable(norm, _MAP), ax=list(panels), pad=0.015, aspect=30)
    bar.set_label(_unit(heads))
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=9))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure


def relative(scores: Scores) -> Values:
    """Divides the scores of each layer (rows) by their mean magnitude: units compete within their layer alone."""
    wide = scores.astype(np.float64)
    means = np.abs(wide).mean(axis=1, keepdims=True)
    return np.asarray(wide / np.where(means > 0, means, 1.0))


def _unit(values: Values) -> str:
    return "score / mean magnitude of its layer" if (values < 0).any() else "score / mean of its layer"


def _gone(kept: Sequence[int], total: int) -> list[int]:
    return sorted(set(range(total)) - set(kept))


def _grouping(size: int, groups: int) -> str:
    if size == 1:
        return ""
    return f" ({size} share each of {groups} key-value heads)" if groups > 1 else " (all share one key-value head)"


def _norm(maps: Sequence[Values]) -> Normalize:
    values = np.concatenate([found.ravel() for found in maps])
    if (values < 0).any():
        return Normalize(float(values.min()), float(values.max()))
    positive = values[values > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (0.5, 2.0)
    if high / low > 5:
        return LogNorm(low, high)
    return Normalize(min(low, 0.999), max(high, 1.001))


def _map(axes: Axes, values: Values, norm: Normalize, removed: Sequence[tuple[int, int]]) -> None:
    axes.imshow(np.maximum(values, norm.vmin or 0.0), norm=norm, cmap=_MAP, aspect="auto", interpolation="nearest")
    if removed:
        rows, units = zip(*removed, strict=True)
        size = float(np.clip(900 / max(values.shape[0] * 1.6, values.shape[1]), 4, 30))
        for colour, width in (("black", 0.52), ("white", 0.24)):
            axes.scatter(units, rows, marker="x", s=size, color=colour, linewidths=width * size**0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)


def _separate_groups(axes: Axes, heads: int, size: int) -> None:
    if 1 < size < heads:
        for edge in range(size, heads, size):
            axes.axvline(edge - 0.5, color="white", linewidth=1.6)


@style()
def blocks_figure(blocks: Scores, plan: PruningPlan) -> Figure:
    """Draws the score of each decoder block as a bar, those of removed blocks hollow."""
    figure = new_figure(2.6)
    axes = figure.add_subplot()
    kept, gone = list(plan.kept_layers), _gone(plan.kept_layers, len(blocks))
    colour = colormaps[_MAP](0.35)
    axes.bar(kept, blocks[kept], color=colour, label="kept")
    axes.bar(gone, blocks[gone], facecolor="white", edgecolor=colour, hatch="////", linewidth=0.9, label="removed")
    positive = blocks[blocks > 0]
    if positive.size == len(blocks) and positive.max() / positive.min() > 30:
        logarithmic(axes, "y")
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set(xlim=(-0.7, len(blocks) - 0.3), xlabel="decoder block", ylabel="score")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


@style()
def neurons_figure(
    scores: ImportanceScores, cuts: Sequence[tuple[str, PruningPlan]], *, colours: dict[str, str]
) -> Figure:
    """Draws the neurons of each layer in falling order of their score, with a line where each model was cut."""
    ordered = np.sort(np.stack([layer.neurons for layer in scores.layers]), axis=1)[:, ::-1].astype(np.float64)
    values = ordered / np.maximum(np.abs(ordered).mean(axis=1, keepdims=True), 1e-30)
    signed = bool((values < 0).any())
    width = values.shape[1]
    ranks = np.unique(np.geomspace(1, width, _POINTS).astype(int) if width > _POINTS else np.arange(1, width + 1))
    ranks = np.unique(np.concatenate([ranks, np.linspace(1, width, _POINTS).astype(int)]))
    figure = new_figure(3.3 + (0.1 * len(cuts) if len(cuts) > _NAMED else 0.0))
    axes = figure.add_subplot()
    norm = Normalize(0, max(1, len(values) - 1))
    for index, row in enumerate(values):
        kept = (row[ranks - 1] > 0) | signed
        axes.plot(ranks[kept], row[ranks - 1][kept], color=colormaps[_MAP](norm(index)), linewidth=0.8)
    axes.set(xlim=(1, width), xlabel="neurons of a layer, by falling score", ylabel=_unit(values))
    positive = values[values > 0]
    if not signed and positive.size and positive.max() / positive.min() > 10:
        axes.set_ylim(max(float(positive.min()), float(positive.max()) * 1e-6), float(positive.max()) * 1.1)
        logarithmic(axes, "y")
    _cuts(figure, axes, [(plan.shape_after.intermediate_size, name) for name, plan in cuts], colours)
    if len(values) > 1:
        bar = figure.colorbar(ScalarMappable(norm, _MAP), ax=axes, pad=0.015, aspect=30)
        bar.set_label("layer")
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure


def _cuts(figure: Figure, axes: Axes, cuts: Sequence[tuple[int, str]], colours: dict[str, str]) -> None:
    """Draws a line for each cut, named beside it, or above the figure where they are many."""
    for place, (kept, name) in enumerate(sorted(cuts, reverse=True)):
        words, colour = f"{shortened(name, 24)}: {kept:,} kept", colours[name]
        axes.axvline(kept, color=colour, linestyle="--", linewidth=1.3, label=words)
        if len(cuts) <= _NAMED:
            axes.annotate(words, (kept, 0.97 - 0.075 * place), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                          textcoords="offset points", ha="right", va="top", color=colour, fontsize=8,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0})  # fmt: skip
    if len(cuts) > _NAMED:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
