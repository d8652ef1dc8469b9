"""Where the cells of a study run: in this process, in one process for each GPU, or in the actors of a Ray cluster.

A pool of workers takes cells and returns outcomes; `schedule` starts each cell as soon as the cells that it needs are
done. When a worker dies, its cell is run again and continues from what is on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import importlib.util
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
from superexperts.studies.cell_list import Cell
from superexperts.studies.cells import Worker
from superexperts.studies.plan import Plan
from superexperts.studies.progress import LOCK, write_event

__all__ = ["Outcome", "Workers", "locked", "open_workers", "schedule"]

ATTEMPTS = 3
"""How many workers may die of a cell before the study gives the cell up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended."""

    cell: str
    seconds: float
    error: str | None = None
    """The message of the command's error; None if the cell is done."""
    skipped: bool = False
    """Whether it was not run because a cell that it needs failed."""


def attempt(worker: Worker, cell: Cell) -> Outcome:
    """Run a cell and write its start and end to the log, which `status` reads."""
    started = time.monotonic()
    write_event(worker.out, {"cell": cell.name, "event": "start", "host": socket.gethostname(), "pid": os.getpid()})
    error = None
    try:
        worker.work(cell)
    except SuperExpertsError as wrong:
        error = str(wrong)
    seconds = round(time.monotonic() - started, 3)
    write_event(
        worker.out, {"cell": cell.name, "event": "failed" if error else "end", "seconds": seconds, "error": error}
    )
    return Outcome(cell=cell.name, seconds=seconds, error=error)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock inside the block; `OutputError` if another study holds it."""
    with (out / LOCK).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another study is running in {out}; wait for it or choose another folder", field="out"
            ) from error
        yield


# ---- pools of workers -----------------------------------------------------------------------------------------------


class Workers(Protocol):
    """A pool of workers that take cells."""

    size: int

    def start(self, cell: Cell) -> None:
        """Give a cell to a free worker; the caller never starts more than `size` at a time."""

    def next(self) -> Outcome:
        """Wait for the next cell to end."""


class _ThisProcess:
    """The pool of one: this process."""

    size = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._ended: list[Outcome] = []

    def start(self, cell: Cell) -> None:
        self._ended.append(attempt(self._worker, cell))

    def next(self) -> Outcome:
        return self._ended.pop(0)


class _Processes:
    """Processes of this machine, each with its own GPU where there are several."""

    def __init__(self, plan: Plan, out: Path, device: str, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA once its parent has
        self._settings = (plan, out, device)
        self._free: list[int] = list(range(size))
        self._workers = [self._start_worker(number) for number in range(size)]
        self._cells: dict[int, Cell] = {}
        self._attempts: dict[str, int] = {}

    def _start_worker(self, number: int) -> tuple[Any, Any]:
        our_end, worker_end = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(worker_end, number, *self._settings), daemon=True)
        process.start()
        worker_end.close()
        return process, our_end

    def start(self, cell: Cell) -> None:
        number = self._free.pop(0)
        self._cells[number] = cell
        self._attempts[cell.name] = self._attempts.get(cell.name, 0) + 1
        with contextlib.suppress(OSError):  # `next` notices a dead worker
            self._workers[number][1].send(cell)

    def next(self) -> Outcome:
        while True:
            busy = {self._workers[number][1]: number for number in self._cells}
            for pipe in multiprocessing.connection.wait(list(busy)):
                number = busy[pipe]
                try:
                    outcome: Outcome = self._workers[number][1].recv()
                except (EOFError, OSError):  # it died
                    lost = self._cells.pop(number)
                    self._workers[number] = self._start_worker(number)
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
            self._workers[number][0].terminate()
        for process, pipe in self._workers:
            pipe.close()
            process.join()


def _serve(pipe: Any, number: int, plan: Plan, out: Path, device: str) -> None:
    """The main function of a worker process: runs cells until the pipe is closed."""
    if torch.cuda.device_count() > 1:  # counting creates no CUDA context, so the variable set below still takes effect
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if len(visible) > number else str(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the study then ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that temporary files are removed
    threading.Thread(target=_die_with_parent, daemon=True).start()
    worker = Worker(plan, out, device)
    while True:
        try:
            cell = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(worker, cell))


def _die_with_parent() -> None:
    """End this process when the study dies, so that a later study never works on the same cell at the same time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


class _Ray:
    """Actors on a Ray cluster, one for each GPU, or for each machine. All machines must share the study's folder."""

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
                f"{address!r} does not answer as a Ray cluster ({error}); check the address", field="ray"
            ) from error
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._ray = ray
        self.size = size or gpus or sum(bool(node["Alive"]) for node in ray.nodes())
        make_actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=ATTEMPTS)(
            _Actor
        )
        self._free = [make_actor.remote(plan, out, device) for _ in range(self.size)]
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
def open_workers(
    plan: Plan, out: Path, *, device: str = "auto", count: int | None = None, ray: str | None = None
) -> Iterator[Workers]:
    """A pool of `count` workers, by default one for each GPU.

    `ray` is the address of a Ray cluster, or "" for the cluster of this machine or a new one.
    """
    if ray is not None:
        actors = _Ray(plan, out, device, ray, count)
        with contextlib.closing(actors):
            yield actors
        return
    size = count or (torch.cuda.device_count() if device in ("auto", "cuda") else 0) or 1
    if size == 1:
        yield _ThisProcess(Worker(plan, out, device))
        return
    processes = _Processes(plan, out, device, size)
    with contextlib.closing(processes):
        yield processes


def schedule(
    cells: Sequence[Cell], workers: Workers, announce: Callable[[Cell, int], None] = lambda cell, number: None
) -> list[Outcome]:
    """Run each cell when the cells that it needs are done; skip those that need a failed one.

    `announce` is called with each cell that starts and the number of cells started or skipped before it.
    """
    waiting, running = list(cells), 0
    done: set[str] = set()
    outcomes: list[Outcome] = []
    while True:
        failed = {outcome.cell for outcome in outcomes if outcome.error}
        for cell in list(waiting):  # every cell comes after those that it needs, so one pass finds them all
            if failed & set(cell.needs):
                waiting.remove(cell)
                outcomes.append(Outcome(cell=cell.name, seconds=0, error="not run: what it needs failed", skipped=True))
                failed.add(cell.name)
        for cell in [cell for cell in waiting if done.issuperset(cell.needs)][: workers.size - running]:
            announce(cell, len(cells) - len(waiting))
            waiting.remove(cell)
            workers.start(cell)
            running += 1
        if not running:
            assert not waiting, "cells wait for each other"
            return outcomes
        outcome = workers.next()
        running -= 1
        outcomes.append(outcome)
        if not outcome.error:
            done.add(outcome.cell)
