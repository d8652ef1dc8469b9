"""Where text for people goes: results to standard output, progress and notes to standard error."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

__all__ = ["is_main_process", "is_shown", "note", "progress", "stderr", "stdout"]

is_main_process = os.environ.get("RANK", "0") == "0"
"""Whether this is the only process, or the first of several that a launcher started. Only the main process prints."""
# highlight=False: rich would colour numbers and paths in the output.
stdout = Console(highlight=False, quiet=not is_main_process)
stderr = Console(stderr=True, highlight=False, quiet=not is_main_process)


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_shown(text: str) -> bool:
    """Whether a terminal can print the text as it is: no control characters and no lone surrogates."""
    return not _CONTROL.search(text)


def note(text: str) -> None:
    """Prints a line about progress to standard error; long lines are not wrapped, so that paths stay whole."""
    stderr.print(text, soft_wrap=True, markup=False)


@contextlib.contextmanager
def progress(description: str | None, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function that advances a progress bar by one of `total`. No bar without description or terminal."""
    hidden = description is None or not stderr.is_terminal
    with Progress(console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(description or "", total=total)
        yield lambda: bar.advance(task)
