"""What changes to a model do to its next-token distributions, on tokens that were not used to make the changes."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div

from amprune.errors import ScoresError
from amprune.model.architecture import PreTrainedModel
from amprune.model.loading import input_device
from amprune.running import Advance, Progress, no_progress
from amprune.scoring.batches import batches, check_calibration, padded, predicting_samples
from amprune.text.calibration import CalibrationSet

CHUNK = 512
"""Tokens whose distributions are held in float32 at a time. A longer sample is a batch of its own."""

Change = Callable[[], AbstractContextManager[None]]
"""Turns the dense model into a candidate for as long as the context lasts."""


@dataclass(frozen=True)
class Damage:
    """What a change does to a model, as means over held-out tokens, in nats."""

    kl: float
    """Of the dense model's distribution from the changed one's, over every token."""
    loss: float
    """Next-token cross-entropy of the changed model."""


def measure_changes(
    model: PreTrainedModel,
    changes: Sequence[Change],
    *,
    samples: CalibrationSet,
    batch_tokens: int = CHUNK,
    progress: Progress = no_progress,
) -> tuple[Damage, list[Damage]]:
    """Measures what each change does to the model's next-token distributions.

    The dense distributions of a batch are computed once and compared with those of every change in turn, in float32;
    nothing of all tokens is held.

    Returns:
        The dense model's own divergence, 0, and loss; and the damage of each change.
    """
    check_calibration(model, samples, batch_tokens=batch_tokens)
    predicted = sum(len(sample) - 1 for sample in predicting_samples(samples))
    kl, loss = [0.0] * len(changes), [0.0] * (len(changes) + 1)
    with torch.inference_mode(), progress("Allocating", len(samples.samples) * (len(changes) + 1)) as advance:
        for batch in batches(samples.samples, batch_tokens):
            _add_batch(model, changes, batch, kl, loss, advance)
    if not all(map(math.isfinite, (*kl, *loss))):
        raise ScoresError(
            f"the loss on the samples of {samples.name!r} or the divergence from the dense model is not finite; use "
            "another dtype (--dtype bfloat16 or float32: float16 overflows at 65,504), or check the checkpoint"
        )
    means = [value / predicted for value in loss]
    divergences = [value / samples.tokens for value in kl]
    return Damage(0.0, means[-1]), [Damage(*both) for both in zip(divergences, means[:-1], strict=True)]


def _add_batch(
    model: PreTrainedModel,
    changes: Sequence[Change],
    batch: Sequence[Sequence[int]],
    kl: list[float],
    loss: list[float],
    advance: Advance,
) -> None:
    """Adds what a batch gives: to `kl` for every change, to `loss` for every change and then the dense model."""
    dense = []
    for found, targets in _distributions(model, batch):
        dense.append(found)
        loss[-1] += _cross_entropy(found, targets)
    advance(len(batch))
    for index, change in enumerate(changes):
        with change():
            for expected, (found, targets) in zip(dense, _distributions(model, batch), strict=True):
                kl[index] += float(kl_div(found, expected, reduction="sum", log_target=True))
                loss[index] += _cross_entropy(found, targets)
        advance(len(batch))


def _distributions(
    model: PreTrainedModel, batch: Sequence[Sequence[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the (tokens, vocabulary) log-probabilities of a few hundred tokens at a time, and the ids that follow."""
    logits = model(**padded(batch, input_device(model)), use_cache=False).logits
    for row, sample in zip(logits, batch, strict=True):
        ids = torch.tensor(sample, device=row.device)
        for start in range(0, len(sample), CHUNK):
            stop = min(start + CHUNK, len(sample))
            yield torch.log_softmax(row[start:stop].float(), dim=-1), ids[start + 1 : stop + 1]


def _cross_entropy(found: torch.Tensor, targets: torch.Tensor) -> float:
    """Returns the summed loss; the last token of a sample is followed by none."""
    return -float(found[: len(targets)].gather(1, targets[:, None]).sum())
