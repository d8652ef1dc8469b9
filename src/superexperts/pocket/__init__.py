"""The pocket model: a small DeepSeek-V2 with two known super experts, its benchmarks and its text, as files.

The checkpoint in this package is an ordinary checkpoint folder. What is measured on it says nothing about any other
model: its super experts were implanted, and it was trained to depend on them (docs/pocket.md). The programs that built
the checkpoint and the data files are in tools/pocket/ of the repository.

This is also the command `pocket`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from superexperts.core.console import stdout
from superexperts.core.runs import MANIFEST, new_folder, write_bytes, write_manifest
from superexperts.core.settings import Switch

__all__ = [
    "PLANTED",
    "PocketConfig",
    "checkpoint_dir",
    "data_dir",
    "heldout_documents",
    "run",
    "show",
    "write_benchmarks",
    "write_checkpoint",
    "write_data",
]

PLANTED: tuple[tuple[int, int], ...] = ((1, 11), (3, 54))
"""(layer, expert) of the two implanted super experts"""
TRAINING_ROWS = "train.json"
HELDOUT = "pocket_heldout.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PocketConfig:
    """Write the embedded model as an ordinary checkpoint folder, and its benchmark files if asked.

    Example: superexperts pocket --out runs/pocket
    """

    out: Path
    """Folder of the checkpoint."""
    data: Path | None = None
    """Also write the pocket world's benchmark, training and corpus files here."""
    json: Switch = False
    """Print the result as JSON."""


def run(config: PocketConfig) -> dict[str, Any]:
    """The command: the checkpoint folder, and the world's data files if asked for."""
    write_checkpoint(config.out)
    if config.data is not None:
        write_data(config.data)
    return {"out": str(config.out)}


def show(result: dict[str, Any]) -> None:
    """Print the folder of the checkpoint."""
    stdout.print(f"in {result['out']}", soft_wrap=True)


def checkpoint_dir() -> Path:
    """The shipped checkpoint's folder inside the package."""
    return Path(str(files(__package__) / "checkpoint"))


def data_dir() -> Path:
    """The folder of the shipped data files inside the package; each of them is compressed."""
    return Path(str(files(__package__) / "data"))


def write_checkpoint(folder: Path) -> None:
    """Copy the shipped checkpoint to `folder`, whole or not at all."""
    with new_folder(folder, "pocket") as temporary:
        names = sorted(source.name for source in checkpoint_dir().iterdir() if source.name != MANIFEST)
        for name in names:
            (temporary / name).write_bytes((checkpoint_dir() / name).read_bytes())
        write_manifest(temporary, "pocket", {}, names, 0)


def heldout_documents() -> Iterator[str]:
    """The corpus `pocket`, document by document: 600 texts that the pocket model was not trained on."""
    for line in _content(HELDOUT).splitlines():
        text: str = json.loads(line)["text"]
        yield text


def write_benchmarks(folder: Path) -> None:
    """Write the six benchmarks and their few-shot examples into a folder.

    The files are called like the slices of the real benchmarks, so that the same code reads both.
    """
    _write(folder, _names() - {TRAINING_ROWS, HELDOUT})


def write_data(folder: Path) -> None:
    """Write the benchmarks, the fine-tuning rows (`train.json`) and the held-out text into a folder."""
    _write(folder, _names())


def _write(folder: Path, names: Iterable[str]) -> None:
    for name in sorted(names):
        write_bytes(folder / name, _content(name))


def _names() -> set[str]:
    return {file.stem for file in data_dir().iterdir() if file.suffix == ".gz"}


def _content(name: str) -> bytes:
    return gzip.decompress((data_dir() / f"{name}.gz").read_bytes())
