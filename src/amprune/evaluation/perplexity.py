"""Perplexity by SliceGPT's procedure, which the paper follows (section IV-A): windows without overlap over one text."""

import hashlib
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from amprune.errors import EvaluationError
from amprune.evaluation.comparison import standard_error
from amprune.evaluation.data import Text
from amprune.evaluation.guards import memory_told
from amprune.evaluation.records import Record
from amprune.model.architecture import quiet_transformers
from amprune.model.latency import dtype_of
from amprune.model.loading import input_device, vocabulary_size
from amprune.running import Progress, no_progress
from amprune.settings import EvaluationSettings

_CHUNK = 512
_LARGEST_LOSS = 700.0  # exp of more than 709 is no float


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text."""

    value: float
    standard_error: float | None
    """Over windows, by the delta method: perplexity times the standard error of the windows' mean loss."""
    losses: tuple[float, ...]
    """Mean negative log-likelihood of each window, in nats a token."""
    tokens: int
    """In the whole text; the last, incomplete window is left out."""
    predicted: int
    """Tokens that the mean runs over: one fewer than its length in every window."""
    tokens_hash: str
    """Of the token ids of the measured windows."""


def perplexity_records(
    model: PreTrainedModel, tokenizer: Any, text: Text, asked: EvaluationSettings, progress: Progress
) -> list[Record]:
    """Perplexity of one text."""
    length = asked.sequence_length
    found = measure_perplexity(model, tokenizer, text, sequence_length=length, limit=asked.windows, progress=progress)
    data = {"name": text.name, "sha256": text.sha256, "tokens": found.tokens, "predicted": found.predicted}
    return [
        Record(
            measurement="perplexity", task=text.name, metric="perplexity", value=found.value, unit="perplexity",
            n=len(found.losses), standard_error=found.standard_error, items=found.losses, items_hash=found.tokens_hash,
            settings={"sequence_length": length, "windows": asked.windows, "dtype": dtype_of(model)}, data=data,
        )
    ]  # fmt: skip


def check_windows(positions: int | None, sequence_length: int, limit: int | None) -> None:
    """Raises EvaluationError for windows that are none, or that do not fit a model's positions."""
    if sequence_length < 2:
        raise EvaluationError(f"the sequence length is {sequence_length}, expected 2 or more")
    if limit is not None and limit < 1:
        raise EvaluationError(f"the number of windows is {limit}, expected 1 or more")
    if positions is not None and sequence_length > positions:
        raise EvaluationError(
            f"windows of {sequence_length:,} tokens do not fit the model's {positions:,} positions; give "
            f"--sequence-length {positions} or less"
        )


def windows_of(text: Text, tokenizer: Any, *, sequence_length: int, limit: int | None = None) -> tuple[Any, int]:
    """Cuts a tokenised text into windows of shape (windows, sequence_length); returns the number of all tokens, too."""
    with quiet_transformers():
        ids = tokenizer(text.content, return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids) // sequence_length
    if count == 0:
        raise EvaluationError(
            f"{text.name} has {len(ids):,} tokens, fewer than one window of {sequence_length:,}; give a longer text or "
            "a shorter --sequence-length"
        )
    count = min(count, limit or count)
    return ids[: count * sequence_length].reshape(count, sequence_length), len(ids)


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Text,
    *,
    sequence_length: int = EvaluationSettings.sequence_length,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> Perplexity:
    """Returns exp of the mean loss over all predicted tokens.

    The text is cut into windows of `sequence_length` tokens without overlap, each on its own, of which the first
    `limit` are measured. The tokenizer is the model's own; its special tokens stand once, before the text.
    """
    check_windows(getattr(model.config, "max_position_embeddings", None), sequence_length, limit)
    windows, tokens = windows_of(text, tokenizer, sequence_length=sequence_length, limit=limit)
    if (largest := int(windows.max())) >= (known := vocabulary_size(model)):
        raise EvaluationError(
            f"the tokenizer gives the token id {largest:,}, the model embeds {known:,} ids; is it the model's own?"
        )
    losses: list[float] = []
    with progress(text.name, len(windows)) as advance, memory_told(text.name):
        for window in windows:
            losses.append(_window_loss(model, window[None]))
            advance(1)
    mean = statistics.fmean(losses)
    if not mean < _LARGEST_LOSS:
        raise EvaluationError(
            f"{text.name}: the mean loss is {mean:.4g} nats a token, of which there is no perplexity; the weights are "
            "damaged, or --dtype float32 is needed"
        )
    value, error = math.exp(mean), standard_error(losses)
    return Perplexity(
        value=value,
        standard_error=None if error is None else value * error,
        losses=tuple(losses),
        tokens=tokens,
        predicted=len(losses) * (sequence_length - 1),
        tokens_hash=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    )


@torch.inference_mode()
def _window_loss(model: PreTrainedModel, window: torch.Tensor) -> float:
    """Returns a window's mean loss, in float32; the losses are taken a few hundred tokens at a time."""
    logits: Any = model(input_ids=window.to(input_device(model)), use_cache=False).logits[0, :-1]
    target: Any = window[0, 1:].to(logits.device)
    chunks = zip(logits.split(_CHUNK), target.split(_CHUNK), strict=True)
    return float(sum(cross_entropy(part.float(), ids, reduction="sum").double() for part, ids in chunks)) / len(target)
