"""The model card of a measured checkpoint: the card that pruning wrote, with the results and their metadata."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from amprune.model.recovered import data_sentence
from amprune.prove.card import FRONT, CardHead, card_text, read_card
from amprune.report.inputs import Inputs, Subject
from amprune.report.measures import Measure, averages, find_measures, headlines
from amprune.report.provenance import UNTRAINED, limits, logit_difference

_DATASETS = {
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "piqa": "ybisk/piqa",
}
"""Where the hub has the data of a task."""
_CONFIGS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "winogrande": "winogrande_xl"}


def renewed_card(folder: Path, inputs: Inputs, *, records: Sequence[str], results: str) -> str | None:
    """Returns the text of `README.md` with the results, in Markdown; None where someone else wrote the file."""
    head, subject = read_card(folder), inputs.subject(inputs.focus)
    if head.foreign or subject is None or (subject.plan, subject.recovery, subject.quantization) == (None, None, None):
        return None
    said = {UNTRAINED} if subject.recovery is None else {f"{subject.name}: {data_sentence(subject.recovery)}"}
    return card_text(
        subject.plan,
        dense=head.dense or inputs.baseline or "the dense model",
        front=_front(head, inputs, subject),
        records=records,
        logit_difference=logit_difference(inputs),
        recovery=subject.recovery,
        quantization=subject.quantization,
        results=results,
        measured=_is_measured(inputs, subject.name),
        limits=[limit for limit in limits(inputs) if limit not in said],
    )


def _is_measured(inputs: Inputs, name: str) -> bool:
    records = inputs.evaluation.records.values()
    return any(record.model == name and record.measurement in ("perplexity", "zero_shot") for record in records)


def _front(head: CardHead, inputs: Inputs, subject: Subject) -> dict[str, object]:
    """Keeps what the card says already, adds what it lacks, and renews the results."""
    base = inputs.subject(inputs.baseline)
    known = [found.entry for found in (subject, base) if found is not None and found.entry is not None]
    kind = [*(["pruned"] if subject.plan is not None else []), "amprune", *(["recovered"] if subject.trained else [])]
    if subject.quantization is not None:
        kind += ["quantized", subject.quantization.type, subject.quantization.library]
    front = {**FRONT, "tags": kind, **head.front}
    for entry in known:
        if entry.license is not None:
            front.setdefault("license", entry.license)
        if entry.base_model is not None:
            front.setdefault("base_model", [entry.base_model])
    front.pop("model-index", None)
    if results := _results(inputs, subject.name):
        front["model-index"] = eval_results_to_model_index(subject.name, results)
    return front


def _results(inputs: Inputs, name: str) -> list[EvalResult]:
    evaluation = inputs.evaluation
    measures = (*find_measures(evaluation, "perplexity"), *headlines(evaluation), *averages(evaluation))
    return [_result(measure, name) for measure in measures if name in measure.records]


def _result(measure: Measure, name: str) -> EvalResult:
    """The settings stand in the metric's name: the hub would merge figures that differ in them alone."""
    record, asked = measure.records[name], measure.settings.get("limit")
    words = f"{measure.metric}, {measure.label}" + (f", first {asked} questions" if asked else "")
    wikitext = measure.task.startswith("wikitext2")
    return EvalResult(
        task_type="text-generation",
        dataset_type="Salesforce/wikitext" if wikitext else _DATASETS.get(measure.task, _slug(measure.task)),
        dataset_config=_CONFIGS.get(measure.task, "wikitext-2-raw-v1" if wikitext else None),
        dataset_name=measure.task,
        metric_type="perplexity" if measure.metric == "perplexity" else "accuracy",
        metric_name=words,
        metric_value=float(f"{record.value:.6g}"),
    )


def _slug(task: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in task.lower()).split()) or "unnamed"
