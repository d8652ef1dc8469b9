"""Several processes on one corpus, as `accelerate launch` starts them: sharing the work, and combining the results.

Every function works in a single process as well, where it does nothing or returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

__all__ = [
    "device_of_process",
    "from_main_process",
    "gathered",
    "is_distributed",
    "my_share",
    "process_number",
    "processes_on_this_machine",
    "wait_for_all",
]

T = TypeVar("T")


def _state() -> PartialState:
    """The place of this process among the others."""
    # By itself accelerate connects processes on CPUs only if `cpu` is set.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    assert state.num_processes == int(os.environ["WORLD_SIZE"]), "the processes are not connected"
    return state


def is_distributed() -> bool:
    """Whether a launcher started this process as one of several (torch's environment variables)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def process_number() -> int:
    """The number of this process, from 0."""
    return cast(int, _state().process_index) if is_distributed() else 0


def processes_on_this_machine() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_of_process() -> torch.device | None:
    """The device for this process; None for a single process, which may choose."""
    return cast(torch.device, _state().device) if is_distributed() else None


def my_share(batches: Sequence[T]) -> Sequence[T]:
    """The batches for this process: every n-th of them, for n processes."""
    if not is_distributed():
        return batches
    state = _state()
    return batches[state.process_index :: state.num_processes]


def gathered(value: T) -> list[T]:
    """The values of all processes in order, in every process."""
    if not is_distributed():
        return [value]
    _state()  # must come first: accelerate's own functions would create a state without CPU processes
    return cast(list[T], gather_object([value]))


def from_main_process(value: Any) -> Any:
    """The value of the main process, in every process; for what is read from a disk that not all of them may share."""
    if not is_distributed():
        return value
    _state()
    return cast(list[Any], broadcast_object_list([value]))[0]


def wait_for_all() -> None:
    """Waits until every process has called this."""
    if is_distributed():
        _state().wait_for_everyone()
