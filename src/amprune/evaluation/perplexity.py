"""Perplexity by SliceGPT's procedure, which the paper follows (section IV-A): windows without overlap over one text."""

import hashlib
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from amprune.errors import EvaluationError
from amprune.evaluation.comparison import standard_error
from amprune.evaluation.data import Text, load_text, load_wikitext
from amprune.evaluation.identity import Subject
from amprune.evaluation.measurement import Job, Loaded, memory_told
from amprune.evaluation.records import Record
from amprune.model.architecture import PreTrainedModel, quiet_transformers
from amprune.model.latency import dtype_of
from amprune.model.loading import input_device, vocabulary_size
from amprune.settings import EvaluationSettings

_CHUNK = 512
_LARGEST_LOSS = 700.0  # exp of more than 709 is no float


def perplexity_jobs(asked: EvaluationSettings) -> list[Job]:
    """Opens the texts; returns a job a text."""
    folder = None if asked.data_dir is None else Path(asked.data_dir).expanduser()
    texts = [load_text(Path(text)) for text in asked.texts] or [load_wikitext(asked.split, data_dir=folder)]

    def check(subject: Subject) -> None:
        check_windows(subject.positions, asked.sequence_length, asked.windows)

    return [Job(one.name, partial(measure_perplexity, text=one, asked=asked), one.sha256, check=check) for one in texts]


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


def measure_perplexity(given: Loaded, *, text: Text, asked: EvaluationSettings) -> list[Record]:
    """Returns exp of the mean loss over all predicted tokens.

    The text is cut into windows of `sequence_length` tokens without overlap, each on its own, of which the first
    `windows` are measured; the last, incomplete one is left out. The tokenizer's special tokens stand once, before the
    text. The items are the windows' mean negative log-likelihoods in nats a token; the standard error is theirs, by
    the delta method.
    """
    model, length = given.model, asked.sequence_length
    check_windows(getattr(model.config, "max_position_embeddings", None), length, asked.windows)
    with quiet_transformers():
        ids = given.tokenizer(text.content, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < length:
        raise EvaluationError(
            f"{text.name} has {len(ids):,} tokens, fewer than one window of {length:,}; give a longer text or "
            "a shorter --sequence-length"
        )
    windows = ids[: len(ids) // length * length].reshape(-1, length)[: asked.windows]
    if (largest := int(windows.max())) >= (known := vocabulary_size(model)):
        raise EvaluationError(
            f"the tokenizer gives the token id {largest:,}, the model embeds {known:,} ids; is it the model's own?"
        )
    losses: list[float] = []
    with given.progress(text.name, len(windows)) as advance, memory_told(text.name):
        for window in windows:
            losses.append(_window_loss(model, window[None]))
            advance(1)
    mean = statistics.fmean(losses)
    if not mean < _LARGEST_LOSS:
        raise EvaluationError(
            f"{text.name}: the mean loss is {mean:.4g} nats a token, of which there is no perplexity; the weights are "
            "damaged, or --dtype float32 is needed"
        )
    value, error, predicted = math.exp(mean), standard_error(losses), len(losses) * (length - 1)
    return [
        Record(
            measurement="perplexity", task=text.name, metric="perplexity", value=value, unit="perplexity",
            n=len(losses), standard_error=None if error is None else value * error, items=tuple(losses),
            items_hash=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            settings={"sequence_length": length, "windows": asked.windows, "dtype": dtype_of(model)},
            data={"name": text.name, "sha256": text.sha256, "tokens": len(ids), "predicted": predicted},
        )
    ]  # fmt: skip


@torch.inference_mode()
def _window_loss(model: PreTrainedModel, window: torch.Tensor) -> float:
    """Returns a window's mean loss, in float32; the losses are taken a few hundred tokens at a time."""
    logits: Any = model(input_ids=window.to(input_device(model)), use_cache=False).logits[0, :-1]
    target: Any = window[0, 1:].to(logits.device)
    chunks = zip(logits.split(_CHUNK), target.split(_CHUNK), strict=True)
    return float(sum(cross_entropy(part.float(), ids, reduction="sum").double() for part, ids in chunks)) / len(target)
