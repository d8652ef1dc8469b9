"""The pocket model: a small DeepSeek-V2 with two known super experts, its world and its tokenizer.

The checkpoint in this package is an ordinary checkpoint folder. What is measured on it says nothing about any other
model: its super experts were implanted, and it was trained to depend on them (see docs/pocket.md).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..rundir import new_folder

__all__ = ["PLANTED", "checkpoint_dir", "write_checkpoint", "write_data"]

PLANTED: tuple[tuple[int, int], ...] = ((1, 11), (3, 54))
"""(layer, expert) of the two implanted super experts"""


def checkpoint_dir() -> Path:
    """The shipped checkpoint's folder inside the package."""
    return Path(str(files(__package__) / "checkpoint"))


def write_checkpoint(folder: Path) -> None:
    """Copy the shipped checkpoint to `folder`, whole or not at all."""
    with new_folder(folder, "pocket") as temporary:
        for source in sorted(checkpoint_dir().iterdir()):
            (temporary / source.name).write_bytes(source.read_bytes())


def write_data(folder: Path) -> None:
    """Write the pocket benchmarks, the fine-tuning rows and the held-out text (see `data.write_data`)."""
    from superexperts.pocket import data  # makes the whole world; not wanted for a look at the checkpoint

    data.write_data(folder)
