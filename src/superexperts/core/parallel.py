"""A map over independent items that uses all cores of the machine."""

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
    """`[function(item) for item in items]`, by one process for every `worth` items, at most one per core.

    The processes are forks of this one, so they start at once and already have the items. This process does all the
    work itself where forking is not safe (outside Linux, or with other Python threads, because their locks would stay
    locked in the fork), or if the system cannot start another process. An exception of the function is raised here; of
    several, that of the first item.
    """
    daemon = multiprocessing.current_process().daemon  # is not allowed to have children
    alone = sys.platform != "linux" or threading.active_count() > 1 or daemon
    count = 1 if alone else max(1, min(len(os.sched_getaffinity(0)), len(items) // worth))
    bounds = [len(items) * number // count for number in range(count + 1)]
    first, *others = [items[start:end] for start, end in itertools.pairwise(bounds)]
    with contextlib.ExitStack() as children:
        receivers = [_started(function, part, children) for part in others]
        found = [function(item) for item in first]
        for part, receiver in zip(others, receivers, strict=True):
            found += [function(item) for item in part] if receiver is None else _received(receiver)
    return found


def _started(
    function: Callable[[T], R], items: Sequence[T], children: contextlib.ExitStack
) -> Connection[Any, tuple[list[R], Exception | None]] | None:
    """Starts a fork that computes the items; returns the connection to receive from, None if it cannot be started.

    The fork ends with `children`.
    """
    context = multiprocessing.get_context("fork")
    try:
        receiver, sender = context.Pipe(duplex=False)
        with sender:
            child = context.Process(target=_send, args=(receiver, sender, function, items), daemon=True)
            child.start()
    except OSError:
        return None
    children.callback(child.join)
    children.callback(child.kill)  # runs before join; does nothing to a process that has ended
    return receiver


def _received(receiver: Connection[Any, tuple[list[R], Exception | None]]) -> list[R]:
    try:
        found, error = receiver.recv()
    except EOFError:
        raise SuperExpertsError(
            "a worker process was killed, perhaps for lack of memory; run the command again"
        ) from None
    if error is not None:
        raise error
    return found


def _send(receiver: Any, sender: Any, function: Callable[[T], R], items: Sequence[T]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # every process gets the interrupt; the parent ends this one
    receiver.close()  # the fork's own copy; while it is open, sending to a dead parent would block
    found: list[R] = []
    error: Exception | None = None
    try:
        found += [function(item) for item in items]
    except Exception as raised:  # noqa: BLE001  # the parent raises it
        error = raised
    with contextlib.suppress(BrokenPipeError):  # the parent has ended
        sender.send((found, error))
