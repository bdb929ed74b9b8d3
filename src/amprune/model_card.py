"""The README.md of an output: front matter that the hub understands, how the model was made, its results and limits."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from amprune import __version__
from amprune.checkpoint import RECORDS, Source
from amprune.plan import PruningPlan
from amprune.verification import VerificationReport

CARD = "README.md"
FRONT: dict[str, object] = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["pruned", "amprune"],
}
"""Front matter of every card."""
_MARKER = "<!-- amprune model card, renewed by `amprune report`; remove this line to keep your own: "
_FRONT = re.compile(r"---\n(.*?)\n---\s*\n", flags=re.DOTALL)
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
    return CardHead(_carried(text), dense if isinstance(dense, str) else None, foreign=marker is None)


def card_text(
    plan: PruningPlan,
    *,
    dense: str,
    front: Mapping[str, object],
    records: Sequence[str],
    logit_difference: float | None,
    results: str = "",
    limits: Sequence[str] = (),
) -> str:
    """Returns the whole card of a pruned model.

    Args:
        plan: by which the model was pruned.
        dense: what the dense model is called.
        front: YAML front matter.
        records: names of the files in the folder `amprune/`.
        logit_difference: what the verification found; None where there was none.
        results: Markdown.
        limits: plain sentences beside those that hold for every pruned model.
    """
    name = json.dumps(dense, ensure_ascii=False).replace(">", "\\u003e")
    rows = "\n".join(f"| {' | '.join(row)} |" for row in size_rows(plan))
    sentences = "\n".join(f"- {escaped(sentence)}" for sentence in how_it_was_made(plan, logit_difference))
    middle = f"{results.strip()}\n\n" if results.strip() else ""
    more = "".join(f"- {escaped(limit)}\n" for limit in limits)
    header = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    return f"""---
{header}---

{_MARKER}{name} -->

# {escaped(dense)}, {100 * plan.ratio_actual:.1f} % pruned

Made from {escaped(dense)} by structured pruning with amprune {__version__}: {removal(plan)}, by the criterion of
[AMP](https://arxiv.org/abs/2504.21174). It is an ordinary checkpoint.

| | dense | pruned |
|---|--:|--:|
{rows}

{sentences}
- `{RECORDS}/` holds how it was made: {", ".join(sorted(records))}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

{middle}## Limits

Pruned without any training after it: quality is below that of the dense model and should be measured before use.
Everything that the dense model's card says of its risks and licence holds here too.
{chr(10) + more if more else ""}"""


def removal(plan: PruningPlan) -> str:
    """Says which units were removed, and by which rule."""
    before, after = plan.shape_before, plan.shape_after
    removed = ["attention heads"] if after.num_attention_heads < before.num_attention_heads else []
    removed += ["MLP neurons"] if after.intermediate_size < before.intermediate_size else []
    order = plan.provenance.get("options", {}).get("order", "amp")
    rule = _RULES.get(order, str(order))
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
    return tuple((what, f"{getattr(before, name):,}", f"{getattr(after, name):,}") for what, name in names.items())


def how_it_was_made(plan: PruningPlan, logit_difference: float | None) -> tuple[str, ...]:
    """Returns a sentence on the scores and one on the proof."""
    made = plan.provenance
    calibration: Mapping[str, Any] = made.get("calibration") or {}
    scored = (
        f"Scored by the criterion {made.get('criterion')} on {calibration.get('samples')} samples "
        f"({calibration.get('tokens')} tokens) of the calibration set {calibration.get('name')}."
    )
    if logit_difference is None:
        return (scored,)
    return (
        scored,
        "Verified: its logits equal those of the dense model with the removed units masked (largest difference "
        f"{f'{logit_difference:.1e}' if logit_difference else '0'} of their standard deviation, in float64).",
    )


def escaped(text: str) -> str:
    """Returns text in which Markdown finds no markup."""
    text = re.sub(r"&(?=[#\w]+;)", "&amp;", re.sub(r"\s+", " ", text))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _front_matter(source: Source) -> dict[str, object]:
    front = dict(FRONT)
    card = source.folder / CARD
    carried = _carried(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else {}
    if source.license is not None:
        front["license"] = source.license
    front |= {key: carried[key] for key in ("license", "license_name", "license_link", "language") if key in carried}
    if source.base_model is not None:
        front["base_model"] = [source.base_model]
    return front


def _carried(text: str) -> dict[str, object]:
    match = _FRONT.match(text)
    try:
        content = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
