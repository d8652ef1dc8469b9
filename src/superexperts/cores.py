"""A pure function of many items, computed by as many processes as the machine has cores."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from .errors import SuperExpertsError

__all__ = ["by_all_cores"]

T = TypeVar("T")
R = TypeVar("R")


def by_all_cores(function: Callable[[T], R], items: Sequence[T], *, worth: int) -> list[R]:
    """`[function(item) for item in items]`, by one process for each `worth` items, and for each core at most.

    The processes are copies of this one: they begin at once and have the items already. Only Linux copies a process
    safely, and only one without other threads, whose locks nobody would open in the copy; else this process does all.
    """
    alone = sys.platform != "linux" or threading.active_count() > 1
    count = 1 if alone else max(1, min(len(os.sched_getaffinity(0)), len(items) // worth))
    first, *others = [items[start:end] for start, end in itertools.pairwise(_bounds(len(items), count))]
    context = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as children:
        coming = []
        for part in others:
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_send, args=(receiver, sender, function, part), daemon=True)
            child.start()
            children.callback(child.join)
            children.callback(child.terminate)  # first, and nothing to one that has ended
            sender.close()
            coming.append(receiver)
        found = [function(item) for item in first]
        for receiver in coming:
            try:
                found += receiver.recv()
            except EOFError:
                raise SuperExpertsError("a process that read answers was killed; run the command again") from None
    return found


def _bounds(size: int, count: int) -> list[int]:
    return [size * number // count for number in range(count + 1)]


def _send(receiver: Connection, sender: Connection, function: Callable[[T], R], items: Sequence[T]) -> None:
    receiver.close()  # this copy's: while anybody has one, sending to nobody would wait
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends a copy without a word; this process says it
    with contextlib.suppress(BrokenPipeError):  # nobody is there any longer
        sender.send([function(item) for item in items])
