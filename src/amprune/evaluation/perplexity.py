"""Perplexity by SliceGPT's procedure, which the paper follows (section IV-A): windows without overlap over one text."""

import hashlib
import math
import statistics
from functools import partial
from itertools import accumulate
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
from amprune.text.tokens import spans, start_token

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
    """Returns perplexity, exp of the mean loss over all predicted tokens, and bits per byte of the text predicted.

    The text is cut into windows of `sequence_length` tokens without overlap, each on its own, of which the first
    `windows` are measured; the last, incomplete one is left out. Where the tokenizer begins a text with a start token,
    each window begins with it; or, as the paper has it, the first alone. The items are the windows' mean negative
    log-likelihoods in nats a token; the standard error is theirs, by the delta method.

    Bits per byte are the same loss over the UTF-8 bytes of the predicted tokens instead of their number, and may be
    compared between tokenizers. The items are the bits of a window over the mean bytes of a window, so that their mean
    is the value; the standard error is that of a ratio of two sums over windows.
    """
    model, length = given.model, asked.sequence_length
    check_windows(getattr(model.config, "max_position_embeddings", None), length, asked.windows)
    windows, sizes, tokens = _windows(given.tokenizer, text, asked)
    if (largest := int(windows.max())) >= (known := vocabulary_size(model)):
        raise EvaluationError(
            f"the tokenizer gives the token id {largest:,}, the model embeds {known:,} ids; is it the model's own?"
        )
    losses: list[float] = []
    with given.progress(text.name, len(windows)) as advance, memory_told(text.name):
        for window in windows:
            losses.append(window_loss(model, window[None]))
            advance(1)
    mean = statistics.fmean(losses)
    if not mean < _LARGEST_LOSS:
        raise EvaluationError(
            f"{text.name}: the mean loss is {mean:.4g} nats a token, of which there is no perplexity; the weights are "
            "damaged, or --dtype float32 is needed"
        )
    value, error, predicted = math.exp(mean), standard_error(losses), len(losses) * (length - 1)
    common: dict[str, Any] = {
        "task": text.name,
        "n": len(losses),
        "items_hash": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "settings": {
            "sequence_length": length, "windows": asked.windows, "dtype": dtype_of(model),
            "start_token": asked.start_token,
        },
        "data": {
            "name": text.name, "sha256": text.sha256, "tokens": tokens, "predicted": predicted, "bytes": sum(sizes),
        },
    }  # fmt: skip
    size = max(1, sum(sizes)) / len(sizes)
    bits = [loss * (length - 1) / math.log(2) / size for loss in losses]
    per_byte = statistics.fmean(bits)
    apart = standard_error([one - per_byte * own / size for one, own in zip(bits, sizes, strict=True)])
    return [
        Record(
            measurement="perplexity", metric="perplexity", value=value, unit="perplexity",
            standard_error=None if error is None else value * error, items=tuple(losses), **common,
        ),
        Record(
            measurement="bits_per_byte", metric="bits_per_byte", value=per_byte, unit="bits/byte",
            standard_error=apart, items=tuple(bits), **common,
        ),
    ]  # fmt: skip


def _windows(tokenizer: Any, text: Text, asked: EvaluationSettings) -> tuple[torch.Tensor, list[int], int]:
    """Returns windows of token ids, the bytes of the tokens that each predicts, and how many tokens the text has."""
    length, each = asked.sequence_length, asked.start_token == "each"
    offsets = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    with quiet_transformers():
        found = tokenizer(text.content, add_special_tokens=asked.start_token == "first", verbose=False, **offsets)
    ids = found["input_ids"]
    rows = [row for row in spans(ids, length, start_token(tokenizer) if each else None) if _tokens(row) == length]
    if not rows:
        raise EvaluationError(
            f"{text.name} has {len(ids):,} tokens, fewer than one window of {length:,}; give a longer text or "
            "a shorter --sequence-length"
        )
    rows = rows[: asked.windows]
    if offsets:
        ends = [0, *accumulate((end for _, end in found["offset_mapping"]), max)]
        bounds = [(ends[part.start + (not head)], ends[part.stop]) for head, part in rows]
        sizes = [len(text.content[first:last].encode()) for first, last in bounds]
    else:
        sizes = [round(len(text.content.encode()) * (length - 1) / len(ids))] * len(rows)
    return torch.tensor([head + ids[part] for head, part in rows]), sizes, len(ids)


def _tokens(row: tuple[list[int], slice]) -> int:
    head, part = row
    return len(head) + int(part.stop) - int(part.start)


@torch.inference_mode()
def window_loss(model: PreTrainedModel, window: torch.Tensor) -> float:
    """Returns a window's mean loss, in float32; the losses are taken a few hundred tokens at a time."""
    logits: Any = model(input_ids=window.to(input_device(model)), use_cache=False).logits[0, :-1]
    target: Any = window[0, 1:].to(logits.device)
    chunks = zip(logits.split(_CHUNK), target.split(_CHUNK), strict=True)
    return float(sum(cross_entropy(part.float(), ids, reduction="sum").double() for part, ids in chunks)) / len(target)
