"""What a command changes about its process: memory that is kept, and interrupts."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from superexperts.core import process
from superexperts.core.process import no_interrupt_lost

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


SLOW_TO_END = """
import os, signal, sys, time
from superexperts.core.process import SAME_INTERRUPT, no_interrupt_lost

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
with no_interrupt_lost("stopping"):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by the program that started this one
        print("ending", flush=True)
        time.sleep(2 * SAME_INTERRUPT)
        if "again" in sys.argv:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        print("ended", flush=True)
"""


@pytest.mark.parametrize(("words", "code", "printed"), [([], 1, "ending\nended\n"), (["again"], 130, "ending\n")])
def test_the_second_interrupt_ends_the_process_at_once(words: list[str], code: int, printed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW_TO_END, *words], capture_output=True, text=True, timeout=50, check=False
    )
    # An interrupt that Python itself reports ends the process by the signal.
    assert (done.returncode == 130) is (code == 130)
    assert done.stdout == printed
    assert done.stderr.splitlines()[0] == "stopping"
    assert done.stderr.count("stopping") == 1


def test_the_handler_of_interrupts_is_put_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with no_interrupt_lost("stopping"):
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        with no_interrupt_lost("stopping"):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
