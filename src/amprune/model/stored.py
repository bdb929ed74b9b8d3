"""What the weights of a loaded model really take, also those that a library keeps quantised."""

import math
from collections.abc import Iterator
from typing import Any

import torch


def weight_count(weight: torch.Tensor) -> int:
    """Returns how many weights a parameter stands for, however many of them are packed into a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def weight_bytes(weight: torch.Tensor) -> int:
    """Returns the bytes of a parameter or buffer, those of its scales included."""
    return sum(part.nbytes for part in _parts(weight))


def is_quantized(weight: torch.Tensor) -> bool:
    """Tells whether a library keeps a weight in another form than it shows."""
    return any(part is not weight for part in _parts(weight))


def _parts(weight: Any) -> Iterator[torch.Tensor]:
    """Yields the plain tensors that hold a weight: its own data, and what torchao and bitsandbytes keep beside it."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
        return
    yield weight
    state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
    beside = [*(state.as_dict().values() if state is not None else ()), scales]
    yield from (part for part in beside if isinstance(part, torch.Tensor))
