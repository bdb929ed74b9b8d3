"""What a measurement is given and gives, and what must not pass silently: NaN logits, and memory that runs out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from amprune.errors import EvaluationError, reason
from amprune.evaluation.identity import Subject
from amprune.evaluation.records import Record
from amprune.model.architecture import PreTrainedModel
from amprune.model.gguf_file import GgufFile
from amprune.running import Progress, no_progress, out_of_memory, release_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A model that is measured alone."""

    model: PreTrainedModel
    """In evaluation mode."""
    tokenizer: Any = None
    """The model's own; None where no job needs one."""
    gguf: GgufFile | None = None
    """The file whose dequantised weights the model has."""
    kept: Sequence[Record] = ()
    """What is known of it on this device, of earlier runs too."""
    progress: Progress = no_progress


@dataclass(frozen=True)
class Job:
    """A part of a measurement, after which the figures are saved."""

    label: str
    measure: Callable[..., Any]
    """Returns the records of one `Loaded`; of a joint job, those of each of `models, progress`, by name."""
    data: str | None = None
    """Identifies what is measured on, for which a tokenizer is needed."""
    joint: bool = False
    """Whether all models are measured in turn."""
    check: Callable[[Subject], None] = lambda subject: None
    """Refuses a model that cannot be measured, before one is loaded."""


@contextmanager
def nan_refused(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Watches every forward pass; minus infinity passes, since some models mask ids with it."""

    def check(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and bool(torch.isnan(logits).any()):
            dtype = str(logits.dtype).removeprefix("torch.")
            raise EvaluationError(
                f"{name} gives logits that are NaN in {dtype}, so no figure is kept; try --dtype float32, or bfloat16 "
                "instead of float16; if that changes nothing, the weights are damaged"
            )

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def halve_until_it_fits(measure: Callable[[int], T], batch_size: int, *, what: str) -> tuple[T, int]:
    """Calls `measure(batch_size)`, with half the batch each time that memory runs out; returns what fitted, too."""
    while batch_size > 1:
        try:
            return measure(batch_size), batch_size
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the activations alive.
        batch_size //= 2
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("%s: out of memory; going on with a batch of %d", what, batch_size)
    with memory_told(what):
        return measure(batch_size), batch_size


@contextmanager
def memory_told(what: str) -> Iterator[None]:
    """Says what helps where memory runs out although sequences are taken one by one."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise EvaluationError(
            f"{what}: memory runs out at a batch of one ({reason(error)}); use a shorter --sequence-length, a smaller "
            "--dtype, or --device-map auto"
        ) from None
