"""The section on recovery: how models were trained, what it did to the loss, and how it went."""

from amprune.model.recovered import TrainingLog, method, recipe, training_sentences
from amprune.report.blocks import Block, Bullets, Picture, Section, Table, Text, drop_empty_columns
from amprune.report.drawing import style
from amprune.report.figures_training import is_averaged, training_figure
from amprune.report.inputs import Inputs, Subject
from amprune.report.numbers import MINUS, MISSING, number

RECOVERY = "Recovery"
_VALIDATION = "The validation loss is the mean over the samples held out of their mean loss a response token, in nats."


def recovery_section(inputs: Inputs, colours: dict[str, str]) -> Section | None:
    """Tells of every model that was trained after pruning."""
    trained = [subject for subject in inputs.subjects if subject.trained]
    if not trained:
        return None
    blocks: list[Block] = []
    if sentences := _sentences(inputs, trained):
        blocks.append(Bullets(sentences))
    unknown = [subject.name for subject in trained if subject.recovery is None]
    if unknown:
        blocks.append(Text(f"The record of the training is damaged: {', '.join(unknown)}."))
    if rows := tuple(_row(subject) for subject in trained if subject.recovery is not None):
        header = (
            "model",
            "trained by",
            "steps",
            "samples",
            "validation loss before",
            "after",
            "change",
            "tokens a second",
        )
        blocks.append(drop_empty_columns(Table("Training", header, rows, left=2), MISSING))
        if any(subject.recovery.before is not None for subject in trained if subject.recovery is not None):
            blocks.append(Text(_VALIDATION))
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


def _row(subject: Subject) -> tuple[str, ...]:
    recovery, speed = subject.recovery, subject.log.tokens_per_second
    if recovery is None:
        return ()
    before, after = recovery.before, recovery.after
    return (
        subject.name,
        method(recovery) + (", with a teacher" if recovery.teacher is not None else ""),
        f"{recovery.steps:,}",
        f"{recovery.data['training']:,}",
        number(before) if before is not None else MISSING,
        number(after) if after is not None else MISSING,
        _difference(before, after),
        number(speed) if speed is not None else MISSING,
    )


def _difference(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return MISSING
    return f"{after - before:+.3f}".replace("-", MINUS)


def _picture(trained: list[Subject], colours: dict[str, str]) -> Picture | None:
    """Draws the logs, each once: models of several epochs may carry the same."""
    runs: dict[TrainingLog, list[str]] = {}
    for subject in trained:
        if subject.log.training or subject.log.validation:
            runs.setdefault(subject.log, []).append(subject.name)
    if not runs:
        return None
    with style():
        figure = training_figure([(names, log) for log, names in runs.items()], colours=colours)
    parts = []
    if any(log.training for log in runs):
        mean = ", a line is their running mean" if any(is_averaged(log.training) for log in runs) else ""
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
