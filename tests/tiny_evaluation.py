"""What tests measure: tiny checkpoints with a tokenizer, a short text, settings that take no time."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, find, make_model, save_model
from tiny_tokenizer import make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from amprune.evaluation.data import TASK_FILES
from amprune.model.latency import LatencySettings

DATA_DIR = Path(os.environ.get("AMPRUNE_DATA_DIR", "no-data"))
needs_data = pytest.mark.skipif(
    not DATA_DIR.is_dir(), reason="AMPRUNE_DATA_DIR names no folder with WikiText-2 and the tasks"
)

QUICK: dict[str, Any] = {
    "sequence_length": 32,
    "limit": 3,
    "latency": [LatencySettings(new_tokens=4, warmup=1, runs=2)],
}
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind. ",
    "Red, green and blue are three colours; write a response that completes the request! ",
    "Below is an instruction: name 12 tasks, of which 7 are hard.\n",
)


def tiny(identifier: str = "llama-gqa", **entries: Any) -> Tiny:
    """Returns a variant with as many positions as the harness's questions have tiny tokens."""
    found = find(identifier)
    return replace(found, entries={**found.entries, "max_position_embeddings": 1024, **entries})


def tiny_model(identifier: str = "llama-gqa", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Builds a model of a variant."""
    return make_model(tiny(identifier), dtype=dtype, seed=seed)


def checkpoint(folder: Path, identifier: str = "llama-gqa", *, tokenizer: bool = True, **options: Any) -> Path:
    """Saves a variant as a checkpoint with its tokenizer."""
    save_model(tiny(identifier), folder, **options)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def foreign_checkpoint(folder: Path, model_type: str, **entries: Any) -> Path:
    """Saves a model of a family that amprune does not prune."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](vocab_size=160, **entries))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def text_file(path: Path, sentences: int = 18) -> Path:
    """Writes a text of about 40 tiny tokens a sentence, no two stretches of which are alike."""
    lines = (f"{number}. {_SENTENCES[number % 3]}" for number in range(sentences))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def task_folder(folder: Path) -> Path:
    """Writes a data folder with WinoGrande alone, as many rows as the real file has, no two alike."""
    (folder / "tasks").mkdir()
    rows = (
        {"sentence": f"The _ of {number} is red.", "option1": "fox", "option2": "dog", "answer": "12"[number % 2]}
        for number in range(TASK_FILES["winogrande"].rows)
    )
    file = folder / "tasks" / TASK_FILES["winogrande"].file
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder
