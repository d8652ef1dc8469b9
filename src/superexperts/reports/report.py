"""`superexperts report`: writes the report of a study again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from superexperts.core.console import stdout
from superexperts.core.paths import require_inside
from superexperts.core.settings import Switch

__all__ = ["ReportConfig", "run", "show", "write_report"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html again from a study's results.

    Example: superexperts report runs/demo
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder with results.json."""
    json: Switch = False
    """Print the result as JSON."""


def run(config: ReportConfig) -> dict[str, Any]:
    """Writes report.html, report.md and figures/ into a study's folder."""
    return {"out": str(config.folder), "report": str(write_report(config.folder))}


def check(config: ReportConfig) -> None:
    """What is wrong without looking into the files, before any library is imported."""
    require_inside(config.folder, "results.json", "folder", "the folder of a finished study")


def show(result: dict[str, Any]) -> None:
    """Prints where the report is."""
    stdout.print(f"in {result['out']}", soft_wrap=True)


def write_report(folder: Path) -> Path:
    """Writes the report of the study in `folder`; returns the path of report.html."""
    # Imported here so that --help and wrong options do not wait for matplotlib, torch and the other commands.
    from superexperts.evaluation.evaluate import EvaluateConfig
    from superexperts.profiling.profile import ProfileConfig
    from superexperts.reports import page
    from superexperts.surgery.prune import PruneConfig
    from superexperts.training.train import TrainConfig

    settings = {"profile": ProfileConfig, "prune": PruneConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
    return page.write_report(folder, settings)
