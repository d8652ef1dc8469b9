"""What a command changes about its own process: kept memory, a faster start, and interrupts that are not lost."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["importing_once", "keep_memory", "no_interrupt_lost"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from glibc's malloc.h."""
KEPT = 2**28
"""Size in bytes of the largest block that is kept: enough for activations, too small for the weights of a bank."""
KEPT_BEFORE_2_35 = 2**25
"""The largest value that glibc before 2.35 accepts on 64-bit machines."""
UNTRIMMED = 2**31 - 1
"""Free bytes at the end of the heap that are not returned to the kernel; the largest int."""
SAME_INTERRUPT = 0.3
"""Seconds within which a second interrupt is the first one once more: programs that start a command, such as `uv run`,
pass on what the terminal has sent to the command as well."""
SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""Environment variables with which users set the same thresholds."""


def keep_memory() -> None:
    """Makes glibc keep memory that a computation frees, instead of returning it to the kernel.

    By default glibc returns every large block to the kernel and gets it again, page by page and zeroed, for the next
    tensor of the same size. A norm of 16 MB then takes twice as long, and attention and generation on a CPU are slower
    as well (docs/decisions/05-keep-freed-memory.md). Does nothing if the user has set the thresholds in the
    environment, or with another C library.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return
    library = ctypes.CDLL(None)
    # Set the second threshold only if the first was accepted: setting either stops glibc from adapting both by itself.
    if library.mallopt(MMAP_THRESHOLD, KEPT) or library.mallopt(MMAP_THRESHOLD, KEPT_BEFORE_2_35):
        library.mallopt(TRIM_THRESHOLD, UNTRIMMED)


@contextlib.contextmanager
def importing_once() -> Iterator[None]:
    """Excludes the objects created in the block from garbage collection; for the imports of a one-command process.

    Importing torch and transformers creates hundreds of thousands of objects that live until the process ends. The
    collector would scan them again and again, which takes a fifth of the start of a command.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def no_interrupt_lost(said_first: str = "") -> Iterator[None]:
    """Within the block, an interrupt that arrives during a callback (such as that of a weak reference) is raised again.

    Python prints such an exception as "ignored" and continues. The interrupt is sent again after 0.1 s, because one
    that has already arrived cannot end a wait that begins later, and at the latest when the block ends.

    With `said_first`, the first interrupt prints that line, and a second one ends the process at once: what is open is
    not closed, as after a kill. Only for the main thread of a process that does nothing else.
    """
    before = sys.unraisablehook
    again: list[threading.Timer] = []
    seen: list[float] = []
    handler_before = signal.getsignal(signal.SIGINT)

    def interrupted(*_: Any) -> None:
        now = time.monotonic()
        if not seen:
            os.write(2, f"{said_first}\n".encode())  # `print` may be what was interrupted
        elif not again and now - seen[0] < SAME_INTERRUPT:
            return
        elif not again:
            os._exit(130)
        again.clear()
        seen.append(now)
        raise KeyboardInterrupt

    def hook(unraisable: UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            again.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)))
            again[-1].start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    installed = bool(said_first) and handler_before is signal.default_int_handler  # a shell may have it ignored
    if installed:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        sys.unraisablehook = before
        if installed:
            signal.signal(signal.SIGINT, handler_before)
        pending = [timer for timer in again if timer.is_alive()]
        for timer in pending:
            timer.cancel()
    if pending:
        raise KeyboardInterrupt
