"""Pieces of a file, however they come: from the page cache, past it, or from a file system without a disk."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from superexperts.checkpoints import shard_file
from superexperts.checkpoints.shard_file import BLOCK, CHUNK, ShardFile

SIZE = 2 * CHUNK + 3 * BLOCK + 17
PLACES = [
    (0, SIZE), (1, CHUNK), (BLOCK - 1, CHUNK + 2), (BLOCK, BLOCK), (CHUNK + 7, CHUNK), (5, 3), (SIZE - 9, 9),
]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, bytes]:
    data = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
    (tmp_path / "shard").write_bytes(data)
    return tmp_path / "shard", data


def _forget(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("forgotten", [True, False])
@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_every_piece_is_what_the_file_holds(
    written: tuple[Path, bytes], offset: int, size: int, forgotten: bool
) -> None:
    path, data = written
    if forgotten:
        _forget(path)
    file = ShardFile(path)
    target = np.zeros(size, dtype=np.uint8)
    assert file.read_into(target.data, offset) == size
    assert target.tobytes() == data[offset : offset + size]
    file.close()


@pytest.mark.parametrize("forgotten", [True, False])
@pytest.mark.parametrize(("offset", "size"), PLACES)
def test_every_piece_is_read_in_place(written: tuple[Path, bytes], offset: int, size: int, forgotten: bool) -> None:
    path, data = written
    if forgotten:
        _forget(path)
    file = ShardFile(path)
    memory = mmap.mmap(-1, size + 2 * BLOCK)
    assert file.read_in_place(memoryview(memory), offset, size) == size
    start = offset % BLOCK
    assert memory[start : start + size] == data[offset : offset + size]
    assert file.read_in_place(memoryview(memory), SIZE - 100, size) == min(100, size)
    assert file.read_in_place(memoryview(memory), SIZE + BLOCK, size) == 0
    file.close()


def test_large_pieces_that_are_not_cached_are_read_by_blocks(
    written: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The direct way is taken where it is there, and not for what the cache holds."""
    path, data = written
    calls = []
    read_blocks = shard_file._read_blocks
    monkeypatch.setattr(shard_file, "_read_blocks", lambda *call: calls.append(call) or read_blocks(*call))
    file = ShardFile(path)
    if file._direct is None:
        pytest.skip("this file system has no direct reads")
    target = np.zeros(CHUNK, dtype=np.uint8)
    path.read_bytes()  # now cached
    file.read_into(target.data, 3)
    assert not calls
    _forget(path)
    assert file.read_into(target.data, 3) == CHUNK
    assert len(calls) == 2  # the piece begins inside a block, so a chunk of blocks is not enough
    assert target.tobytes() == data[3 : 3 + CHUNK]
    file.close()


@pytest.mark.parametrize("forgotten", [True, False])
def test_the_end_of_the_file_is_told(written: tuple[Path, bytes], forgotten: bool) -> None:
    path, data = written
    if forgotten:
        _forget(path)
    file = ShardFile(path)
    target = np.zeros(CHUNK, dtype=np.uint8)
    assert file.read_into(target.data, SIZE - 100) == 100
    assert target[:100].tobytes() == data[-100:]
    assert file.read_into(target.data, SIZE + BLOCK) == 0
    file.close()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_system_that_refuses_direct_reads_is_read_the_other_way(
    written: tuple[Path, bytes], in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it refuses after a first block."""
    path, data = written
    file, preadv = ShardFile(path), os.preadv
    file._direct = file._direct or os.open(path, os.O_RDONLY)
    asked = 0

    def one_block(descriptor: int, buffers: list[memoryview], *more: int) -> int:
        nonlocal asked
        if descriptor != file._direct:
            return preadv(descriptor, buffers, *more)
        asked += 1
        if asked > 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, [buffers[0][:BLOCK]], *more)

    monkeypatch.setattr(os, "preadv", one_block)
    monkeypatch.setattr(file, "_is_on_disk", lambda *_: True)
    memory = memoryview(mmap.mmap(-1, CHUNK + 2 * BLOCK))
    if in_place:
        assert file.read_in_place(memory, 7, CHUNK) == CHUNK
        assert memory[7 : 7 + CHUNK] == data[7 : 7 + CHUNK]
    else:
        assert file.read_into(memory[:CHUNK], 7) == CHUNK
        assert memory[:CHUNK] == data[7 : 7 + CHUNK]
    assert asked > 1
    file.close()


def test_a_kernel_other_than_linux_has_none_of_its_calls(
    written: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = written
    monkeypatch.setattr(sys, "platform", "darwin")
    for name in ("O_DIRECT", "RWF_NOWAIT"):
        monkeypatch.delattr(os, name)
    file, memory = ShardFile(path), memoryview(mmap.mmap(-1, CHUNK + 2 * BLOCK))
    assert file.read_into(memory[:CHUNK], 3) == CHUNK
    assert memory[:CHUNK] == data[3 : 3 + CHUNK]
    assert file.read_in_place(memory, 5, CHUNK) == CHUNK
    assert memory[5 : 5 + CHUNK] == data[5 : 5 + CHUNK]
    file.close()
