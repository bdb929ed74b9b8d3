"""The section on importance scores: which heads were removed, and where the cut through the neurons lies."""

import hashlib
import json
from collections.abc import Sequence

from amprune.plan.artefact import PruningPlan
from amprune.report.blocks import Block, Picture, Section, Text
from amprune.report.drawing import style
from amprune.report.figures_importance import blocks_figure, heads_figure, neurons_figure
from amprune.report.inputs import Inputs, Subject
from amprune.scoring.scores import ImportanceScores


def importance_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Draws the scores once for all models that were planned from them."""
    blocks: list[Block] = []
    for index, subjects in enumerate(_by_scores(inputs), start=1):
        suffix = f"-{index}" if index > 1 else ""
        if subjects[0].scores is not None and subjects[0].scores.blocks is not None:
            blocks += _blocks(subjects, suffix)
            continue
        blocks += _heads(subjects, suffix)
        picture = _neurons(subjects, suffix, colours)
        blocks.append(picture)
    if not blocks:
        return None
    scored = [subject.scores for subject in inputs.subjects if subject.plan is not None and subject.scores is not None]
    return Section("Importance", (Text(_lead(scored)), *blocks))


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


def _blocks(subjects: list[Subject], suffix: str) -> list[Block]:
    """Draws the blocks once for every choice of kept blocks."""
    chosen: dict[tuple[int, ...], list[Subject]] = {}
    for subject in subjects:
        if subject.plan is not None:
            chosen.setdefault(subject.plan.kept_layers, []).append(subject)
    pictures: list[Block] = []
    for index, (kept, alike) in enumerate(chosen.items(), start=1):
        plan, scores = alike[0].plan, alike[0].scores
        if plan is None or scores is None or scores.blocks is None:
            continue
        names, total = ", ".join(subject.name for subject in alike), scores.shape.num_layers
        caption = f"Blocks of {names}: {total - len(kept)} of {total} were removed (hatched)."
        with style():
            figure = blocks_figure(scores.blocks, plan)
        number = f"-{index}" if index > 1 else ""
        alt = f"Bar chart of the scores of {total} decoder blocks. {caption}"
        pictures.append(Picture(f"blocks{suffix}{number}", figure, alt, caption))
    return pictures


def _by_scores(inputs: Inputs) -> list[list[Subject]]:
    groups: dict[str, list[Subject]] = {}
    for subject in inputs.subjects:
        if subject.plan is not None and subject.scores is not None:
            groups.setdefault(_identity(subject.scores), []).append(subject)
    return list(groups.values())


def _identity(scores: ImportanceScores) -> str:
    digest = hashlib.sha256(json.dumps([scores.fingerprint, scores.criterion], sort_keys=True).encode())
    for layer in scores.layers:
        for values in (layer.heads, layer.groups, layer.neurons):
            digest.update(values.tobytes())
    if scores.blocks is not None:
        digest.update(scores.blocks.tobytes())
    return digest.hexdigest()


def _heads(subjects: list[Subject], suffix: str) -> list[Block]:
    """Draws the heads once for every choice of kept heads."""
    chosen: dict[tuple[tuple[int, ...], ...], list[Subject]] = {}
    for subject in subjects:
        if subject.plan is not None:
            kept_heads = tuple(() if layer is None else layer.query_heads for layer in subject.plan.layers)
            chosen.setdefault(kept_heads, []).append(subject)
    blocks: list[Block] = []
    cut = [alike for kept, alike in chosen.items() if any(_lost(subject) for subject in alike)]
    for index, alike in enumerate(cut or list(chosen.values()), start=1):
        plan, scores = alike[0].plan, alike[0].scores
        if plan is None or scores is None:
            continue
        names = ", ".join(subject.name for subject in alike)
        lost = _lost(alike[0])
        what = f"{lost} of {plan.shape_before.num_attention_heads} query heads of every layer were removed (crosses)"
        caption = f"Heads of {names}: {what if lost else 'none was removed'}."
        with style():
            figure = heads_figure(scores, plan)
        alt = (
            f"Heat map of the head scores, {scores.shape.num_layers} layers by {scores.shape.num_attention_heads} heads"
        )
        number = f"-{index}" if index > 1 else ""
        blocks.append(Picture(f"heads{suffix}{number}", figure, f"{alt}. {caption}", caption))
    return blocks


def _lost(subject: Subject) -> int:
    plan = subject.plan
    return 0 if plan is None else plan.shape_before.num_attention_heads - plan.shape_after.num_attention_heads


def _in_order(plan: PruningPlan) -> bool:
    """Tells whether units of the lowest scores went, by whichever criterion."""
    return bool(plan.options.get("order", "amp") == "amp")


def _neurons(subjects: list[Subject], suffix: str, colours: dict[str, str]) -> Picture:
    cuts = [(subject.name, subject.plan) for subject in subjects if subject.plan is not None]
    ranked = [(name, plan) for name, plan in cuts if _in_order(plan)]
    scores = next(subject.scores for subject in subjects if subject.scores is not None)
    shown = [
        (name, plan) for name, plan in ranked if plan.shape_after.intermediate_size < scores.shape.intermediate_size
    ]
    with style():
        figure = neurons_figure(scores, shown, colours=colours)
    caption = "Neurons of every layer (a line each) in falling order of their score."
    if shown:
        caption += " What lies to the right of a dashed line was removed."
    if others := [name for name, plan in cuts if (name, plan) not in ranked]:
        caption += f" {', '.join(others)} kept others than the best, on purpose; no line shows that cut."
    words = "; ".join(
        f"{name} keeps {plan.shape_after.intermediate_size:,} of {plan.shape_before.intermediate_size:,}"
        for name, plan in shown
    )
    alt = f"Neuron scores in falling order, layer by layer. {words}{'.' if words else ''}"
    return Picture(f"neurons{suffix}", figure, alt.strip(), caption)
