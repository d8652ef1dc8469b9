"""The pocket model: a small DeepSeek-V2 with two known super experts, its world and its tokenizer.

The checkpoint in this package is an ordinary checkpoint folder. What is measured on it says nothing about any other
model: its super experts were implanted, and it was trained to depend on them (see docs/pocket.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from superexperts.core.config import PocketConfig
from superexperts.core.runs import MANIFEST, new_folder, write_manifest

__all__ = [
    "PLANTED",
    "checkpoint_dir",
    "heldout_documents",
    "run",
    "write_benchmarks",
    "write_checkpoint",
    "write_data",
]

PLANTED: tuple[tuple[int, int], ...] = ((1, 11), (3, 54))
"""(layer, expert) of the two implanted super experts"""


def checkpoint_dir() -> Path:
    """The shipped checkpoint's folder inside the package."""
    return Path(str(files(__package__) / "checkpoint"))


def write_checkpoint(folder: Path) -> None:
    """Copy the shipped checkpoint to `folder`, whole or not at all."""
    with new_folder(folder, "pocket") as temporary:
        names = sorted(source.name for source in checkpoint_dir().iterdir() if source.name != MANIFEST)
        for name in names:
            (temporary / name).write_bytes((checkpoint_dir() / name).read_bytes())
        write_manifest(temporary, "pocket", {}, names, 0)


def heldout_documents() -> Iterator[str]:
    """The pocket corpus, document by document."""
    from superexperts.pocket import world

    return world.heldout()


def write_benchmarks(folder: Path) -> None:
    """Write the pocket benchmarks alone (see `data.write_benchmarks`)."""
    from superexperts.pocket import data

    data.write_benchmarks(folder)


def write_data(folder: Path) -> None:
    """Write the pocket benchmarks, the fine-tuning rows and the held-out text (see `data.write_data`)."""
    from superexperts.pocket import data  # makes the whole world; not wanted for a look at the checkpoint

    data.write_data(folder)


def run(config: PocketConfig) -> dict[str, Any]:
    """The command: the checkpoint folder, and the world's data files if asked for."""
    write_checkpoint(config.out)
    if config.data is not None:
        write_data(config.data)
    return {"out": str(config.out)}
