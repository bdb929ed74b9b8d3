"""Memory: what is free, how it is said, and freed memory handed back to the system."""

import ctypes
import gc
import sys

import psutil
import torch


def release_memory() -> None:
    """Collects garbage and gives free pages back where the C library can (glibc keeps them otherwise)."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def free_memory(device: str | torch.device) -> int:
    """Returns the bytes that are free on a device."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def binary(count: int) -> str:
    """Writes a number of bytes in GiB, MiB or KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"
