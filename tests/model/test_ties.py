"""Tied and separate heads, as config.json and the files may say it: one count of parameters everywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import find, make_model
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

from amprune import evaluate, inspect, prune
from amprune.errors import CheckpointError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]
STORED: dict[str, Callable[[Tensors], Tensors]] = {
    "own head": lambda stored: stored,
    "the embeddings again": lambda stored: {**stored, HEAD: stored[EMBEDDINGS].clone()},
    "no head": lambda stored: {name: tensor for name, tensor in stored.items() if name != HEAD},
    "no embeddings": lambda stored: {name: tensor for name, tensor in stored.items() if name != EMBEDDINGS},
}


def model_in(folder: Path, tied: bool | None, change: Callable[[Tensors], Tensors]) -> Path:
    make_model(find("llama-gqa")).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    config |= {} if tied is None else {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def evaluated(folder: Path, file: Path) -> float:
    records = evaluate(str(folder), file, measure=[]).records.values()
    return next(record.value for record in records if record.metric == "parameters")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tied", [True, False, None])
def test_every_variant_counts_as_transformers_counts(tied: bool | None, stored: str, tmp_path: Path) -> None:
    folder = model_in(tmp_path / "model", tied, STORED[stored])
    if not tied and stored in ("no head", "no embeddings"):
        with pytest.raises(CheckpointError, match="the weights lack 1 of the 21 tensors"):
            inspect(folder)
        return
    expected = stock(folder).num_parameters()
    assert inspect(folder).shape.parameters == expected
    assert evaluated(folder, tmp_path / "e.json") == expected
    options: Any = {"preset": "paper", "calibration": ["Red, green and blue."], "samples": 1}
    done = prune(folder, tmp_path / "out", ratio=0.2, **options)
    pruned = stock(tmp_path / "out")
    assert done.plan.shape_before.parameters == expected
    assert (
        done.plan.shape_after.parameters == pruned.num_parameters() == evaluated(tmp_path / "out", tmp_path / "o.json")
    )
    apart = stored == "own head" or not tied
    assert torch.equal(pruned.lm_head.weight, pruned.model.embed_tokens.weight) == (stored != "own head")
    assert pruned.config.tie_word_embeddings != apart
