"""What docs/serving.md says of vLLM: its commands and its table of model types."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
VLLM = PAGE[PAGE.index("## vLLM") :]
VLLM = VLLM[: match.start()] if (match := re.search(r"^## (?!vLLM)", VLLM, flags=re.MULTILINE)) else VLLM
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", VLLM, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
INSTALL, PRUNE, SERVE, ASK, PRUNE_TO_SPLIT = COMMANDS


@dataclass(frozen=True)
class Row:
    """Whose code computes these model types, and how each way of pruning is served: yes, no, -, or with an option."""

    model_types: tuple[str, ...]
    computed_by: str
    heads_and_neurons: str
    neurons: str


ROWS = [
    Row(tuple(types.split(", ")), *cells)
    for types, *cells in re.findall(r"^\| ([a-z][a-z0-9_, ]*) \| (.+?) \| (.+?) \| (.+?) \|$", VLLM, flags=re.MULTILINE)
    if types != "model types"
]


def row_of(model_type: str) -> Row:
    """Returns the row that tells of a model type."""
    (row,) = [row for row in ROWS if model_type in row.model_types]
    return row
