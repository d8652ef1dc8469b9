"""How much memory a process has resident, this one or a command's, and how long the command takes."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ran", "forget_peak", "resident", "watched"]


class Ran(NamedTuple):
    seconds: float
    peak: int
    """The largest of what was measured while it ran."""
    said: str
    errors: str
    """What it wrote to standard error."""


def watched(command: Sequence[str], measure: Callable[[int], int]) -> Ran:
    """Runs a command in a process of its own, whose number `measure` gets again and again. `SystemExit` if it fails."""
    peak = 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=said, stderr=errors) as child:
            while child.poll() is None:
                peak = max(peak, measure(child.pid))
                time.sleep(0.01)
        seconds = time.perf_counter() - begin
        said.seek(0)
        errors.seek(0)
        ran = Ran(seconds, peak, said.read(), errors.read())
    if child.returncode:
        raise SystemExit(ran.errors)
    return ran


def resident(field: str, process: int | str = "self") -> int:
    """Bytes that a process has resident, now (VmRSS) or had at its peak (VmHWM); 0 for one that has just ended. What
    `getrusage` says of a child is never less than its parent's own peak when it began."""
    status = Path(f"/proc/{process}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def forget_peak() -> None:
    """Lets this process's peak (VmHWM) begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
