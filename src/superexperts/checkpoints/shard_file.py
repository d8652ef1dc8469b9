"""Reading large pieces of a file at the speed of the disk, past the kernel's page cache where they are not in it.

Through the cache a core spends 0.4 s on each GB, and one reader at a time is slower than the disk (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from pathlib import Path

__all__ = ["ShardFile"]

BLOCK = 4096
"""Offsets, lengths and addresses of direct reads must be multiples of the disk's block; none has larger ones."""
CHUNK = 2**22
"""Bytes read at a time; each thread keeps one buffer of this size."""


class _Buffer(threading.local):
    """A thread's own memory to read blocks into; begins with a page."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, CHUNK)


_BUFFER = _Buffer()


class ShardFile:
    """A file open for reading by several threads. `OSError` if it cannot be opened or read."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self._direct: int | None = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a file system in memory has no disk to read from
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def read_into(self, target: memoryview, offset: int) -> int:
        """Fills memory of bytes from `offset` on; -> how many there were, fewer at the end of the file."""
        direct = self._direct if self._is_on_disk(offset, len(target)) else None
        done = 0
        while done < len(target):
            if direct is None:
                count = os.preadv(self.descriptor, [target[done:]], offset + done)
            else:
                try:
                    count = _read_blocks(direct, target[done:], offset + done)
                except OSError:  # a file system with other blocks; what is broken fails the other way as well
                    direct = None
                    continue
            if not count:
                break
            done += count
        return done

    def read_in_place(self, memory: memoryview, offset: int, size: int) -> int:
        """As `read_into`, but the bytes start `offset % BLOCK` bytes into `memory`, so a direct read needs no copy.
        `memory` must begin at a page and be two blocks larger than `size`."""
        skipped, done = offset % BLOCK, 0
        if self._direct is not None and self._is_on_disk(offset, size):
            while done < skipped + size:
                try:
                    count = os.preadv(self._direct, [memory[done : _blocks(skipped + size)]], offset - skipped + done)
                except OSError:  # as above; the rest is read below
                    break
                done += count
                # A partial block means the end of the file; the next direct read would not be aligned.
                if not count or count % BLOCK:
                    break
        done = min(max(done - skipped, 0), size)
        return done + self.read_into(memory[skipped + done : skipped + size], offset + done)

    def _is_on_disk(self, offset: int, size: int) -> bool:
        """Whether a direct read pays: the piece is large, and not in the page cache, which direct reads bypass."""
        if self._direct is None or size < CHUNK // 4:
            return False
        try:
            # One byte in the middle stands for the piece. RWF_NOWAIT fails instead of reading from the disk.
            return not os.preadv(self.descriptor, [bytearray(1)], offset + size // 2, os.RWF_NOWAIT)
        except OSError:  # EAGAIN: it is not in the cache; or the file system cannot say
            return True


def _read_blocks(descriptor: int, target: memoryview, offset: int) -> int:
    """Reads up to a chunk of whole blocks by a direct read and copies the needed part."""
    import numpy as np  # here, so that shards that are only copied do not wait for it; it copies without Python's lock

    skipped = offset % BLOCK
    length = min(CHUNK, _blocks(skipped + len(target)))
    count = os.preadv(descriptor, [memoryview(_BUFFER.memory)[:length]], offset - skipped)
    count = max(0, min(count - skipped, len(target)))
    np.frombuffer(target, np.uint8)[:count] = np.frombuffer(_BUFFER.memory, np.uint8)[skipped : skipped + count]
    return count


def _blocks(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK
