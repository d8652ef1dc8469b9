"""The command `status`: how far a study is. It reads what the cells have written and runs nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from superexperts.core.console import stdout
from superexperts.core.paths import require_inside
from superexperts.core.runs import read_json
from superexperts.core.settings import Switch
from superexperts.core.types import Score
from superexperts.studies.progress import cell_states, duration, is_running

if TYPE_CHECKING:
    from superexperts.studies.plan import Plan

__all__ = ["StatusConfig", "run", "show"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """How far a study is, and the table of its scores so far.

    Example: superexperts status runs/demo
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder of the study."""
    json: Switch = False
    """Print the result as JSON."""


def run(config: StatusConfig) -> dict[str, Any]:
    """The command: the state of every cell, and the scores of the runs that were evaluated and extracted."""
    file = require_inside(config.folder, "study.yaml", "folder", "the folder of a study")
    # A study's plan knows the settings of every command, which takes seconds to import; --help does not need it.
    from superexperts.studies.cell_list import cells
    from superexperts.studies.study_file import parse

    plan = parse(file.read_text(encoding="utf-8"), str(file))
    states = cell_states(config.folder, cells(plan))
    return {
        "folder": str(config.folder),
        "at_work": is_running(config.folder),
        "done": sum(state["state"] == "done" for state in states),
        "cells": states,
        "scores": _scores(config.folder, plan),
    }


def _scores(out: Path, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Run -> its scores, for the runs that have some."""
    found = {}
    for each in plan.runs:
        file = out / "variants" / each.name / "scores.json"
        if file.is_file():
            found[each.name] = [Score.from_json(row).to_json() for row in read_json(file, "scores")["scores"]]
    return found


def show(result: dict[str, Any]) -> None:
    """Print a table of the cells, and one of the scores so far."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("cell", "state", "time", ""):
        table.add_column(title)
    for row in result["cells"]:
        answers = "" if not row["answers"] else f"{row['answers']:,} answers"
        time = duration(row["seconds"]) if row["seconds"] else ""
        table.add_row(Text(row["cell"]), row["state"], time, Text(row["error"] or answers))
    stdout.print(table)
    running = "a study is running" if result["at_work"] else "no study is running"
    stdout.print(
        f"{result['done']} of {len(result['cells'])} cells are done; {running} in {result['folder']}", soft_wrap=True
    )
    tasks = list(dict.fromkeys(score["task"] for scores in result["scores"].values() for score in scores))
    if not tasks:
        return
    table = Table(box=box.SIMPLE_HEAD, caption="accuracy in %, so far and without tests", caption_justify="left")
    for title in ("run", *tasks):
        table.add_column(title, justify="left" if title == "run" else "right")
    for name, scores in result["scores"].items():
        by_task = {score["task"]: f"{100 * score['accuracy']:.1f}" for score in scores}
        table.add_row(Text(name), *(by_task.get(task, "") for task in tasks))
    stdout.print(table)
