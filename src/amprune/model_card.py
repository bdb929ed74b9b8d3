"""The README.md of an output: front matter that the hub understands, how the model was made, its limits."""

import re
from pathlib import Path

import yaml

from amprune import __version__
from amprune.checkpoint import RECORDS, Source
from amprune.plan import PruningPlan
from amprune.verification import VerificationReport


def write_model_card(folder: Path, plan: PruningPlan, report: VerificationReport, *, source: Source) -> None:
    """Writes `README.md`; the licence is carried over from the source's own card."""
    before, after, made = plan.shape_before, plan.shape_after, plan.provenance
    removed = ["attention heads"] if after.num_attention_heads < before.num_attention_heads else []
    removed += ["MLP neurons"] if after.intermediate_size < before.intermediate_size else []
    calibration = made.get("calibration") or {}
    order = made.get("options", {}).get("order", "amp")
    rule = {"amp": "least important", "reversed": "most important", "random": "randomly drawn"}.get(order, order)
    records = ", ".join(sorted(path.name for path in (folder / RECORDS).iterdir()))
    text = f"""# {source.name}, {plan.ratio_actual:.1%} pruned

Made from {source.name} by structured pruning with amprune {__version__}: the {rule} {" and ".join(removed)} were
removed, as many from every layer, by the criterion of [AMP](https://arxiv.org/abs/2504.21174). It is an ordinary
checkpoint.

| | dense | pruned |
|---|---|---|
| parameters | {before.parameters:,} | {after.parameters:,} |
| query heads per layer | {before.num_attention_heads} | {after.num_attention_heads} |
| key-value heads per layer | {before.num_key_value_heads} | {after.num_key_value_heads} |
| neurons per layer | {before.intermediate_size:,} | {after.intermediate_size:,} |

- Scored by the criterion `{made.get("criterion")}` on {calibration.get("samples")} samples
  ({calibration.get("tokens")} tokens) of the calibration set {calibration.get("name")}.
- Verified: its logits equal those of the dense model with the removed units masked (largest difference
  {report.logit_difference:.1e} of their standard deviation, in float64).
- `{RECORDS}/` holds how it was made: {records}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")
```

## Limits

Pruned without any training after it: quality is below that of the dense model and should be measured before use.
Everything that the dense model's card says of its risks and licence holds here too.
"""
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(_front_matter(source), sort_keys=False)}---\n\n{text}", encoding="utf-8"
    )


def _front_matter(source: Source) -> dict[str, object]:
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["pruned", "amprune"]
    carried = _carried(source.folder / "README.md")
    if source.license is not None:
        front["license"] = source.license
    front |= {key: carried[key] for key in ("license", "license_name", "license_link", "language") if key in carried}
    if source.base_model is not None:
        front["base_model"] = [source.base_model]
    return front


def _carried(card: Path) -> dict[str, object]:
    if not card.is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    try:
        content = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}
