"""How the models were made and measured, and what the figures cannot tell."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from amprune.evaluation.records import Record
from amprune.model.quantization import quantization_sentences
from amprune.model.recovered import data_sentence
from amprune.prove.card import criterion, how_it_was_made, logit_difference, removal, size_rows
from amprune.report.grid import Grid
from amprune.report.inputs import EVALUATION, Inputs
from amprune.report.measures import change, find_measures, setting
from amprune.report.numbers import MISSING, percent
from amprune.report.page import Block, Command, Section

MADE, LIMITS, UNMEASURED = "How it was made", "Limits", "Not measured yet"
UNTRAINED = "The pruned models were not trained after pruning."


def made_section(inputs: Inputs) -> Section | None:
    """Says how the report's checkpoint was made and that it was verified."""
    subject = inputs.subject(inputs.focus)
    if subject is None or (subject.plan is None and subject.quantization is None):
        return None
    packed = () if subject.quantization is None else quantization_sentences(subject.quantization)
    if subject.plan is None:
        return Section(MADE, (packed,))
    plan = subject.plan
    first = removal(plan)
    by = "of AMP (arXiv 2504.21174)" if criterion(plan) == "amp" else criterion(plan)
    chosen = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.choices.items() if value is not None)
    extra = (f"Options of the plan: {chosen}.",) if chosen else ()
    blocks: list[Block] = [
        (
            f"{first[0].upper()}{first[1:]}, by the criterion {by}.",
            *how_it_was_made(plan, logit_difference(inputs.verification)),
            *extra,
        ),
        Grid("Shape", ("", "dense", "pruned"), size_rows(plan)),
    ]
    checks = (inputs.verification or {}).get("checks")
    if packed:
        blocks.append(packed)
    elif isinstance(checks, list) and checks:
        rows = tuple(
            (str(c.get("name")), "passed" if c.get("passed") else "FAILED", str(c.get("detail"))) for c in checks
        )
        blocks.append(Grid("Verification", ("check", "result", "found"), rows, words=3))
    elif subject.trained:
        blocks.append("It was trained after that, so that its logits are no longer those of the masked dense model.")
    else:
        blocks.append("It carries no record of a verification; `amprune verify` makes one.")
    return Section(MADE, tuple(blocks))


def measuring_section(inputs: Inputs) -> Section:
    """Says how to measure what was not measured."""
    folder = inputs.output.parent
    return Section(
        UNMEASURED,
        (
            "Nothing is known of this model's quality or speed: there is no evaluation. This measures both models:",
            Command(f"amprune evaluate DENSE {folder} -o {inputs.output / EVALUATION}"),
        ),
    )


def settings_section(inputs: Inputs) -> Section | None:
    """Lists with which settings, data, device and versions each figure was measured."""
    records = list(inputs.evaluation.records.values())
    if not records:
        return None
    rows = _measured(records)
    header = ("measurement", "task", "settings", "seed", "device", "data (sha256)")
    blocks: list[Block] = [Grid("Settings", header, rows, words=6)]
    versions = {record.versions.get(name) and f"{name} {record.versions[name]}" for record in records
                for name in record.versions}  # fmt: skip
    known = sorted(version for version in versions if version)
    if known:
        blocks.append(f"Versions: {', '.join(known)}.")
    dates = sorted(record.time[:10] for record in records if record.time)
    if dates:
        span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        blocks.append(f"Measured on {span}.")
    models = tuple(
        (entry.name, _place(entry.source), entry.model_type, entry.dtype, entry.license or MISSING, entry.sha256[:16])
        for entry in inputs.evaluation.models.values()
    )
    blocks.append(Grid("Models", ("model", "source", "type", "dtype", "licence", "sha256"), models, words=6))
    return Section("How it was measured", tuple(blocks))


def _place(source: str) -> str:
    """Leaves out where on this machine a model lies: reports are shared."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source


def _measured(records: Sequence[Record]) -> tuple[tuple[str, ...], ...]:
    """Returns a row for everything that was measured with the same settings."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((json.dumps(record.settings, sort_keys=True), record.device), []).append(record)
    return tuple(_settings_row(group) for group in groups.values())


def _settings_row(group: Sequence[Record]) -> tuple[str, ...]:
    settings = [setting(name, value) for name, value in sorted(group[0].settings.items()) if name != "tasks"]
    seeds = dict.fromkeys(str(record.seed) for record in group if record.seed is not None)
    columns: tuple[Iterable[str], ...] = (
        dict.fromkeys(record.measurement.replace("_", "-") for record in group),
        dict.fromkeys(record.task for record in group),
        settings,
        seeds,
        [group[0].device],
        dict.fromkeys(_data(record) for record in group if record.data),
    )
    return tuple(", ".join(column) or MISSING for column in columns)


def _data(record: Record) -> str:
    data = record.data or {}
    digest = str(data.get("sha256") or "")[:12]
    return f"{data.get('name', '')} ({digest})" if digest else str(data.get("name", ""))


def limits(inputs: Inputs) -> tuple[str, ...]:
    """Returns what a reader must not conclude from the figures."""
    found: list[str] = []
    evaluation = inputs.evaluation
    kinds = {record.measurement for record in evaluation.records.values()}
    if evaluation.unfinished is not None:
        found.append("The evaluation was interrupted: some figures are missing. Run the same command again.")
    if kinds & {"perplexity", "zero_shot"}:
        found.append(
            "Standard errors say how far a figure depends on the items that were asked, not on the calibration set, "
            "the seed or the choice of tasks."
        )
        found.append(
            "Perplexity and multiple-choice accuracy do not tell how well a model writes or follows instructions."
        )
    asked = sorted(
        {r.settings["limit"] for r in evaluation.records.values() if isinstance(r.settings.get("limit"), int)}
    )
    if asked:
        found.append(
            f"Some accuracies are over the first {' or '.join(map(str, asked))} items of a task, not over all."
        )
    if count := _unpaired(inputs):
        found.append(
            f"{count} comparisons are not paired, since the items or the runs were not the same; their differences are "
            "less certain."
        )
    if "latency" in kinds:
        found.append("Times hold for the named device, batch size and software alone; measure on what you will use.")
    if "energy" in kinds:
        found.append(
            "Energy is only as good as its source, which the note beside it names; a model of power is no meter."
        )
    return (*found, *_on_training(inputs))


def _on_training(inputs: Inputs) -> Iterator[str]:
    """Says which models were not trained after pruning, and what holds for those that were."""
    untrained = [subject.name for subject in inputs.subjects if subject.plan is not None and not subject.trained]
    trained = [subject for subject in inputs.subjects if subject.trained]
    if untrained:
        yield f"Not trained after pruning: {', '.join(untrained)}." if trained else UNTRAINED
    yield from dict.fromkeys(
        f"{subject.name}: {data_sentence(subject.recovery)}" for subject in trained if subject.recovery is not None
    )
    if any(subject.log.validation or (subject.recovery and subject.recovery.after) for subject in trained):
        yield (
            "A validation loss is measured on samples like those that were trained on: it falls also where a model "
            "gets worse at everything else."
        )


def _unpaired(inputs: Inputs) -> int:
    kinds = ("perplexity", "zero_shot", "latency")
    changes = [
        change(measure, name, inputs.baseline)
        for kind in kinds
        for measure in find_measures(inputs.evaluation, kind)
        if measure.task != "average"
        for name in measure.records
    ]
    return sum(found is not None and not found.paired for found in changes)


def removed_words(share: float) -> str:
    """Says how much smaller a model is."""
    return f"{percent(share)} fewer" if share >= 0 else f"{percent(-share)} more"
