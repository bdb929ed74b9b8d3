"""Sizes: the table, and where the parameters are."""

from amprune.errors import ReportError
from amprune.model.shape import ModelShape
from amprune.report.blocks import Block, Picture, Section, Table, drop_empty_columns
from amprune.report.drawing import style
from amprune.report.figures_measured import parts_figure
from amprune.report.inputs import Inputs, Subject
from amprune.report.measures import find_measures
from amprune.report.numbers import MISSING, percent, scaled

_SIZES = (
    ("weight_bytes", "weights", "B"),
    ("weight_bytes_per_token", "read per decoded token", "B"),
    ("kv_cache_bytes_per_token", "key-value cache per token", "B"),
    ("macs_per_token", "multiply-accumulates per token", ""),
)


def removed(inputs: Inputs, subject: Subject) -> float:
    """Returns the share of the baseline's parameters that a model lacks."""
    base = inputs.subject(inputs.baseline)
    return 0.0 if base is None else 1 - subject.parameters / base.parameters


def size_section(inputs: Inputs, colours: dict[str, str]) -> Section:
    """Says how large each model is and where its parameters are."""
    measures = {name: find_measures(inputs.evaluation, "size", name) for name, _, _ in _SIZES}
    rows = []
    for subject in inputs.subjects:
        row = [subject.name, f"{subject.parameters:,}"]
        row.append(MISSING if subject.name == inputs.baseline else percent(removed(inputs, subject), 2))
        for name, _, unit in _SIZES:
            found = next((m.records[subject.name] for m in measures[name] if subject.name in m.records), None)
            stored = subject.entry.weight_bytes if subject.entry is not None and name == "weight_bytes" else None
            value = found.value if found is not None else stored
            row.append(scaled(value, unit) if value else MISSING)
        rows.append(tuple(row))
    header = ("model", "parameters", "removed", *(words for _, words, _ in _SIZES))
    blocks: list[Block] = [drop_empty_columns(Table("", header, tuple(rows)), MISSING)]
    if parts := _parts(inputs):
        with style():
            figure = parts_figure(parts, baseline=inputs.baseline)
        alt = "; ".join(
            f"{name}: " + ", ".join(f"{part} {scaled(count)}" for part, count in counts.items())
            for name, counts in parts.items()
        )
        caption = "Where the parameters are. Heads and neurons alone are removed; everything else stays."
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
