"""What work needs from the machine: how far it is, how much memory is free, and freed memory handed back.

Imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""`with progress("Scoring", total) as advance:` and then `advance(steps)` as work gets done."""


@contextmanager
def no_progress(description: str, total: int) -> Iterator[Advance]:
    """Watches nothing."""
    yield lambda steps: None


def release_memory() -> None:
    """Collects garbage and gives free pages back where the C library can (glibc keeps them otherwise)."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def free_memory(device: str | torch.device) -> int:
    """Returns the bytes that are free on a device."""
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def binary(count: int) -> str:
    """Writes a number of bytes in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
