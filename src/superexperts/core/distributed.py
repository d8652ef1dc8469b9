"""Several processes on one corpus, as `accelerate launch` starts them: who takes which batch, and one result of all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

__all__ = [
    "agreed",
    "device_of_process",
    "gathered",
    "my_share",
    "process_number",
    "processes_here",
    "several",
    "together",
]

T = TypeVar("T")


def _state() -> PartialState:
    """This process' place among the others. Left alone, accelerate joins processes on a CPU only if it is told to."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    assert state.num_processes == int(os.environ["WORLD_SIZE"]), "the processes do not know of each other"
    return state


def my_share(batches: Sequence[T]) -> Sequence[T]:
    """Every n-th batch, n processes being at work."""
    if not several():
        return batches
    state = _state()
    return batches[state.process_index :: state.num_processes]


def gathered(value: T) -> list[T]:
    """What every process gives, in each of them, the first process' first."""
    if not several():
        return [value]
    _state()  # first: accelerate's own functions would make one that knows no CPU's processes
    return cast(list[T], gather_object([value]))


def process_number() -> int:
    """0 for the only process, or for the first of several."""
    return cast(int, _state().process_index) if several() else 0


def agreed(value: Any) -> Any:
    """The first process' value, in all of them: what is on a disk, which may not be every one's."""
    if not several():
        return value
    _state()
    return cast(list[Any], broadcast_object_list([value]))[0]


def device_of_process() -> torch.device | None:
    """The device that this process of several is to use; None where it is the only one."""
    return cast(torch.device, _state().device) if several() else None


def together() -> None:
    """Every process waits here for the others."""
    if several():
        _state().wait_for_everyone()


def processes_here() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def several() -> bool:
    """Whether a launcher started this process as one of several (torch's own convention)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
