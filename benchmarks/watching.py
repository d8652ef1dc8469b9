"""Time and peak memory of a command, and the resident memory of this process."""

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
    """The largest value of `measure` while it ran."""
    output: str
    """What it wrote to standard output."""
    errors: str
    """What it wrote to standard error."""


def watched(command: Sequence[str], measure: Callable[[int], int], code: int = 0) -> Ran:
    """Runs a command in a separate process and calls `measure` with its process id every 10 ms. `SystemExit` with the
    text of standard error if its exit code is not `code`."""
    peak = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=output, stderr=errors) as child:
            while child.poll() is None:
                peak = max(peak, measure(child.pid))
                time.sleep(0.01)
        seconds = time.perf_counter() - begin
        output.seek(0)
        errors.seek(0)
        ran = Ran(seconds, peak, output.read(), errors.read())
    if child.returncode != code:
        raise SystemExit(ran.errors or f"exit code {child.returncode}: {' '.join(command)}")
    return ran


def resident(field: str, process: int | str = "self") -> int:
    """Bytes that a process has resident now (field VmRSS) or had at its peak (VmHWM); 0 for one that has just ended.

    `getrusage` would not do: the peak of a child starts at the peak of its parent."""
    status = Path(f"/proc/{process}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), 0)


def forget_peak() -> None:
    """Resets the peak (VmHWM) of this process."""
    Path("/proc/self/clear_refs").write_text("5")
