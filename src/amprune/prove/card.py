"""The README.md of an output: front matter that the hub understands, how the model was made, its results and limits."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from amprune import __version__
from amprune.model.files import read_front_matter
from amprune.model.quantization import Quantization, is_quantized, quantization_sentences, read_quantization
from amprune.model.recovered import Recovery, data_sentence, is_recovered, read_recovery, training_sentences
from amprune.model.source import Source
from amprune.model.writer import RECORDS
from amprune.plan.artefact import PruningPlan
from amprune.records import read_object

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


@dataclass(frozen=True)
class Made:
    """What was done to a model, as its records say; None where it was not done."""

    plan: PruningPlan | None = None
    recovery: Recovery | None = None
    quantization: Quantization | None = None
    logit_difference: float | None = None
    """What the verification found."""

    @property
    def stages(self) -> int:
        """Returns how many of pruning, training and quantising the model went through."""
        return sum(stage is not None for stage in (self.plan, self.recovery, self.quantization))


@dataclass(frozen=True)
class Results:
    """What a report adds to a card."""

    text: str = ""
    """Markdown."""
    measured: bool = False
    """Whether the results tell of the model's quality."""
    limits: tuple[str, ...] = ()
    """Plain sentences beside those that hold for every such model."""
    front: Mapping[str, object] = field(default_factory=dict)
    """Front matter where the card has none of its own."""
    index: list[dict[str, Any]] = field(default_factory=list)
    """The results as front matter: the hub's `model-index`."""


def read_made(folder: Path) -> Made:
    """Reads what was done to a model from its folder `amprune/`; raises an error where a record is damaged."""
    records = folder / RECORDS
    verified = records / "verification.json"
    return Made(
        PruningPlan.load(records / "plan.json") if (records / "plan.json").is_file() else None,
        read_recovery(folder) if is_recovered(folder) else None,
        read_quantization(folder) if is_quantized(folder) else None,
        logit_difference(read_object(verified)) if verified.is_file() else None,
    )


def logit_difference(verification: Mapping[str, Any] | None) -> float | None:
    """Returns what a verification found, where there was one and logits were compared."""
    found = (verification or {}).get("logit_difference")
    return float(found) if isinstance(found, int | float) else None


def write_card(folder: Path, *, source: Source) -> None:
    """Writes the `README.md` of a model that was pruned, trained or quantised.

    Args:
        folder: where the records are already; the last stage among them is what was done to `source`.
        source: what the model was made from; what its card says of licence, languages and origin is carried over.

    Raises:
        AmpruneError: a record is damaged.
    """
    made, head = read_made(folder), read_card(source.folder)
    front = _front_matter(source, made, head)
    base = front.get("base_model")
    dense = head.dense or (str(base[0]) if isinstance(base, list) and base else "the dense model")
    if made.stages == 1:  # nothing was done to the source
        dense = source.name
    text = _card_text(made, dense=dense, front=front, records=_names(folder))
    (folder / CARD).write_text(text, encoding="utf-8")


def renewed_card(
    folder: Path, made: Made, results: Results, *, dense: str, records: Collection[str] = ()
) -> str | None:
    """Returns the text of `README.md` with the results; None where someone else wrote the file.

    `dense` names the dense model where the card does not, `records` are files that the folder `amprune/` will have.
    """
    head = read_card(folder)
    if head.foreign or not made.stages:
        return None
    own = {name: value for name, value in head.front.items() if name != "model-index"}
    front = {**FRONT, "tags": _tags(made), **own}
    front |= {name: value for name, value in results.front.items() if name not in front}
    if results.index:
        front["model-index"] = results.index
    names = {*_names(folder), *records}
    return _card_text(made, dense=head.dense or dense, front=front, records=names, results=results)


def _names(folder: Path) -> set[str]:
    return {path.name for path in (folder / RECORDS).iterdir() if not path.name.startswith(".")}


def read_card(folder: Path) -> CardHead:
    """Reads the front matter of a folder's `README.md` and whether amprune wrote it."""
    file = folder / CARD
    if not file.is_file():
        return CardHead()
    text = file.read_text(encoding="utf-8", errors="replace")
    marker = re.search(rf"^{re.escape(_MARKER)}(.*) -->$", text, flags=re.MULTILINE)
    try:
        dense = json.loads(marker[1]) if marker else None
    except (ValueError, RecursionError):
        dense = None
    return CardHead(read_front_matter(file), dense if isinstance(dense, str) else None, foreign=marker is None)


def _card_text(
    made: Made, *, dense: str, front: Mapping[str, object], records: Collection[str], results: Results | None = None
) -> str:
    """Returns the whole card: how the model was made, its results and its limits."""
    results = results or Results()
    plan, recovery, quantization = made.plan, made.recovery, made.quantization
    name = json.dumps(dense, ensure_ascii=False).replace(">", "\\u003e")
    said = (
        *(() if plan is None else how_it_was_made(plan, made.logit_difference)),
        *(() if recovery is None else training_sentences(recovery)),
        *(() if quantization is None else quantization_sentences(quantization)),
    )
    sentences = "\n".join(f"- {escaped(sentence)}" for sentence in said)
    middle = f"{results.text.strip()}\n\n" if results.text.strip() else ""
    more = "".join(f"- {escaped(limit)}\n" for limit in results.limits)
    header = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"""---
{header}---

{_MARKER}{name} -->

{_opening(made, dense)}
{sentences}
- `{RECORDS}/` holds how it was made: {", ".join(sorted(records))}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

{middle}## Limits

{escaped(_caution(made, measured=results.measured))}
Everything that the dense model's card says of its risks and licence holds here too.
{chr(10) + more if more else ""}"""


def _opening(made: Made, dense: str) -> str:
    """Returns the title, what was done, and the sizes before and after."""
    plan, recovered, quantization = made.plan, made.recovery is not None, made.quantization
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


def _caution(made: Made, *, measured: bool) -> str:
    plan, recovery, quantized = made.plan, made.recovery, made.quantization is not None
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


def _front_matter(source: Source, made: Made, head: CardHead) -> dict[str, object]:
    """Carries front matter over: of a card by amprune everything but the results, of another what surely holds."""
    front, carried = dict(FRONT), head.front
    if source.license is not None:
        front["license"] = source.license
    front |= {key: carried[key] for key in ("license", "license_name", "license_link", "language") if key in carried}
    if source.base_model is not None:
        front["base_model"] = [source.base_model]
    elif head.dense is not None and "base_model" in carried:
        front["base_model"] = carried["base_model"]
    if made.recovery is None and made.quantization is None:  # the source is no output of amprune
        return front
    if head.dense is not None:
        front |= {key: value for key, value in carried.items() if key != "model-index"}
    if made.plan is not None and "base_model" in carried:
        front["base_model"] = carried["base_model"]
    kept = front["tags"] if head.dense is not None and isinstance(front["tags"], list) else []
    front["tags"] = list(dict.fromkeys([*map(str, kept), *_tags(made)]))
    return front


def _tags(made: Made) -> list[str]:
    tags = [*(["pruned"] if made.plan is not None else []), "amprune"]
    tags += ["recovered"] if made.recovery is not None else []
    if made.quantization is not None:
        tags += ["quantized", made.quantization.type, made.quantization.library]
    return tags
