"""How far the cells of a study are, from the log that they write and the files that they leave."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from superexperts.studies.cell_list import Cell

__all__ = ["LOCK", "LOG", "cell_states", "duration", "is_running", "write_event"]

LOG = "progress.jsonl"
"""Has one line for the start of each cell and one for its end."""
LOCK = ".lock"
"""The file that a running study locks."""


def write_event(out: Path, event: dict[str, Any]) -> None:
    """Add a line with the current time to the log; several processes may write to it at once."""
    # Unbuffered and opened for appending: each line is one write, so lines of different processes do not mix.
    with (out / LOG).open("ab", buffering=0) as stream:
        stream.write(json.dumps({"time": time.time(), **event}).encode() + b"\n")


def cell_states(out: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The state of each cell (waiting, running, interrupted, failed, done), its seconds, and its answers so far."""
    last = _last_events(out)
    started = "running" if is_running(out) else "interrupted"
    states = {"": "waiting", "start": started, "end": "done", "failed": "failed"}
    found = []
    for cell in cells:
        event = last.get(cell.name, {})
        state = states[event.get("event", "")]
        seconds = event.get("seconds", time.time() - event["time"] if state == "running" else 0.0)
        answers = _answers(out / "variants" / cell.run) if cell.run and cell.stage == "evaluate" else None
        row = {"cell": cell.name, "state": state, "seconds": seconds, "answers": answers, "error": event.get("error")}
        found.append(row)
    return found


def _last_events(out: Path) -> dict[str, dict[str, Any]]:
    """The last line of each cell in the log. A cell that was up to date keeps the longest time that it ever took."""
    last: dict[str, dict[str, Any]] = {}
    longest: dict[str, float] = {}
    file = out / LOG
    if not file.is_file():
        return last
    for line in file.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a killed process can leave half a line
            continue
        name = event["cell"]
        if event["event"] == "end":
            longest[name] = event["seconds"] = max(event["seconds"], longest.get(name, 0.0))
        last[name] = event
    return last


def is_running(out: Path) -> bool:
    """Whether a study holds the folder's lock."""
    lock = out / LOCK
    if not lock.is_file():
        return False
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _answers(folder: Path) -> int:
    """The number of answers in the folder of a run, those of an unfinished benchmark included."""
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


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `3.4 h`."""
    if seconds < 99.5:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
