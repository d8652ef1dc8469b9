"""What a planned study, and one that is under way, look like in a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from superexperts.core.console import stdout

__all__ = ["duration", "show_plan", "show_status"]


def show_plan(plan: dict[str, Any]) -> None:
    """The cells of `study --dry-run`."""
    table = Table(box=box.SIMPLE_HEAD)
    for title, side in (("cell", "left"), ("state", "left"), ("time", "right"), ("GiB", "right"), ("from", "left")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for row in plan["cells"]:
        gib = f"{row['gib']:.1f}" if row["gib"] else ""
        time = "" if row["state"] == "done" else duration(row["seconds"])
        table.add_row(Text(row["cell"]), row["state"], time, gib, row["basis"])
    stdout.print(table)
    stdout.print(
        f"about {duration(plan['seconds'])} on one {plan['device']}, up to {plan['gib']:.1f} GiB; model of "
        f"{plan['parameters'] / 1e6:,.1f} M parameters, {plan['active_parameters'] / 1e6:,.1f} M for each token",
        soft_wrap=True,
    )
    stdout.print(
        f"estimated from {plan['teraflops']:.3g} TFLOP/s and {plan['gigabytes_per_second']:.3g} GB/s, every answer as "
        "long as it may be; nothing was run",
        soft_wrap=True,
    )


def show_status(status: dict[str, Any]) -> None:
    """How far each cell is, and the scores so far."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("cell", "state", "time", ""):
        table.add_column(title)
    for row in status["cells"]:
        answers = "" if not row["answers"] else f"{row['answers']:,} answers"
        time = duration(row["seconds"]) if row["seconds"] else ""
        table.add_row(Text(row["cell"]), row["state"], time, Text(row["error"] or answers))
    stdout.print(table)
    told = "a study is at work" if status["at_work"] else "no study is at work"
    stdout.print(
        f"{status['done']} of {len(status['cells'])} cells are done; {told} in {status['folder']}", soft_wrap=True
    )
    tasks = list(dict.fromkeys(score["task"] for scores in status["scores"].values() for score in scores))
    if not tasks:
        return
    table = Table(box=box.SIMPLE_HEAD, caption="accuracy in %, so far and without tests", caption_justify="left")
    for title in ("run", *tasks):
        table.add_column(title, justify="left" if title == "run" else "right")
    for run, scores in status["scores"].items():
        by_task = {score["task"]: f"{100 * score['accuracy']:.1f}" for score in scores}
        table.add_row(Text(run), *(by_task.get(task, "") for task in tasks))
    stdout.print(table)


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `3.4 h`."""
    if seconds < 99.5:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
