"""Sizes: the table, and where the parameters are."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from amprune.errors import ReportError
from amprune.model.shape import ModelShape
from amprune.report.drawing import named_rows, new_figure, style
from amprune.report.grid import grid_of
from amprune.report.inputs import Inputs, Subject
from amprune.report.measures import find_measures
from amprune.report.numbers import MINUS, percent, scaled
from amprune.report.page import Block, Picture, Section

_SIZES = (
    ("weight_bytes", "weights", "B"),
    ("weight_bytes_per_token", "read per decoded token", "B"),
    ("kv_cache_bytes_per_token", "key-value cache per token", "B"),
    ("macs_per_token", "multiply-accumulates per token", ""),
)
_PARTS = {
    "embeddings": "#88ccee",
    "embeddings and the rest": "#88ccee",
    "attention": "#332288",
    "mlp": "#ddaa33",
    "norms and others": "#bbbbbb",
    "language-model head": "#44aa99",
}
"""In the order in which they are drawn."""


def removed(inputs: Inputs, subject: Subject) -> float:
    """Returns the share of the baseline's parameters that a model lacks."""
    base = inputs.subject(inputs.baseline)
    return 0.0 if base is None else 1 - subject.parameters / base.parameters


def size_section(inputs: Inputs) -> Section:
    """Says how large each model is and where its parameters are."""
    columns = [
        ("parameters", {s.name: f"{s.parameters:,}" for s in inputs.subjects}),
        ("removed", {s.name: percent(removed(inputs, s), 2) for s in inputs.compared}),
    ]
    for metric, words, unit in _SIZES:
        stored = {s.name: s.entry.weight_bytes for s in inputs.subjects if s.entry and metric == "weight_bytes"}
        sizes: dict[str, float] = {name: size for name, size in stored.items() if size}
        for measure in reversed(find_measures(inputs.evaluation, "size", metric)):  # the first counts
            sizes |= {name: record.value for name, record in measure.records.items()}
        columns.append((words, {name: scaled(size, unit) for name, size in sizes.items() if size}))
    blocks: list[Block] = [grid_of("", [s.name for s in inputs.subjects], columns)]
    if parts := _parts(inputs):
        alt = "; ".join(
            f"{name}: " + ", ".join(f"{part} {scaled(count)}" for part, count in counts.items())
            for name, counts in parts.items()
        )
        caption = "Where the parameters are. Heads and neurons alone are removed; everything else stays."
        figure = _parts_figure(parts, baseline=inputs.baseline)
        blocks.append(Picture("parameters", figure, f"Parameters by part. {alt}.", caption))
    return Section("Size", tuple(blocks))


def _parts(inputs: Inputs) -> dict[str, dict[str, int]]:
    """Returns parameters by part of the models of which they are known, as finely as all of those allow."""
    shapes = _shapes(inputs)
    coarse = {name: _by_shape(shape) for name, shape in shapes.items()}
    fine = {subject.name: dict(subject.parts) for subject in inputs.subjects if subject.parts is not None}
    for name in [name for name in shapes if name not in fine]:  # What is not removed is the same in both.
        origin = next((other for other in fine if other in shapes), None)
        if origin is not None:
            grown = {part: coarse[name][part] - coarse[origin][part] for part in ("attention", "mlp")}
            fine[name] = {**fine[origin], **{p: fine[origin].get(p, 0) + count for p, count in grown.items()}}
    right = all(sum(fine.get(s.name, {}).values()) == s.parameters for s in inputs.subjects if s.name in coarse)
    known = fine if right else coarse
    return {s.name: known[s.name] for s in inputs.subjects if sum(known.get(s.name, {}).values()) == s.parameters}


def _shapes(inputs: Inputs) -> dict[str, ModelShape]:
    """Finds the shapes of models in the plans that made them, and the baseline's in what they were made from."""
    shapes: dict[str, ModelShape] = {}
    base = inputs.subject(inputs.baseline)
    for subject in inputs.subjects:
        before, after = _before_and_after(subject)
        if after is not None:
            shapes[subject.name] = after
        if before is not None and base is not None and before.parameters == base.parameters:
            shapes.setdefault(base.name, before)
    return shapes


def _before_and_after(subject: Subject) -> tuple[ModelShape | None, ModelShape | None]:
    if subject.plan is not None:
        return subject.plan.shape_before, subject.plan.shape_after
    made = subject.entry.pruned if subject.entry is not None else None
    try:
        before, after = (
            ModelShape.from_dict((made or {})[name], where=subject.name, error=ReportError)
            for name in ("shape_before", "shape_after")
        )
    except (KeyError, ReportError):
        return None, None
    return before, after


def _by_shape(shape: ModelShape) -> dict[str, int]:
    attention, mlp = shape.attention_parameters, shape.mlp_parameters
    return {"embeddings and the rest": shape.parameters - attention - mlp, "attention": attention, "mlp": mlp}


@style()
def _parts_figure(parts: Mapping[str, Mapping[str, int]], *, baseline: str | None) -> Figure:
    """Draws the parameters of each model as a bar of its parts."""
    figure = new_figure(0.95 + 0.36 * len(parts))
    axes = figure.add_subplot()
    names = [part for part in _PARTS if any(part in counts for counts in parts.values())]
    most = max(sum(counts.values()) for counts in parts.values())
    dense = sum(parts[baseline].values()) if baseline in parts and baseline is not None else None
    for row, (name, counts) in enumerate(parts.items()):
        left = 0
        for part in names:
            count = counts.get(part, 0)
            label = None if row else part.replace("mlp", "MLP")
            axes.barh(row, count, left=left, height=0.7, color=_PARTS[part], label=label)
            if count > 0.11 * most:
                dark = part in ("attention", "language-model head")
                axes.text(left + count / 2, row, scaled(count), ha="center", va="center", fontsize=7.5,
                          color="white" if dark else "black")  # fmt: skip
            left += count
        fewer = f" ({MINUS}{percent(1 - left / dense)})" if dense and name != baseline else ""
        axes.annotate(f"{scaled(left)}{fewer}", (left, row), xytext=(4, 0), textcoords="offset points", va="center",
                      fontsize=8)  # fmt: skip
    named_rows(axes, list(parts))
    axes.set(xlim=(0, most * 1.3), xlabel="parameters")
    axes.xaxis.set_major_formatter(lambda value, _: _parameters(value))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False,
                  fontsize=8, handlelength=1.0, columnspacing=1.2)  # fmt: skip
    return figure


def _parameters(value: float) -> str:
    """Returns a round number without the zeros behind its point."""
    figure, _, unit = scaled(value).partition(" ")
    return f"{figure.rstrip('0').rstrip('.') if '.' in figure else figure} {unit}".rstrip()
