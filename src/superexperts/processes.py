"""Several processes on one corpus, as `accelerate launch` starts them: who takes which batch, and one result of all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from .recorder import Recorder

__all__ = ["agreed", "device_of_process", "merged", "my_share", "of_several", "processes_here", "several", "together"]


def of_several() -> PartialState:
    """Accelerate's view of this process among those that were started together.

    Accelerate has to be told that they are without accelerators; else each takes itself for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def my_share(batches: Sequence[int]) -> Sequence[int]:
    """Every n-th batch, n processes being at work."""
    if not several():
        return batches
    state = of_several()
    return batches[state.process_index :: state.num_processes]


def merged(recorder: Recorder) -> Recorder:
    """What all processes recorded, in each of them: exactly what one process records of all batches."""
    if not several():
        return recorder
    of_several()
    total, *others = cast(list[Recorder], gather_object([recorder.cpu()]))
    for other in others:
        total.merge(other)
    return total


def agreed(value: Any) -> Any:
    """The first process' value, in all of them: what is on a disk, which may not be every one's."""
    if not several():
        return value
    of_several()
    return cast(list[Any], broadcast_object_list([value]))[0]


def device_of_process() -> torch.device | None:
    """The device that this process of several is to use; None where it is the only one."""
    return cast(torch.device, of_several().device) if several() else None


def together() -> None:
    """Every process waits here for the others."""
    if several():
        of_several().wait_for_everyone()


def processes_here() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def several() -> bool:
    """Whether a launcher started this process as one of several (torch's own convention)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
