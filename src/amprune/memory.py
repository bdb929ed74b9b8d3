"""Freed memory, handed back to the system."""

import ctypes
import gc
import sys


def release_memory() -> None:
    """Collects garbage and gives free pages back where the C library can (glibc keeps them otherwise)."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
