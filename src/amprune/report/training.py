"""The section on recovery: how models were trained, what it did to the loss, and how it went."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from amprune.model.recovered import Recovery, TrainingLog, method, recipe, training_sentences
from amprune.report.drawing import Label, new_figure, style, tick, write_column
from amprune.report.grid import Grid, filled
from amprune.report.inputs import Inputs, Subject
from amprune.report.numbers import MINUS, MISSING, number, shortened
from amprune.report.page import Block, Picture, Section

RECOVERY = "Recovery"
_VALIDATION = "The validation loss is the mean over the samples held out of their mean loss a response token, in nats."
_SPOKEN = 2
"""Runs whose labels tell both losses; of more runs they tell one."""
_FEWEST = 12
"""Points below which a running mean hides more than it shows."""
_SHARE = 40
"""A running mean reaches as far as this part of the run, to both sides."""

Points = tuple[tuple[int, float], ...]


def recovery_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Tells of every model that was trained after pruning."""
    trained = [subject for subject in inputs.subjects if subject.trained]
    if not trained:
        return None
    blocks: list[Block] = []
    if sentences := _sentences(inputs, trained):
        blocks.append(sentences)
    unknown = [subject.name for subject in trained if subject.recovery is None]
    if unknown:
        blocks.append(f"The record of the training is damaged: {', '.join(unknown)}.")
    if rows := tuple(_row(s.name, s.recovery, s.log) for s in trained if s.recovery is not None):
        heads = ("model", "trained by", "steps", "samples", "validation loss before", "after", "change")
        blocks.append(filled(Grid("Training", (*heads, "tokens a second"), rows, words=2)))
        if any(subject.recovery.before is not None for subject in trained if subject.recovery is not None):
            blocks.append(_VALIDATION)
    if picture := _picture(trained, colours):
        blocks.append(picture)
    return Section(RECOVERY, tuple(blocks))


def _sentences(inputs: Inputs, trained: list[Subject]) -> tuple[str, ...]:
    """Returns sentences on the report's own model, or a short one on each; the table has the losses."""
    known = [(subject.name, subject.recovery) for subject in trained if subject.recovery is not None]
    focused = [recovery for name, recovery in known if name == inputs.focus]
    if focused or len(known) == 1:
        return training_sentences((focused or [known[0][1]])[0])
    return tuple(f"{name}: {' '.join(recipe(recovery))}" for name, recovery in known)


def _row(name: str, recovery: Recovery, log: TrainingLog) -> tuple[str, ...]:
    before, after = recovery.before, recovery.after
    return (
        name,
        method(recovery) + (", with a teacher" if recovery.teacher is not None else ""),
        f"{recovery.steps:,}",
        f"{recovery.data['training']:,}",
        number(before),
        number(after),
        MISSING if before is None or after is None else f"{after - before:+.3f}".replace("-", MINUS),
        number(log.tokens_per_second),
    )


def _picture(trained: list[Subject], colours: dict[str, str]) -> Picture | None:
    """Draws the logs, each once: models of several epochs may carry the same."""
    runs: dict[TrainingLog, list[str]] = {}
    for subject in trained:
        if subject.log.training or subject.log.validation:
            runs.setdefault(subject.log, []).append(subject.name)
    if not runs:
        return None
    figure = _training_figure([(names, log) for log, names in runs.items()], colours=colours)
    parts = []
    if any(log.training for log in runs):
        mean = ", a line is their running mean" if any(_is_averaged(log.training) for log in runs) else ""
        parts.append(f"dots are the training loss of the logged steps{mean}")
    if any(log.validation for log in runs):
        parts.append("circles, joined by a dashed line, are the validation loss")
    caption = f"Loss against optimizer steps: {'; '.join(parts)}."
    if any(s.recovery is not None and s.recovery.teacher is not None and s.log.training for s in trained):
        caption += " With a teacher, the training loss holds the divergence from it; the validation loss does not."
    words = "; ".join(f"{', '.join(names)}: {_course(log)}" for log, names in runs.items())
    return Picture("training", figure, f"Loss against optimizer steps. {words}.", caption)


def _course(log: TrainingLog) -> str:
    curves = [("training", log.training), ("validation", log.validation)]
    ends = [(f"{kind} loss", points[0], points[-1]) for kind, points in curves if points]
    return ", ".join(f"{kind} {number(a[1])} at step {a[0]:,}, {number(b[1])} at step {b[0]:,}" for kind, a, b in ends)


@style()
def _training_figure(runs: Sequence[tuple[Sequence[str], TrainingLog]], *, colours: Mapping[str, str]) -> Figure:
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
    ticks = MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]).tick_values(0, last)
    axes.set_xticks([value for value in ticks if 0 <= value <= last])
    axes.set(xlim=(-0.02 * last, 1.38 * max(last, 1)), xlabel="optimizer steps")
    axes.set_ylabel("loss, nats a token (lower is better)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: tick(value))
    axes.grid(axis="y")
    write_column(figure, axes, labels, last)
    return figure


def _draw_training(axes: Axes, points: Points, colour: str, *, alpha: float) -> Points:
    """Draws the logged losses and, where there are enough, their running mean; returns the line."""
    if not points:
        return ()
    steps, losses = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    few = not _is_averaged(points)
    axes.scatter(steps, losses, s=16 if few else 7, color=colour, alpha=0.8 if few else alpha, linewidths=0, zorder=2)
    if few:
        return points
    mean = running_mean(losses, max(1, len(points) // _SHARE))
    axes.plot(steps, mean, color=colour, linewidth=1.1, alpha=0.9, zorder=3)
    return tuple(zip(map(int, steps), map(float, mean), strict=True))


def _is_averaged(points: Points) -> bool:
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
