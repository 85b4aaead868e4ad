"""The C library's allocator: keep freed memory in the process, instead of returning it after each training step."""

import ctypes
import os

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt (malloc.h)."""
THRESHOLD = 1 << 30
"""Bytes of free memory at the top of the heap that are kept."""
LARGEST_MMAP_THRESHOLD = 4 << 20 << 3
"""Bytes. glibc refuses a higher threshold. Larger blocks are always mapped, and unmapped when they are freed."""
PAD = 64 << 20
"""Bytes by which the heap grows at least."""


def keep_freed_memory() -> bool:
    """Set glibc's thresholds high, so that tensors of a step reuse the memory of the step before.

    By default, glibc returns freed memory to the system, which must clear each page again before its next use. Returns
    whether the thresholds were set: other C libraries have none, and a user's own settings in the environment
    (MALLOC_*, GLIBC_TUNABLES) are left alone.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    values = {MMAP_THRESHOLD: LARGEST_MMAP_THRESHOLD, TRIM_THRESHOLD: THRESHOLD, TOP_PAD: PAD}
    return all(mallopt(parameter, value) for parameter, value in values.items())
