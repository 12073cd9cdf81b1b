"""Let a training step use the memory of the step before it again."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3) of glibc
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
AS_EVER = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
"""What glibc comes to by itself in a process that handles large blocks."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While it lasts, what is freed stays with this process, on a CPU with glibc.

    By default glibc asks the kernel for each block of 32 MiB and more anew, and gives it back:
    volumes and the values of a stem are such blocks, and half of a training step's time goes
    into pages that the kernel fills with zeros (docs/performance.md). Elsewhere it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(MMAP_MAX, 0)
    mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for key, value in AS_EVER.items():
            mallopt(key, value)
        ctypes.CDLL(None).malloc_trim(0)
