"""The cells of a study: which ones there are, and which others each one needs.

`status` lists them without importing the commands that they run.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from superexperts.engines import ENGINES
from superexperts.studies.plan import Plan

__all__ = ["Cell", "cells", "judged_here", "needs_checkpoints"]

Stage = Literal["data", "profile", "select", "train", "checkpoint", "evaluate", "extract"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One command of the study."""

    stage: Stage
    run: str | None = None
    """Name of the run that it belongs to; None for a cell that all runs share."""
    needs: tuple[str, ...] = ()
    """Names of the cells that must be done first."""

    @property
    def name(self) -> str:
        """Such as `train lora-super-s1`."""
        return self.stage if self.run is None else f"{self.stage} {self.run}"


def cells(plan: Plan) -> tuple[Cell, ...]:
    """All cells, each after those that it needs; runs that need no training come first."""
    shared = [Cell(stage="data")] if plan.data_dir == "pocket" else []
    data = tuple(cell.name for cell in shared)
    shared += [Cell(stage="profile", needs=data), Cell(stage="select", needs=("profile",))]
    trained = [run for run in plan.runs if run.kind == "lora"]
    found = [*shared]
    for run in [*(run for run in plan.runs if run.kind != "lora"), *trained]:
        before = data if run.kind == "base" else ("select",)
        if run.kind == "lora":
            found.append(Cell(stage="train", run=run.name, needs=before))
            before = (found[-1].name,)
        if run.kind != "base" and needs_checkpoints(plan):
            found.append(Cell(stage="checkpoint", run=run.name, needs=before))
            before = (found[-1].name,)
        found.append(Cell(stage="evaluate", run=run.name, needs=before))
        found.append(Cell(stage="extract", run=run.name, needs=(found[-1].name,)))
    if judged_here(plan):  # extract last: otherwise model and judge, both large, would be loaded in turns
        found.sort(key=lambda cell: cell.stage == "extract")
    return tuple(found)


def judged_here(plan: Plan) -> bool:
    """Whether the processes of the study load a judge."""
    return plan.extraction.get("judge", "off") != "off" and plan.extraction.get("judge_base_url") is None


def needs_checkpoints(plan: Plan) -> bool:
    """Whether the answers come from an engine that needs every variant as a separate checkpoint."""
    return not ENGINES[plan.engine].in_process
