"""The demonstration: a dense and a pruned model side by side, by their answers and by their perplexity."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amprune.evaluation.perplexity import window_loss
from amprune.model.loading import load_tokenizer, loaded_model
from amprune.model.source import open_source
from amprune.running import Progress, no_progress
from amprune.text.calibration import load_calibration

MODEL = "smollm2-135m"
QUESTIONS = ("What is the capital of France?", "Describe a forest.")
TOKENS = 4096
"""Of the calibration set: fewer than by default, so that the demonstration stays short."""
SEEN, READ = 2 * TOKENS, 4096
"""Perplexity is that of so many tokens of the same set, behind the first ones, of which the pruning drew."""
_PARAGRAPH = 60


@dataclass(frozen=True)
class Shown:
    """What a model does."""

    answers: tuple[str, ...]
    """To `QUESTIONS`, greedy."""
    perplexity: float


def shown(pruned: Path, *, progress: Progress = no_progress) -> tuple[Shown, Shown]:
    """Returns what the dense and the pruned model do."""
    with progress("Asking", 2) as advance:
        found = []
        for folder in (open_source(MODEL).folder, pruned):
            found.append(_shown(folder))
            advance(1)
    return found[0], found[1]


def _shown(folder: Path) -> Shown:
    tokenizer = load_tokenizer(folder)
    with loaded_model(folder, device="cpu") as model, torch.inference_mode():
        answers = tuple(_answer(model, tokenizer, question) for question in QUESTIONS)
        return Shown(answers, _perplexity(model, tokenizer))


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        **inputs, max_new_tokens=_PARAGRAPH, do_sample=False, no_repeat_ngram_size=3,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text = str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    ended = int(output[0, -1]) == tokenizer.eos_token_id or len(output[0]) - inputs["input_ids"].shape[1] < _PARAGRAPH
    return text if ended else f"{text} ..."


def _perplexity(model: Any, tokenizer: Any) -> float:
    """Returns that of texts of the set `mixed` that the pruning has not drawn: it draws the same, in the same order."""
    drawn = load_calibration("mixed", tokenizer, tokens=SEEN + READ, max_length=1024).samples
    before, total, count = 0, 0.0, 0
    for sample in drawn:
        if (before := before + len(sample)) > SEEN:
            total += window_loss(model, torch.tensor([sample])) * (len(sample) - 1)
            count += len(sample) - 1
    return math.exp(total / count)
