"""Calibration sets: named, seeded, hashed samples of token ids.

`alpaca` is the set of the paper, from the hub; `builtin` ships with the package; a path is the user's own text.
"""

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amprune.errors import CalibrationError
from amprune.texts import read_records, render


@dataclass(frozen=True)
class CalibrationSet:
    """Samples of token ids, in the order in which they were drawn."""

    name: str
    samples: tuple[tuple[int, ...], ...]
    seed: int | None = None
    max_length: int | None = None
    prompts_only: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens of all samples."""
        return sum(map(len, self.samples))

    @property
    def sha256(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(json.dumps(self.samples, separators=(",", ":")).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Returns what a score file records of the set."""
        return {
            "name": self.name,
            "samples": len(self.samples),
            "tokens": self.tokens,
            "seed": self.seed,
            "max_length": self.max_length,
            "prompts_only": self.prompts_only,
            "sha256": self.sha256,
        }


def load_calibration(
    source: str | os.PathLike[str] | Sequence[str],
    tokenizer: Any,
    *,
    samples: int = 50,
    max_length: int = 512,
    prompts_only: bool = False,
    seed: int = 0,
) -> CalibrationSet:
    """Draws a seeded random sample of a set and tokenises it.

    Args:
        source: `alpaca`, `builtin`, a .json, .jsonl, .parquet or .txt file, or a sequence of texts.
        tokenizer: the model's own, as transformers loads it.
        samples: how many to draw, without replacement.
        max_length: tokens kept of each sample.
        prompts_only: leave out the response, as the released code of the paper does.
        seed: of the draw.

    Raises:
        CalibrationError: the set cannot be read, is malformed, or holds fewer samples.
    """
    for name, value in (("samples", samples), ("max_length", max_length)):
        if value < 1:
            raise CalibrationError(f"{name} is {value}, expected at least 1")
    name, records = read_records(source)
    if len(records) < samples:
        smaller = f"--samples {len(records)} or " if records else ""
        raise CalibrationError(
            f"{name} holds {len(records)} samples, but {samples} were asked for; give {smaller}a larger set"
        )
    places = [(f"{name}, {where}", record) for where, record in random.Random(seed).sample(records, samples)]
    texts = [(where, _text(record, tokenizer, where, prompts_only=prompts_only)) for where, record in places]
    tokens = tuple(_encode(tokenizer, text, max_length, where) for where, text in texts)
    return CalibrationSet(name=name, samples=tokens, seed=seed, max_length=max_length, prompts_only=prompts_only)


def _text(record: Mapping[str, Any], tokenizer: Any, where: str, *, prompts_only: bool) -> tuple[str, bool]:
    """Returns a sample's text and whether special tokens are to be added."""
    found = render(record, tokenizer, where, prompts_only=prompts_only)
    if not prompts_only:
        return found.prompt + found.response, found.add_special_tokens
    if not found.prompt and "messages" in record:
        raise CalibrationError(f"{where}: prompts_only leaves nothing of messages that are one assistant turn")
    if not found.prompt:
        raise CalibrationError(f"{where}: prompts_only needs records with a prompt, but this one is plain text")
    return found.prompt, found.add_special_tokens


def _encode(tokenizer: Any, text: tuple[str, bool], max_length: int, where: str) -> tuple[int, ...]:
    """Tokenises one text; a chat template has put in its own special tokens."""
    content, special = text
    try:
        ids = tokenizer(content, add_special_tokens=special, truncation=True, max_length=max_length)["input_ids"]
    except Exception as error:  # tokenizers raise many types, for a lone surrogate for instance
        raise CalibrationError(f"{where}: the tokenizer refuses this sample: {error}") from error
    if not ids:
        raise CalibrationError(f"{where}: the tokenizer makes no token of this sample")
    return tuple(ids[:max_length])  # some tokenizers do not truncate to fewer than their special tokens
