"""The C library's allocator, told to keep the memory that a computation frees.

By default glibc hands every block of more than some MB back to the kernel and gets it anew, page by page cleared, for
the next tensor of the same size: a norm of 16 MB takes twice as long, attention and generation on a CPU as well
(docs/decisions/05-keep-freed-memory.md).
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_memory"]

# malloc.h of glibc
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**28
"""Bytes of the largest block that is kept: activations, and no weights of a whole bank."""
KEPT_BEFORE_2_35 = 2**25
"""The most that an older glibc takes, in 64 bits."""
UNTRIMMED = 2**31 - 1
"""Bytes free at the heap's end that are not given back; the most that an int takes."""
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_memory() -> None:
    """Sets it for the process, which should be the command's own; what the user has set in the environment stays, and
    other C libraries have no such setting."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return
    library = ctypes.CDLL(None)
    # Where both sizes are refused nothing is set: glibc would then no longer raise its threshold by itself.
    if library.mallopt(MMAP_THRESHOLD, KEPT) or library.mallopt(MMAP_THRESHOLD, KEPT_BEFORE_2_35):
        library.mallopt(TRIM_THRESHOLD, UNTRIMMED)
