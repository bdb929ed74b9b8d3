"""One comparison of two models: the same tokens, the logits of both, how far they lie apart and how far they may."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from amprune.errors import AmpruneError
from amprune.model.architecture import PreTrainedModel, make_config, quiet_transformers
from amprune.model.loading import input_device, loading_problems
from amprune.model.reader import Checkpoint
from amprune.model.streaming import streamed_model
from amprune.running import release_memory

_SEQUENCES, _LENGTH = 2, 48
Failure = Callable[[str], AmpruneError]
"""Of a room's errors that which a failed comparison raises."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of one model lie from those of another, in standard deviations of the other's."""

    largest: float
    """Of any logit."""
    mean: float
    """A root mean square."""


def probe_ids(checkpoint: Checkpoint, length: int = _LENGTH) -> torch.Tensor:
    """Draws (2, length) seeded token ids, the same for every model of a vocabulary; fewer where positions are few."""
    vocabulary = make_config(checkpoint.config, where=str(checkpoint.folder)).vocab_size
    shape = (_SEQUENCES, min(length, checkpoint.positions or length))
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def probe_logits(
    checkpoint: Checkpoint,
    ids: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    changed: Callable[[PreTrainedModel], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> torch.Tensor:
    """Computes (2, length, vocabulary) logits of token ids, those of `probe_ids` unless given.

    The model is streamed from its files, module by module, so that any size fits. Stored values are exact in float64,
    so that one tolerance serves every stored dtype and depth. `changed(model)` may put hooks on the model.
    """
    model = streamed_model(checkpoint, dtype)
    with changed(model):
        logits = logits_of(model, probe_ids(checkpoint) if ids is None else ids)
    del model
    release_memory()  # Modules and their hooks refer to each other; the next model must not stand beside this one.
    return logits


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Computes the logits of a model in memory."""
    with torch.inference_mode(), quiet_transformers():
        found: torch.Tensor = model(input_ids=ids.to(input_device(model)), use_cache=False).logits
    return found.cpu()


def finite(logits: torch.Tensor, error: AmpruneError) -> torch.Tensor:
    """Returns logits that are finite; raises the error for others, which agree with nothing."""
    if not torch.isfinite(logits).all():
        raise error
    return logits


def compare(found: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Compares finite logits of the same tokens."""
    difference, scale = found.double() - expected, expected.std()
    return Difference(float(difference.abs().max() / scale), float(difference.square().mean().sqrt() / scale))


def hold(difference: float, tolerance: float, failure: Failure, what: str, more: str) -> float:
    """Returns a difference within a tolerance; fails for another, and for what is no number."""
    if not difference <= tolerance:
        raise failure(f"{what} by {difference:.1e} of their standard deviation, more than {more}")
    return difference


def token_gaps(logits: torch.Tensor, chosen: torch.Tensor, *, never: Collection[int] = ()) -> torch.Tensor:
    """Returns how far the logit of each chosen token lies below the best, in standard deviations; 0 of the best.

    `logits` are of shape (sequences, tokens, vocabulary), `never` the token ids that could not be chosen.
    """
    of_chosen = logits.gather(2, chosen[:, :, None])[:, :, 0]
    best = logits.index_fill(2, torch.tensor(sorted(never), dtype=torch.long), -torch.inf).amax(dim=2)
    gaps: torch.Tensor = (best - of_chosen) / logits.std()
    return gaps.clamp(min=0)


def check_loading(folder: Path, failure: Failure) -> None:
    """Holds that stock `from_pretrained` takes every tensor of a folder, and lacks none."""
    for kind, names in loading_problems(folder).items():
        raise failure(f"from_pretrained finds {len(names)} {kind.replace('_', ' ')}, such as {names[0]}")
