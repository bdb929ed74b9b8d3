"""Tiny models of every family in sizes that serving programs take, and what transformers answers with a checkpoint."""

import random
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_calibration import CALIBRATION
from tiny_models import ALL, VOCABULARY, Tiny, make_model
from transformers import AutoModelForCausalLM

from amprune import apply_plan, make_plan, score
from amprune.errors import MissingDependencyError
from amprune.model.source import open_source

HIDDEN_SIZE, HEAD_DIM = 192, 32  # attention kernels have no smaller head size
_LARGER = {
    "n_embd": HIDDEN_SIZE, "word_embed_proj_dim": HIDDEN_SIZE, "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM,
    "rotary_dim": HEAD_DIM // 2, "num_attention_heads": 6, "num_key_value_heads": 3,
}  # fmt: skip
NEW_TOKENS = 16
PROMPTS = [random.Random(length).choices(range(3, VOCABULARY), k=length) for length in (5, 11, 24)]


@dataclass(frozen=True)
class Answers:
    """Greedy tokens that follow each prompt, and the log-probability of every one of them."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


def servable(model_type: str, variant: str | None = None, **entries: Any) -> Tiny:
    """Returns a variant of a type, enlarged; if none is named, the one with grouped-query attention or the first."""
    variants = {tiny.variant: tiny for tiny in ALL if tiny.model_type == model_type}
    tiny = variants[variant] if variant else variants.get("gqa", next(iter(variants.values())))
    width = {} if "n_embd" in tiny.entries else {"hidden_size": HIDDEN_SIZE}
    larger = {name: size for name, size in _LARGER.items() if name in tiny.entries}
    return replace(tiny, entries={**tiny.entries, **width, **larger, **entries})


def save_dense(tiny: Tiny, folder: Path) -> Path:
    """Saves a model whose answers hang on every layer: large weights, and embeddings that do not drown them."""
    model = make_model(tiny)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
        embeddings = model.get_input_embeddings()
        embeddings.weight.div_(5 * getattr(embeddings, "scalar_embed_scale", 1))
    model.save_pretrained(folder)
    return folder


def save_pruned(dense: Path, out: Path, *, heads_ratio: float | None) -> Path:
    """Prunes three tenths of the neurons, and whole key-value groups where a share of the heads is given."""
    scores = score(dense, calibration=CALIBRATION, preset="paper")
    if heads_ratio is None:
        plan = make_plan(scores, only="neurons", neurons_ratio=0.3)
    else:
        plan = make_plan(scores, heads_mode="groups", heads_ratio=heads_ratio, neurons_ratio=0.3)
    before, after = plan.shape_before, plan.shape_after
    assert (after.num_key_value_heads < before.num_key_value_heads) == (heads_ratio is not None)
    assert after.intermediate_size < before.intermediate_size
    return apply_plan(dense, plan, out, scores=scores).folder


def smollm2_folder() -> Path:
    """Returns dense SmolLM2-135M; skips the test where its package is not installed."""
    try:
        return open_source("smollm2-135m").folder
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


def run_amprune(command: str, place: Path, *options: str) -> Path:
    """Runs an `amprune prune MODEL OUT ...` as the documents give it, with more options, and returns OUT."""
    _, *arguments = shlex.split(command)
    subprocess.run([sys.executable, "-m", "amprune", *arguments, *options], cwd=place, check=True, capture_output=True)
    return place / arguments[2]


@torch.inference_mode()
def transformers_answers(folder: Path, prompts: list[list[int]]) -> Answers:
    """Computes what stock transformers makes of a checkpoint in float32; no token ends an answer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens, logprobs = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        answer = whole[0, len(prompt) :]
        chosen = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, answer[:, None])
        tokens.append(answer.tolist())
        logprobs.append(chosen[:, 0].tolist())
    return Answers(tokens, logprobs)
