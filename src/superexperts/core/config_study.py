"""The settings of `study` and `status`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from superexperts.core.errors import Field
from superexperts.core.settings import Switch, require, require_device

__all__ = ["StatusConfig", "StudyConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Everything from the checkpoint to the report; what is done already is not done again.

    Example: superexperts study --demo

    Example: superexperts study study.yaml --init

    Example: superexperts study recipes/deepseek-v2-lite.yaml --dry-run
    """

    study: Positional[Annotated[Path | None, tyro.conf.arg(metavar="STUDY")]] = None
    """Study file (YAML)."""
    demo: Switch = False
    """The built-in study of the pocket model."""
    init: Switch = False
    """Write a study file with comments to STUDY.yaml, and run nothing."""
    dry_run: Switch = False
    """Check the study file and show what would be run, how long it may take and in how much memory; run nothing."""
    out: Path | None = None
    """Folder of the study; default: runs/NAME."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` takes every GPU of this machine, with a process for each."""
    workers: int | None = None
    """Processes that run cells side by side; default: one for each GPU, or one."""
    ray: str | None = None
    """Run the cells on the Ray cluster at this ADDRESS whose machines share the folder; without an address on the one
    at hand, or a new one on this machine."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        one = (self.study is None) == self.demo
        require(one, "study", str(self.study), "and ", Field("demo"), ": give exactly one of the two")
        require(not (self.init and (self.demo or self.dry_run)), "init", True, "goes with STUDY.yaml alone")
        require_device(self.device)
        require(self.workers is None or self.workers > 0, "workers", self.workers, "is not positive; give at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """How far a study is, and the table of what is there so far.

    Example: superexperts status runs/demo
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder of the study."""
    json: Switch = False
    """Print the result as JSON."""
