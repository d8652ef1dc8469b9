"""Several processes on one corpus, as `accelerate launch` starts them: who takes which batch, and one result of all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .recorder import Recorder

__all__ = [
    "agreed",
    "device_of_process",
    "gathered",
    "merged",
    "my_share",
    "process_number",
    "processes_here",
    "several",
    "together",
]

T = TypeVar("T")


def my_share(batches: Sequence[T]) -> Sequence[T]:
    """Every n-th batch, n processes being at work."""
    if not several():
        return batches
    state = PartialState()
    return batches[state.process_index :: state.num_processes]


def merged(recorder: Recorder) -> Recorder:
    """What all processes recorded, in each of them: exactly what one process records of all batches."""
    if not several():
        return recorder
    total, *others = cast(list[Recorder], gather_object([recorder.cpu()]))
    for other in others:
        total.merge(other)
    return total


def gathered(value: T) -> list[T]:
    """What every process gives, in each of them, the first process' first."""
    return cast(list[T], gather_object([value])) if several() else [value]


def process_number() -> int:
    """0 for the only process, or for the first of several."""
    return cast(int, PartialState().process_index) if several() else 0


def agreed(value: Any) -> Any:
    """The first process' value, in all of them: what is on a disk, which may not be every one's."""
    return cast(list[Any], broadcast_object_list([value]))[0] if several() else value


def device_of_process() -> torch.device | None:
    """The device that this process of several is to use; None where it is the only one."""
    return cast(torch.device, PartialState().device) if several() else None


def together() -> None:
    """Every process waits here for the others."""
    if several():
        PartialState().wait_for_everyone()


def processes_here() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def several() -> bool:
    """Whether a launcher started this process as one of several (torch's own convention)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
