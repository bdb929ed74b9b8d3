"""The README.md of an output: front matter that the hub understands, how the model was made, its results and limits."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from amprune import __version__
from amprune.model.files import read_front_matter
from amprune.model.quantization import Quantization, quantization_sentences
from amprune.model.recovered import Recovery, data_sentence, is_recovered, read_recovery, training_sentences
from amprune.model.source import Source
from amprune.model.writer import RECORDS
from amprune.plan.artefact import PruningPlan
from amprune.prove.checks import VerificationReport

CARD = "README.md"
FRONT: dict[str, object] = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["pruned", "amprune"],
}
"""Front matter of every card."""
_MARKER = "<!-- amprune model card, renewed by `amprune report`; remove this line to keep your own: "
_AMP = "[AMP](https://arxiv.org/abs/2504.21174)"
_RULES = {"amp": "least important", "reversed": "most important", "random": "randomly drawn"}


@dataclass(frozen=True)
class CardHead:
    """What a README.md says in front of its text."""

    front: dict[str, object] = field(default_factory=dict)
    dense: str | None = None
    """What the dense model is called; None where amprune did not write the file."""
    foreign: bool = False
    """Whether someone else wrote the file."""


def write_model_card(folder: Path, plan: PruningPlan, report: VerificationReport, *, source: Source) -> None:
    """Writes `README.md`; the licence is carried over from the source's own card."""
    text = card_text(
        plan,
        dense=source.name,
        front=_front_matter(source),
        records=[path.name for path in (folder / RECORDS).iterdir()],
        logit_difference=report.logit_difference,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def write_recovered_card(folder: Path, *, source: Source) -> None:
    """Writes the `README.md` of a model that was trained: the card of what it was trained from, and the training.

    Args:
        folder: where the records are already; a plan among them says that the model was pruned.
        source: what was trained; the front matter of its card is carried over.

    Raises:
        RecoveryError: the record is damaged.
    """
    recovery = read_recovery(folder)
    head, plan = read_card(source.folder), _plan(folder)
    front = _grown_front(head, source, "recovered", pruned=plan is not None)
    text = card_text(
        plan,
        dense=recovery.source if plan is None else _dense(head, front),
        front=front,
        records=[path.name for path in (folder / RECORDS).iterdir()],
        recovery=recovery,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def write_quantized_card(folder: Path, record: Quantization, *, source: Source) -> None:
    """Writes the `README.md` of a model that was quantised: the card of what it was made from, and the quantising.

    Args:
        folder: where the records are already; a plan and a training among them are told as well.
        record: the content of `quantization.json`.
        source: what was quantised; the front matter of its card is carried over.

    Raises:
        RecoveryError: the record of the training is damaged.
    """
    head, plan = read_card(source.folder), _plan(folder)
    recovery = read_recovery(folder) if is_recovered(folder) else None
    front = _grown_front(head, source, "quantized", record.type, record.library, pruned=plan is not None)
    text = card_text(
        plan,
        dense=source.name if plan is None and recovery is None else _dense(head, front),
        front=front,
        records=[path.name for path in (folder / RECORDS).iterdir()],
        recovery=recovery,
        quantization=record,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _plan(folder: Path) -> PruningPlan | None:
    file = folder / RECORDS / "plan.json"
    return PruningPlan.load(file) if file.is_file() else None


def _dense(head: CardHead, front: Mapping[str, object]) -> str:
    base = front.get("base_model")
    return head.dense or (str(base[0]) if isinstance(base, list) and base else None) or "the dense model"


def read_card(folder: Path) -> CardHead:
    """Reads the front matter of a folder's `README.md` and whether amprune wrote it."""
    file = folder / CARD
    if not file.is_file():
        return CardHead()
    text = file.read_text(encoding="utf-8", errors="replace")
    marker = re.search(rf"^{re.escape(_MARKER)}(.*) -->$", text, flags=re.MULTILINE)
    try:
        dense = json.loads(marker[1]) if marker else None
    except ValueError:
        dense = None
    return CardHead(read_front_matter(file), dense if isinstance(dense, str) else None, foreign=marker is None)


def card_text(
    plan: PruningPlan | None,
    *,
    dense: str,
    front: Mapping[str, object],
    records: Sequence[str],
    logit_difference: float | None = None,
    recovery: Recovery | None = None,
    quantization: Quantization | None = None,
    results: str = "",
    measured: bool = False,
    limits: Sequence[str] = (),
) -> str:
    """Returns the whole card of a pruned, trained or quantised model.

    Args:
        plan: by which the model was pruned; None of a dense model that was trained or quantised.
        dense: what the dense model is called.
        front: YAML front matter.
        records: names of the files in the folder `amprune/`.
        logit_difference: what the verification found; None where there was none.
        recovery: how the model was trained; None where it was not.
        quantization: how the model was quantised; None where it was not.
        results: Markdown.
        measured: whether the results tell of the model's quality.
        limits: plain sentences beside those that hold for every such model.
    """
    name = json.dumps(dense, ensure_ascii=False).replace(">", "\\u003e")
    made = () if plan is None else how_it_was_made(plan, logit_difference)
    trained = () if recovery is None else training_sentences(recovery)
    packed = () if quantization is None else quantization_sentences(quantization)
    sentences = "\n".join(f"- {escaped(sentence)}" for sentence in (*made, *trained, *packed))
    middle = f"{results.strip()}\n\n" if results.strip() else ""
    more = "".join(f"- {escaped(limit)}\n" for limit in limits)
    header = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"""---
{header}---

{_MARKER}{name} -->

{_opening(plan, dense, recovered=recovery is not None, quantization=quantization)}
{sentences}
- `{RECORDS}/` holds how it was made: {", ".join(sorted(records))}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

{middle}## Limits

{escaped(_caution(plan, recovery, measured=measured, quantized=quantization is not None))}
Everything that the dense model's card says of its risks and licence holds here too.
{chr(10) + more if more else ""}"""


def _opening(plan: PruningPlan | None, dense: str, *, recovered: bool, quantization: Quantization | None) -> str:
    """Returns the title, what was done, and the sizes before and after."""
    by = f"with amprune {__version__}"
    title = f", quantised to {quantization.type}" if quantization is not None else ""
    ordinary = " It is an ordinary checkpoint."
    if quantization is not None:
        ordinary = f" Its weights were quantised to {quantization.type}; stock transformers loads it."
    if plan is None:
        how = f"training {by}" if recovered else f"quantising it {by}"
        trained = ", trained" if recovered else ""
        return f"""# {escaped(dense)}{trained}{title}

Made from {escaped(dense)} by {how}; nothing was removed.{ordinary}
"""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in size_rows(plan))
    return f"""# {escaped(dense)}, {100 * plan.ratio_actual:.1f} % pruned{" and recovered" if recovered else ""}{title}

Made from {escaped(dense)} by structured pruning {by}: {removal(plan)}, {_by(plan)}.\
{" It was then trained to recover." if recovered else ""}{ordinary}

| | dense | pruned |
|---|--:|--:|
{rows}
"""


def _caution(plan: PruningPlan | None, recovery: Recovery | None, *, measured: bool, quantized: bool) -> str:
    if recovery is None:
        done = "Quantised" if plan is None else "Pruned without any training after it"
        also = ", and then quantised" if quantized and plan is not None else ""
        return f"{done}{also}: quality is below that of the dense model and should be measured before use."
    what = "Trained" if plan is None else "Trained after pruning"
    if measured:
        told = "the results above tell of its quality on what was measured, and of nothing else."
    elif quantized:
        told = "quantised after that, its quality is not known and should be measured before use."
    else:
        told = "the validation loss is all that is known of its quality, which should be measured before use."
    return f"{what}: {told} {data_sentence(recovery)}"


def _by(plan: PruningPlan) -> str:
    """Names the criterion, in Markdown."""
    name = criterion(plan)
    return f"by the criterion {escaped(name)}" if name != "amp" else "by the criterion of\n" + _AMP


def criterion(plan: PruningPlan) -> str:
    """Returns what the units were ranked by."""
    return str(plan.provenance.get("criterion") or "amp")


def ranked(plan: PruningPlan) -> str:
    """Returns which units went: those of the lowest score (amp), of the highest (reversed), or random ones."""
    order, name = str(plan.options.get("order", "amp")), criterion(plan)
    return name if order == "amp" and name in _RULES else order


def removal(plan: PruningPlan) -> str:
    """Says which units were removed, and by which rule."""
    before, after, order = plan.shape_before, plan.shape_after, ranked(plan)
    rule = _RULES.get(order, order)
    removed = ["attention heads"] if after.num_attention_heads < before.num_attention_heads else []
    removed += ["MLP neurons"] if after.intermediate_size < before.intermediate_size else []
    if gone := sorted(set(range(len(plan.layers))).difference(plan.kept_layers)):
        which = f"{', '.join(map(str, gone))} of 0 to {before.num_layers - 1}"
        more = f", and {' and '.join(removed)} of the others" if removed else ""
        return f"{len(gone)} of {before.num_layers} decoder blocks were removed, the {rule} ({which}){more}"
    return f"the {rule} {' and '.join(removed) or 'units'} were removed, as many from every layer"


def size_rows(plan: PruningPlan) -> tuple[tuple[str, str, str], ...]:
    """Returns the sizes of the dense and of the pruned model: what, before, after."""
    before, after = plan.shape_before, plan.shape_after
    names = {
        "parameters": "parameters",
        "query heads per layer": "num_attention_heads",
        "key-value heads per layer": "num_key_value_heads",
        "neurons per layer": "intermediate_size",
    }
    if before.num_layers != after.num_layers:
        names["decoder blocks"] = "num_layers"
    return tuple((what, f"{getattr(before, name):,}", f"{getattr(after, name):,}") for what, name in names.items())


def how_it_was_made(plan: PruningPlan, logit_difference: float | None) -> tuple[str, ...]:
    """Returns a sentence on the scores, one on compensated biases, where there are, and one on the proof."""
    calibration: Mapping[str, Any] = plan.provenance.get("calibration") or {}
    on = (
        f" on {calibration.get('samples')} samples ({calibration.get('tokens')} tokens) of the calibration set "
        f"{calibration.get('name')}"
    )
    said = [f"Scored by the criterion {criterion(plan)}{on if calibration else ', without a calibration set'}."]
    if plan.compensated:
        said.append("Biases of the output projections make up for the mean of what was removed (arXiv 2312.11983).")
    if plan.refitted:
        said.append(
            "The kept weights of the output projections were refitted in closed form, layer by layer, on that set, so "
            "that each layer gives what it gave before; nothing was trained."
        )
    if logit_difference is not None:
        masked = "removed units masked" if len(plan.kept_layers) == len(plan.layers) else "removed blocks skipped"
        biased = " and the same biases" if plan.compensated else ""
        biased = " and the same output projections" if plan.refitted else biased
        said.append(
            f"Verified: its logits equal those of the dense model with the {masked}{biased} (largest difference "
            f"{f'{logit_difference:.1e}' if logit_difference else '0'} of their standard deviation, in float64)."
        )
    return tuple(said)


def escaped(text: str) -> str:
    """Returns text in which Markdown finds no markup."""
    text = re.sub(r"&(?=[#\w]+;)", "&amp;", re.sub(r"\s+", " ", text))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _front_matter(source: Source) -> dict[str, object]:
    front = dict(FRONT)
    carried = read_front_matter(source.folder / CARD)
    if source.license is not None:
        front["license"] = source.license
    front |= {key: carried[key] for key in ("license", "license_name", "license_link", "language") if key in carried}
    if source.base_model is not None:
        front["base_model"] = [source.base_model]
    return front


def _grown_front(head: CardHead, source: Source, *tags: str, pruned: bool) -> dict[str, object]:
    """Carries front matter over: of a card by amprune everything but the results, of another what surely holds.

    `tags` are added: what was done to the model of the card.
    """
    front = _front_matter(source)
    ours = head.dense is not None
    if ours:
        front |= {key: value for key, value in head.front.items() if key != "model-index"}
    if pruned and "base_model" in head.front:
        front["base_model"] = head.front["base_model"]
    known = front.get("tags")
    kept = [str(tag) for tag in known] if isinstance(known, list) else []
    first = ["pruned", "amprune"] if pruned else ["amprune"]
    front["tags"] = list(dict.fromkeys([*(kept if ours else first), *tags]))
    return front
