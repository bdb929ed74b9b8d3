"""What each decoder block is worth: the calibration set's log-perplexity without it, less that of the dense model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from amprune.errors import ScoresError
from amprune.model.architecture import Architecture, PreTrainedModel
from amprune.model.loading import input_device, vocabulary_size
from amprune.running import Advance, Progress, no_progress
from amprune.scoring.batches import batches, check_calibration, padded, predicting_samples
from amprune.scoring.scores import Scores
from amprune.text.calibration import CalibrationSet

_LOGITS = 2**26
"""Most logits of a batch: 256 MiB in float32. A longer sample is a batch of its own."""
_CHUNK = 512


@dataclass
class _Walk:
    """Which block is skipped, and what the dense block before it gives."""

    skipped: int = 0
    output: Any = None


def block_perplexities(
    model: PreTrainedModel,
    architecture: Architecture,
    calibration: CalibrationSet,
    *,
    batch_tokens: int = 4096,
    progress: Progress = no_progress,
) -> Scores:
    """Scores every decoder block by how much the log-perplexity of the calibration set grows when it alone is skipped.

    This is the perplexity criterion of Shortened LLaMA (arXiv 2402.02834), one-shot; its order of the blocks is that of
    the perplexities themselves. The mean is over all predicted tokens, as perplexity has it, each sample on its own.
    What the dense model puts in front of the skipped block is kept from the pass before, so that on average half of the
    blocks run. `batch_tokens` bounds the tokens of a batch, padding included, and changes no score beyond rounding.

    Returns:
        (num_layers,) float32 in nats a token, the higher the more the block is worth; it may be negative.
    """
    check_calibration(model, calibration, batch_tokens=batch_tokens)
    samples = predicting_samples(calibration)
    blocks = [model.get_submodule(architecture.block(layer)) for layer in range(architecture.shape.num_layers)]
    sums = np.zeros(len(blocks) + 1)
    fitting = min(batch_tokens, max(_LOGITS // vocabulary_size(model), 1))
    with torch.inference_mode(), progress("Scoring", len(samples) * len(sums)) as advance:
        for batch in batches(samples, fitting):
            sums += _losses_without_each(model, blocks, batch, advance)
    means = sums / sum(len(sample) - 1 for sample in samples)
    for layer, mean in enumerate(means):
        if not np.isfinite(mean):
            what = f"without block {layer}, the" if layer < len(blocks) else "the dense model's"
            raise ScoresError(
                f"{what} loss on the calibration set is not finite; score in another dtype (--dtype bfloat16 or "
                "float32: float16 overflows at 65,504), or check the checkpoint"
            )
    return np.asarray(means[:-1] - means[-1], dtype=np.float32)


def _losses_without_each(
    model: PreTrainedModel, blocks: Sequence[torch.nn.Module], batch: Sequence[Sequence[int]], advance: Advance
) -> npt.NDArray[np.float64]:
    """Returns the summed loss of a batch without each block, from the first to the last, and with all of them."""
    losses, inputs, walk = [], padded(batch, input_device(model)), _Walk()
    with _walked(blocks, walk):
        for walk.skipped in range(len(blocks) + 1):
            losses.append(_loss(model(**inputs, use_cache=False).logits, batch))
            advance(len(batch))
    return np.array(losses)


def _loss(logits: torch.Tensor, batch: Sequence[Sequence[int]]) -> float:
    """Returns the summed cross-entropy of every next token, in float32, a few hundred tokens at a time."""
    total = 0.0
    for row, sample in zip(logits, batch, strict=True):
        targets = torch.tensor(sample[1:], device=logits.device)
        chunks = zip(torch.split(row[: len(targets)], _CHUNK), torch.split(targets, _CHUNK), strict=True)
        total += sum(float(cross_entropy(part.float(), wanted, reduction="sum")) for part, wanted in chunks)
    return total


@contextmanager
def _walked(blocks: Sequence[torch.nn.Module], walk: _Walk) -> Iterator[None]:
    """Lets the blocks take their part in the walk; `forward` is replaced, since a hook cannot keep it from running."""
    before = [vars(block).get("forward") for block in blocks]  # accelerate puts its own there
    for index, block in enumerate(blocks):
        block.forward = _walking(block.forward, index, walk)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _walking(forward: Callable[..., Any], index: int, walk: _Walk) -> Callable[..., Any]:
    """Returns the block's part: before the skipped one it is known what comes out, behind it the block just runs.

    The skipped block hands on what it was given, and computes what will come out of it once the next one is skipped.
    """

    def part(*args: Any, **kwargs: Any) -> Any:
        if index < walk.skipped:
            return walk.output
        output = forward(*args, **kwargs)
        if index > walk.skipped:
            return output
        walk.output = output
        return handed_on(args, kwargs, output)

    return part


def handed_on(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    """Returns what a block was given in place of what it computed: hidden states, alone or first of a tuple."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
