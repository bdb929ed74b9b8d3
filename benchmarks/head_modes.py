"""Perplexity of SmolLM2-135M by how the same budget is split between heads and neurons; no training.

    AMPRUNE_DATA_DIR=... python benchmarks/head_modes.py

Reads `wikitext2/wiki.valid.raw` (the first six windows of 2,048 tokens) and `alpaca/*.jsonl` below AMPRUNE_DATA_DIR.
"""

import math
import os
from pathlib import Path

import torch

import amprune
from amprune.model.loading import load_tokenizer, loaded_model
from amprune.model.reader import read_checkpoint
from amprune.model.source import open_source

WINDOWS, LENGTH = 6, 2048
DATA = Path(os.environ["AMPRUNE_DATA_DIR"])
SPLITS = {
    "default": {},
    "one group removed": {"heads_mode": "groups", "heads_ratio": 1 / 3},
    "one query head of each group removed": {"heads_mode": "within", "heads_ratio": 1 / 3},
    "default, random": {"order": "random"},
    "default, reversed": {"order": "reversed"},
}


def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Returns exp of the mean negative log-likelihood over windows without overlap."""
    total = 0.0
    for start in range(0, WINDOWS * LENGTH, LENGTH):
        window = ids[start : start + LENGTH]
        logits = model(window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (WINDOWS * (LENGTH - 1)))


@torch.inference_mode()
def main() -> None:
    """Prints one row for each calibration set, ratio and split."""
    checkpoint = read_checkpoint(open_source("smollm2-135m").folder)
    text = (DATA / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8")
    ids = load_tokenizer(checkpoint.folder)(text, return_tensors="pt")["input_ids"][0]
    alpaca = next((DATA / "alpaca").glob("*.jsonl"))
    with loaded_model(checkpoint.folder, device="cpu") as dense:
        print(f"dense {perplexity(dense, ids):.2f}")
        for calibration in ("builtin", alpaca):
            scores = amprune.score(checkpoint.folder, calibration=calibration, device="cpu")
            for ratio in (0.1, 0.2):
                for name, options in SPLITS.items():
                    plan = amprune.make_plan(scores, ratio=ratio, **options)
                    value, after = perplexity(amprune.prune_model(dense, plan), ids), plan.shape_after
                    shape = f"{after.num_attention_heads}/{after.num_key_value_heads}/{after.intermediate_size}"
                    print(f"{Path(calibration).stem} | {ratio} | {name} | {shape} | {value:.1f}", flush=True)


if __name__ == "__main__":
    main()
