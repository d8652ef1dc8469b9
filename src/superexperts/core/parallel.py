"""A function of many items, none of which needs another, computed by as many processes as the machine has cores."""

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
from typing import Any, TypeVar

from superexperts.core.errors import SuperExpertsError

__all__ = ["parallel_map"]

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(function: Callable[[T], R], items: Sequence[T], *, worth: int) -> list[R]:
    """`[function(item) for item in items]`, by one process for each `worth` items, and for each core at most.

    The processes are copies of this one: they begin at once and have the items already. Only Linux copies a process
    safely, and only one without other threads of Python's, whose locks nobody would open in the copy; else, or where
    the system has no room for another, this process does all. What the function raises is raised, the first item's
    first.
    """
    daemon = multiprocessing.current_process().daemon  # may have no children
    alone = sys.platform != "linux" or threading.active_count() > 1 or daemon
    count = 1 if alone else max(1, min(len(os.sched_getaffinity(0)), len(items) // worth))
    bounds = [len(items) * number // count for number in range(count + 1)]
    first, *others = [items[start:end] for start, end in itertools.pairwise(bounds)]
    with contextlib.ExitStack() as children:
        coming = [_begun(function, part, children) for part in others]
        found = [function(item) for item in first]
        for part, receiver in zip(others, coming, strict=True):
            found += [function(item) for item in part] if receiver is None else _received(receiver)
    return found


def _begun(
    function: Callable[[T], R], items: Sequence[T], children: contextlib.ExitStack
) -> Connection[Any, tuple[list[R], Exception | None]] | None:
    """Where a copy of this process will send what the function makes of the items, None if there can be no copy; it
    ends with `children`."""
    context = multiprocessing.get_context("fork")
    try:
        receiver, sender = context.Pipe(duplex=False)
        with sender:
            child = context.Process(target=_send, args=(receiver, sender, function, items), daemon=True)
            child.start()
    except OSError:
        return None
    children.callback(child.join)
    children.callback(child.kill)  # first, and nothing to one that has ended
    return receiver


def _received(receiver: Connection[Any, tuple[list[R], Exception | None]]) -> list[R]:
    try:
        found, error = receiver.recv()
    except EOFError:
        raise SuperExpertsError("one of several processes was killed, for its memory perhaps; run it again") from None
    if error is not None:
        raise error
    return found


def _send(receiver: Any, sender: Any, function: Callable[[T], R], items: Sequence[T]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt comes to every process; this one's parent ends it
    receiver.close()  # this copy's: while anybody has one, sending to nobody would wait
    found: list[R] = []
    error: Exception | None = None
    try:
        found += [function(item) for item in items]
    except Exception as raised:  # noqa: BLE001  # it is the parent's to raise
        error = raised
    with contextlib.suppress(BrokenPipeError):  # nobody is there any longer
        sender.send((found, error))
