"""How far a study is: `superexperts status DIR`. Reads what the cells have written, and starts nothing."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superexperts.core.config_study import StatusConfig
from superexperts.core.errors import DataError
from superexperts.core.runs import read_json
from superexperts.core.types import Score
from superexperts.studies.cells import Cell, cells
from superexperts.studies.plan import Plan, parse

__all__ = ["LOG", "cell_states", "run"]

LOG = "progress.jsonl"
"""A line as each cell starts, and one as it ends."""


def run(config: StatusConfig) -> dict[str, Any]:
    """The command: every cell's state, and the scores of the runs that were asked already."""
    file = config.folder / "study.yaml"
    if not file.is_file():
        raise DataError(f"{config.folder} has no study.yaml; give the folder of a study", field="folder")
    plan = parse(file.read_text(encoding="utf-8"), str(file))
    states = cell_states(config.folder, cells(plan))
    return {
        "folder": str(config.folder),
        "at_work": _at_work(config.folder),
        "done": sum(state["state"] == "done" for state in states),
        "cells": states,
        "scores": _scores(config.folder, plan),
    }


def cell_states(out: Path, todo: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each cell its state (waiting, running, interrupted, failed, done), seconds, and the answers there so far."""
    last = _last_events(out)
    at_work = _at_work(out)
    found = []
    for cell in todo:
        event = last.get(cell.name, {})
        begun = "running" if at_work else "interrupted"
        states = {"": "waiting", "start": begun, "end": "done", "failed": "failed"}
        state = states[event.get("event", "")]
        seconds = event.get("seconds", time.time() - event["time"] if state == "running" else 0.0)
        answers = _answers(out / "variants" / cell.run) if cell.run and cell.stage == "evaluate" else None
        row = {"cell": cell.name, "state": state, "seconds": seconds, "answers": answers, "error": event.get("error")}
        found.append(row)
    return found


def _last_events(out: Path) -> dict[str, dict[str, Any]]:
    """The last line of each cell in the log; a cell that was found done at once keeps the time that it took before."""
    last: dict[str, dict[str, Any]] = {}
    took: dict[str, float] = {}
    file = out / LOG
    if not file.is_file():
        return last
    for line in file.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # half a line is what a kill left
            continue
        name = event["cell"]
        if event["event"] == "end":
            took[name] = event["seconds"] = max(event["seconds"], took.get(name, 0.0))
        last[name] = event
    return last


def _at_work(out: Path) -> bool:
    """Whether a study holds the folder's lock."""
    lock = out / ".lock"
    if not lock.is_file():
        return False
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _answers(folder: Path) -> int:
    """Answers that a run has, finished or not."""
    count = 0
    for file in (folder / "answers").glob("*.jsonl"):
        with file.open("rb") as stream:
            count += sum(1 for _ in stream)
    for file in (folder / "answers").glob(".*.partial"):
        for line in file.read_bytes().splitlines()[1:]:
            try:
                count += len(json.loads(line)["answers"])
            except ValueError:
                break
    return count


def _scores(out: Path, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Run -> scores, of those that were extracted."""
    found = {}
    for each in plan.runs:
        file = out / "variants" / each.name / "scores.json"
        if file.is_file():
            found[each.name] = [Score.from_json(row).to_json() for row in read_json(file, "scores")["scores"]]
    return found
