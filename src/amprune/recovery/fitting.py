"""What a preset leaves open of a training, worked out from the model and the device, and said in the log.

Whether every weight is trained or adapters, how many rows go through the model at a time, whether activations are kept,
the learning rate, the tokens. What was given by hand stays.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from amprune.model.architecture import make_config
from amprune.model.reader import Checkpoint
from amprune.model.shape import ModelShape
from amprune.recovery.distillation import CHUNK_BYTES
from amprune.recovery.models import on_accelerator, training_dtype
from amprune.running import binary, free_memory
from amprune.settings import RecoverySettings
from amprune.text.sources import parse_sources
from amprune.text.training import ENDLESS_TOKENS

logger = logging.getLogger(__name__)

RATE, WIDTH, BATCH, LEAST_BATCH = 6e-4, 576, 8192, 2048
"""Learning rate of every weight at this hidden size and so many tokens a step; docs/recovery.md says whence.

It falls with the width, as the scale of AdamW's steps has to (Yang et al., 2022, arXiv 2203.03466), and with the root
of the batch (Malladi et al., 2022, arXiv 2205.10287)."""
STEPS = 100
"""Where there is too little text for so many steps of a whole batch, batches are smaller, down to the least."""
ADAPTER_RATE = 3.0
"""By how much the best learning rate of adapters is larger."""
TOKENS = 2_600_000
"""Of text that has no end, on an accelerator."""
MOST_ROWS_ON_CPU, MOST_ROWS = 4, 16
_OPEN = ("full", "batch_size", "batch_tokens", "gradient_checkpointing", "learning_rate")
_SHARE = 0.9
"""Of the memory that is free; what else a library takes is not counted."""


@dataclass(frozen=True)
class Need:
    """The bytes that a training takes on each device, item by item."""

    weights: int
    gradients: int
    optimizer: int
    """Two means of AdamW."""
    teacher: int
    activations: int
    logits: int
    """With the gradient that takes their place, and what is float32 a chunk at a time."""

    @property
    def total(self) -> int:
        """Of all items."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {binary(size)}" for name, size in asdict(self).items() if size)


def need(
    shape: ModelShape, vocabulary: int, settings: RecoverySettings, *, full: bool, rows: int, checkpointing: bool,
    dtype: torch.dtype, teacher: int,
) -> Need:  # fmt: skip
    """Returns what a training takes of each device.

    Args:
        shape: sizes of the model to train.
        vocabulary: how many token ids it knows.
        settings: the rank of adapters, the tokens of a row, the device.
        full: whether every weight is trained.
        rows: how many go through the model at a time.
        checkpointing: whether activations are computed again.
        dtype: of the weights that are not trained.
        teacher: bytes of the weights of the teacher.
    """
    trained = shape.parameters if full else adapter_parameters(shape, settings.lora_rank or 1)
    item = 0.5 if settings.load_in_4bit else dtype.itemsize
    frozen = 0 if full else shape.parameters * item
    autocast = full and on_accelerator(settings.device)  # which keeps 16-bit copies of the weights
    computed = 2 if autocast else dtype.itemsize
    tokens = rows * (settings.max_length or 1)
    block = activations(shape, adapters=not full) * computed
    blocks = shape.num_layers * (shape.hidden_size * computed if checkpointing else block)
    return Need(
        weights=round(frozen + (6 if autocast else 4) * trained), gradients=4 * trained, optimizer=8 * trained,
        teacher=teacher, activations=tokens * (blocks + block * checkpointing),
        logits=tokens * vocabulary * computed + 4 * CHUNK_BYTES,
    )  # fmt: skip


def activations(shape: ModelShape, *, adapters: bool) -> int:
    """Returns how many values a decoder block keeps for each token until its gradient is taken.

    Of a gated block: the inputs of two norms in float32 and their outputs, queries, keys and values before and after
    their rotation, the attention's output, four of the width of the MLP, two sums. Adapters keep float32 copies of
    the inputs of seven layers, which count double.
    """
    heads = (2 * shape.num_attention_heads + 4 * shape.num_key_value_heads) * shape.head_dim
    own = 10 * shape.hidden_size + heads + shape.num_attention_heads * shape.head_dim + 4 * shape.intermediate_size
    return own + 2 * (6 * shape.hidden_size + shape.intermediate_size) if adapters else own


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Returns how many weights adapters on all linear layers of the blocks have."""
    hidden, query, width = shape.hidden_size, shape.num_attention_heads, shape.intermediate_size
    sides = 2 * (hidden + query * shape.head_dim) + 2 * (hidden + shape.num_key_value_heads * shape.head_dim)
    sides += round(shape.neuron_parameters / hidden) * (hidden + width)
    return shape.num_layers * rank * sides


def fitted(
    settings: RecoverySettings, base: Checkpoint, dense: Checkpoint | None, *, before: Mapping[str, Any] | None = None
) -> RecoverySettings:
    """Returns the settings with what the preset leaves open settled, but for batch and learning rate; says what fits.

    Args:
        settings: with the values of their preset.
        base: the model to train.
        dense: the model that teaches it.
        before: settings of an interrupted run to go on with, under which memory may have been otherwise.
    """
    known = {name: value for name, value in (before or {}).items() if name in _OPEN and getattr(settings, name) is None}
    settings = replace(settings, **known)
    full, rows, checkpointing = _what_fits(settings, base, dense)
    return replace(settings, full=full, batch_size=rows, gradient_checkpointing=checkpointing, tokens=_tokens(settings))


def batched(settings: RecoverySettings, *, hidden_size: int, tokens: int) -> RecoverySettings:
    """Returns the settings with a batch and a learning rate for so many tokens of text, where they are open.

    A batch that is given in samples is as large as these are long at most.
    """
    batch = settings.batch_tokens
    if batch is None and settings.gradient_accumulation is None:
        batch = min(BATCH, max(LEAST_BATCH, round(tokens * (settings.epochs or 1) / STEPS)))
    rate = settings.learning_rate
    if rate is None:
        rate = RATE * min(1.0, WIDTH / hidden_size) * (1 if settings.full else ADAPTER_RATE)
        given = (settings.batch_size or 1) * (settings.gradient_accumulation or 1) * (settings.max_length or 1)
        rate = float(f"{rate * math.sqrt(min(1.0, (batch or given) / BATCH)):.2g}")
    return replace(settings, batch_tokens=batch, learning_rate=rate)


def _tokens(settings: RecoverySettings) -> int | None:
    """Returns how much text is wanted, where there are sources without an end."""
    if settings.tokens is not None or settings.samples is not None:
        return settings.tokens
    endless = any(one.is_endless for one in parse_sources(settings.data, "--data"))
    return (TOKENS if on_accelerator(settings.device) else ENDLESS_TOKENS) if endless else None


def _what_fits(settings: RecoverySettings, base: Checkpoint, dense: Checkpoint | None) -> tuple[bool, int, bool]:
    """Returns whether every weight is trained, on how many rows at a time, and whether activations are recomputed."""
    given = (settings.full, settings.batch_size, settings.gradient_checkpointing)
    if None not in given:
        return given  # type: ignore[return-value]
    free, teacher = _free(settings.device), 0
    vocabulary = int(make_config(base.config, where=str(base.folder)).vocab_size)
    if dense is not None:
        teacher = dense.shape.parameters * training_dtype(dense, replace(settings, full=False)).itemsize
    for full, checkpointing, rows in _choices(settings):
        found = need(
            base.shape, vocabulary, settings, full=full, rows=rows, checkpointing=checkpointing,
            dtype=training_dtype(base, replace(settings, full=full)), teacher=teacher,
        )  # fmt: skip
        if found.total <= _SHARE * free:
            break
    trained = "every weight" if full else f"LoRA adapters of rank {settings.lora_rank}"
    logger.info(
        "training %s, %d row%s of %d tokens at a time%s: %s; %s of %s that are free", trained, rows,
        "" if rows == 1 else "s", settings.max_length, ", recomputing activations" if checkpointing else "", found,
        binary(found.total), binary(free),
    )  # fmt: skip
    if found.total > _SHARE * free:
        logger.warning("this may be more than the device has; --load-in-4bit or a smaller --max-length takes less")
    return full, rows, checkpointing


def _choices(settings: RecoverySettings) -> Iterator[tuple[bool, bool, int]]:
    """Yields every weight or adapters, recomputing or not, and rows, in the order of preference."""
    most = MOST_ROWS if on_accelerator(settings.device) else MOST_ROWS_ON_CPU
    sizes = [most >> power for power in range(most.bit_length())] if settings.batch_size is None else []
    for full in (True, False) if settings.full is None else (settings.full,):
        for checkpointing in (
            (False, True) if settings.gradient_checkpointing is None else (settings.gradient_checkpointing,)
        ):
            for rows in sizes or [settings.batch_size or 1]:
                yield full and not settings.load_in_4bit, checkpointing, rows


def _free(device: str | None) -> int:
    """Returns the bytes that each process of this machine may take."""
    if on_accelerator(device):
        return free_memory(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    return free_memory("cpu") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
