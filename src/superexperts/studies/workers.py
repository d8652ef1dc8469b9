"""Who runs the cells of a study: this process, one process for each GPU, or the actors of a Ray cluster.

A crew takes cells and gives outcomes; `schedule` hands it each cell as soon as what the cell needs is done. A worker
that dies takes nothing with it: its cell is run again, from what is on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from superexperts.core.errors import OptionError, OutputError, SuperExpertsError
from superexperts.studies.cells import Cell, Worker
from superexperts.studies.plan import Plan
from superexperts.studies.status import LOG

__all__ = ["Outcome", "locked", "open_crew", "schedule"]


ATTEMPTS = 3
"""How often a cell may take its worker down before the study gives it up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended."""

    cell: str
    seconds: float
    error: str | None = None
    """What the command says is wrong; None where it is done."""
    skipped: bool = False
    """Whether it was not run, since something that it needs failed."""


def attempt(worker: Worker, cell: Cell) -> Outcome:
    """Runs a cell and keeps a log of it, so that `status` can tell what is going on."""
    started = time.monotonic()
    _log(worker.out, {"cell": cell.name, "event": "start", "host": socket.gethostname(), "pid": os.getpid()})
    error = None
    try:
        worker.work(cell)
    except SuperExpertsError as wrong:
        error = str(wrong)
    seconds = round(time.monotonic() - started, 3)
    _log(worker.out, {"cell": cell.name, "event": "failed" if error else "end", "seconds": seconds, "error": error})
    return Outcome(cell=cell.name, seconds=seconds, error=error)


def _log(out: Path, event: dict[str, Any]) -> None:
    with (out / LOG).open("ab", buffering=0) as stream:
        stream.write(json.dumps({"time": time.time(), **event}).encode() + b"\n")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Within the block no other study works in this folder."""
    with (out / ".lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another study is at work in {out}; wait for it, or choose another", field="out"
            ) from error
        yield


# ---- crews ----------------------------------------------------------------------------------------------------------


class Crew(Protocol):
    """Workers that take cells."""

    size: int

    def start(self, cell: Cell) -> None:
        """Gives a cell to a worker; there are never more than `size` at a time."""

    def next(self) -> Outcome:
        """Waits for the next cell to end."""


class _Here:
    """This process."""

    size = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ended: list[Outcome] = []

    def start(self, cell: Cell) -> None:
        self._ended.append(attempt(self._worker, cell))

    def next(self) -> Outcome:
        return self._ended.pop(0)


class _Processes:
    """Processes of this machine, each with a GPU of its own where there are any."""

    def __init__(self, plan: Plan, out: Path, device: str, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn")
        self._settings = (plan, out, device)
        self._free: list[int] = list(range(size))
        self._members = [self._hire(number) for number in range(size)]
        self._cells: dict[int, Cell] = {}
        self._attempts: dict[str, int] = {}

    def _hire(self, number: int) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, number, *self._settings), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def start(self, cell: Cell) -> None:
        number = self._free.pop(0)
        self._cells[number] = cell
        self._attempts[cell.name] = self._attempts.get(cell.name, 0) + 1
        with contextlib.suppress(OSError):  # a dead one is met in `next`
            self._members[number][1].send(cell)

    def next(self) -> Outcome:
        while True:
            busy = {self._members[number][1]: number for number in self._cells}
            for pipe in multiprocessing.connection.wait(list(busy)):
                number = busy[pipe]
                try:
                    outcome: Outcome = self._members[number][1].recv()
                except (EOFError, OSError):  # it died
                    lost = self._cells.pop(number)
                    self._members[number] = self._hire(number)
                    self._free.insert(0, number)
                    if self._attempts[lost.name] >= ATTEMPTS:
                        return Outcome(cell=lost.name, seconds=0, error=f"its process died {ATTEMPTS} times")
                    self.start(lost)
                    continue
                del self._cells[number]
                self._free.append(number)
                return outcome

    def close(self) -> None:
        for number in self._cells:  # the study was interrupted
            self._members[number][0].terminate()
        for process, pipe in self._members:
            pipe.close()
            process.join()


def _serve(pipe: Any, number: int, plan: Plan, out: Path, device: str) -> None:
    """A worker process: takes cells until the pipe is closed."""
    if torch.cuda.device_count() > 1:  # counted without a context, so that the one chosen is the only one seen
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if len(visible) > number else str(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the study then ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that temporary files go
    threading.Thread(target=_die_with_parent, daemon=True).start()
    worker = Worker(plan, out, device)
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(worker, cell))


def _die_with_parent() -> None:
    """Ends this process with the one that started it, so that no two are ever at work on the same cell."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _Ray:
    """Actors on a Ray cluster whose machines share the study's folder: one for each GPU, or for each machine."""

    def __init__(self, plan: Plan, out: Path, device: str, address: str, size: int | None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise OptionError("ray is not installed; run pip install superexperts[ray]", field="ray")
        ray: Any = importlib.import_module("ray")
        passed = {
            name: value for name, value in os.environ.items() if name.startswith(("SUPEREXPERTS_", "HF_", "OMP_"))
        }
        try:
            ray.init(address=address or None, runtime_env={"env_vars": passed}, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise OptionError(
                f"{address!r} is no cluster that answers ({error}); check the address", field="ray"
            ) from error
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._ray = ray
        self.size = size or gpus or sum(bool(node["Alive"]) for node in ray.nodes())
        hire = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=ATTEMPTS)(_Actor)
        self._free = [hire.remote(plan, out, device) for _ in range(self.size)]
        self._work: dict[Any, tuple[Any, Cell]] = {}

    def start(self, cell: Cell) -> None:
        actor = self._free.pop(0)
        self._work[actor.work.remote(cell)] = actor, cell

    def next(self) -> Outcome:
        (done,), _ = self._ray.wait(list(self._work), num_returns=1)
        actor, cell = self._work.pop(done)
        self._free.append(actor)
        try:
            outcome: Outcome = self._ray.get(done)
        except self._ray.exceptions.RayActorError:
            return Outcome(cell=cell.name, seconds=0, error=f"its worker died more than {ATTEMPTS} times")
        return outcome

    def close(self) -> None:
        self._ray.shutdown()


class _Actor:
    """A worker of a Ray cluster."""

    def __init__(self, plan: Plan, out: Path, device: str) -> None:
        self._worker = Worker(plan, out, device)

    def work(self, cell: Cell) -> Outcome:
        return attempt(self._worker, cell)


@contextlib.contextmanager
def open_crew(
    plan: Plan, out: Path, *, device: str = "auto", workers: int | None = None, ray: str | None = None
) -> Iterator[Crew]:
    """The crew that the settings ask for: `ray` is a cluster's address, or "" for the one at hand or a new one."""
    if ray is not None:
        crew = _Ray(plan, out, device, ray, workers)
        with contextlib.closing(crew):
            yield crew
        return
    size = workers or (torch.cuda.device_count() if device in ("auto", "cuda") else 0) or 1
    if size == 1:
        yield _Here(Worker(plan, out, device))
        return
    processes = _Processes(plan, out, device, size)
    with contextlib.closing(processes):
        yield processes


def schedule(
    cells: Sequence[Cell], crew: Crew, said: Callable[[Cell, int], None] = lambda cell, number: None
) -> list[Outcome]:
    """Runs the cells, each when what it needs is done; what needs a failed one is left out.

    `said` is told of each cell as it starts, and how many were started before.
    """
    waiting, running = list(cells), 0
    done: set[str] = set()
    outcomes: list[Outcome] = []
    while True:
        failed = {outcome.cell for outcome in outcomes if outcome.error}
        for cell in list(waiting):  # in their order, in which each comes after what it needs
            if failed & set(cell.needs):
                waiting.remove(cell)
                outcomes.append(Outcome(cell=cell.name, seconds=0, error="not run: what it needs failed", skipped=True))
                failed.add(cell.name)
        for cell in [cell for cell in waiting if done.issuperset(cell.needs)][: crew.size - running]:
            said(cell, len(cells) - len(waiting))
            waiting.remove(cell)
            crew.start(cell)
            running += 1
        if not running:
            assert not waiting, "cells wait for each other"
            return outcomes
        outcome = crew.next()
        running -= 1
        outcomes.append(outcome)
        if not outcome.error:
            done.add(outcome.cell)
