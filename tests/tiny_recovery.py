"""Tiny models with a tokenizer, tiny sets and settings to train with, and losses computed by other means."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import Tiny, find, make_model
from tiny_tokenizer import make_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from amprune.recovery.run import RecoveredModel, recover
from amprune.settings import RecoverySettings, with_preset
from amprune.text.training import Sample, TrainingData, load_training_data

TOKENIZER = make_tokenizer()
SETTINGS = RecoverySettings(
    learning_rate=1e-2, lora_dropout=0.0, max_steps=4, gradient_accumulation=2, validation_share=0.0, save_steps=2,
    logging_steps=1, validation_steps=100,
)  # fmt: skip
"""Few steps, no chance, every step in the log."""
ANSWERS = (
    "Red.",
    "Green and blue.",
    "A fox, a dog and another dog.",
    "No.",
    "It jumps over the lazy dog.",
    "Yes: both.",
)


def save_tiny(
    folder: Path, tiny: str | Tiny = "llama-gqa", *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Saves a model with a tokenizer."""
    make_model(find(tiny) if isinstance(tiny, str) else tiny, dtype=dtype, seed=seed).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def save_chats(folder: Path, *, repeat: int = 1) -> Path:
    """Writes chats whose answers differ in length."""
    file = folder / "chats.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for number in range(repeat):
            for answer in ANSWERS:
                asked = {"role": "user", "content": f"{number}?"}
                record = {"messages": [asked, {"role": "assistant", "content": answer}]}
                stream.write(json.dumps(record) + "\n")
    return file


def settings(**changes: Any) -> RecoverySettings:
    return replace(SETTINGS, **changes)


def training_data(source: Any, tokenizer: Any, **options: Any) -> TrainingData:
    """Reads a set as `recover` does with these settings."""
    settled = with_preset(RecoverySettings(preset="paper", data=source, **options))
    return load_training_data(settled, tokenizer)


def train(model: Path, data: Any, out: Path, **changes: Any) -> RecoveredModel:
    """Recovers on the CPU; changes are those of the settings, and `progress`."""
    watch = {name: changes.pop(name) for name in ("progress",) if name in changes}
    result = recover(model, out, settings(**{"data": data, "device": "cpu", **changes}), **watch)
    assert result is not None
    return result


@torch.no_grad()
def plain_loss(model: Any, sample: Sample) -> tuple[float, int]:
    """Returns the sum of a sample's cross-entropies, computed one token at a time, and their number."""
    ids, labels = torch.tensor([sample["input_ids"]]), sample["labels"]
    logits = model(ids).logits[0].double()
    wanted = [(place, label) for place, label in enumerate(labels) if label != -100]
    assert all(place > 0 for place, _ in wanted)
    return sum(float(cross_entropy(logits[place - 1], torch.tensor(label))) for place, label in wanted), len(wanted)


def mean_loss(model: Any, samples: Any) -> float:
    """Returns the mean over all tokens with a label."""
    found = [plain_loss(model, sample) for sample in samples]
    return sum(total for total, _ in found) / sum(count for _, count in found)


def load(folder: Path) -> Any:
    """Loads a folder as a user would, holding that nothing is missing or unexpected."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the stored tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def losses(log: Any, name: str = "loss") -> list[tuple[int, float]]:
    """Returns the steps and values of one kind of loss."""
    return [(entry["step"], entry[name]) for entry in log if name in entry]
