"""The demonstration: one question to the dense and to the pruned model."""

from pathlib import Path
from typing import Any

import torch

from amprune.model.loading import load_tokenizer, loaded_model
from amprune.model.source import open_source
from amprune.running import Progress, no_progress

MODEL = "smollm2-135m"
QUESTION = "Describe a forest."
TOKENS = 4096
"""Of the calibration set: fewer than by default, so that the demonstration stays short."""


def answers(pruned: Path, *, question: str = QUESTION, progress: Progress = no_progress) -> tuple[str, str]:
    """Returns the greedy answers of the dense and of the pruned model."""
    with progress("Answering", 2) as advance:
        replies = []
        for folder in (open_source(MODEL).folder, pruned):
            replies.append(_answer(folder, question))
            advance(1)
    return replies[0], replies[1]


def _answer(folder: Path, question: str) -> str:
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with loaded_model(folder, device="cpu") as model, torch.inference_mode():
        generate: Any = model.generate
        output = generate(
            **inputs, max_new_tokens=48, do_sample=False, no_repeat_ngram_size=3, pad_token_id=tokenizer.pad_token_id
        )
    return str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
