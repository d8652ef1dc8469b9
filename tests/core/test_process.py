"""The C library's allocator keeps what a computation frees, unless the user has said otherwise."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from superexperts.core import process

CODE = """
import resource
import torch
from superexperts.core.process import keep_memory
if {keep}:
    keep_memory()
for _ in range(3):
    torch.ones(10**7).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(10**7).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **environment: str) -> int:
    """Pages that the kernel hands out for twenty tensors of 40 MB, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(keep=keep)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is one of glibc")
def test_memory_is_kept_unless_the_user_has_set_it_otherwise() -> None:
    plain = faults(keep=False)
    assert plain > 180_000
    assert faults(keep=True) < plain / 2  # a small block may come to lie where a large one was: not 0
    assert faults(keep=True, MALLOC_TRIM_THRESHOLD_="131072") > 180_000


@pytest.mark.parametrize(
    ("most", "set_"),
    [
        (2**31, {process.MMAP_THRESHOLD: 2**28, process.TRIM_THRESHOLD: 2**31 - 1}),
        (2**25, {process.MMAP_THRESHOLD: 2**25, process.TRIM_THRESHOLD: 2**31 - 1}),
        (2**12, {}),
    ],
)
def test_an_older_glibc_gets_the_most_that_it_takes(
    most: int, set_: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2.35 it refuses more than 32 MiB; the other threshold alone would leave every tensor to the kernel."""
    done: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        taken = name != process.MMAP_THRESHOLD or value <= most
        if taken:
            done[name] = value
        return int(taken)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    for name in process.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    process.keep_memory()
    assert done == set_
