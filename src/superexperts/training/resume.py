"""The folder of checkpoints from which a killed training goes on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from superexperts.core.console import is_main_process, note
from superexperts.core.errors import DataError, Field, OptionError, SuperExpertsError
from superexperts.core.runs import read_json, write_json

__all__ = [
    "COMPLETE",
    "checkpoint_to_resume",
    "checkpoints_folder",
    "kept_when_killed",
    "last_checkpoint",
    "require_something_to_resume",
]

COMPLETE = "complete.json"
"""Written into a checkpoint last of all: a checkpoint without it was cut off by a kill."""


def checkpoints_folder(out: Path) -> Path:
    """Where a training into `out` keeps its checkpoints. The folder exists while it runs, and after it was killed."""
    return out.with_name(f".{out.name}.checkpoints")


def require_something_to_resume(out: Path) -> None:
    """`OptionError` if no training into `out` was killed. One killed before its first checkpoint can be resumed."""
    if not checkpoints_folder(out).is_dir():
        raise OptionError(
            "nothing to resume: no unfinished training into ", Field("out"), f" {out} was found; leave it out to start "
            "a new one", field="resume",
        )  # fmt: skip


def checkpoint_to_resume(work: Path, key: str, *, resume: bool) -> Path | None:
    """The checkpoint in `work` to go on from, if any; without one, `work` is cleared for a training that starts anew.

    `key` stands for the settings, data and model of the training: checkpoints of another key are an `OptionError`.
    Every process calls this.
    """
    from superexperts.core.distributed import wait_for_all  # here, because it imports torch

    checkpoint = None
    if resume:
        exists = (work / "key.json").is_file()
        if exists and read_json(work / "key.json", "resume") != key:
            raise OptionError(
                f"the checkpoints in {work} belong to other settings, data or model; leave it out to start anew",
                field="resume",
            )
        checkpoint = last_checkpoint(work) if exists else None
        if checkpoint is None:
            note("train: there is no checkpoint to resume from, training starts at the first step")
    wait_for_all()  # every process has looked before the main one clears the folder
    if is_main_process and checkpoint is None:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "key.json", key)
    wait_for_all()
    return checkpoint


def last_checkpoint(work: Path) -> Path | None:
    """The latest complete checkpoint; `DataError` if it was written by another number of processes."""
    found = {int(match[1]): path for path in work.glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))}
    complete = [step for step, path in found.items() if (path / COMPLETE).is_file()]
    if not complete:
        return None
    checkpoint, processes = found[max(complete)], int(os.environ.get("WORLD_SIZE", "1"))
    before = read_json(checkpoint / COMPLETE, "resume")["processes"]
    if before != processes:
        raise DataError(
            f"{checkpoint} was written by {before} processes, now there are {processes}; start as many, or leave ",
            Field("resume"),
            " out",
            field="resume",
        )
    return checkpoint


@contextlib.contextmanager
def kept_when_killed(work: Path) -> Iterator[None]:
    """Removes the checkpoints after an error, which training again would run into too; an interruption leaves them."""
    try:
        yield
    except SuperExpertsError:
        if is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        raise
