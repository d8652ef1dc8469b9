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
stdout = Console(highlight=False, quiet=not is_main_process)
stderr = Console(stderr=True, highlight=False, quiet=not is_main_process)


_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_shown(text: str) -> bool:
    """Whether a terminal shows all of a text and obeys none of it; half a character it cannot show."""
    return not _OBEYED.search(text)


def note(text: str) -> None:
    """A line for the person who waits; paths in it are not broken over lines."""
    stderr.print(text, soft_wrap=True, markup=False)


@contextlib.contextmanager
def progress(description: str | None, total: int) -> Iterator[Callable[[], None]]:
    """Yields a call that moves a bar on by one of `total`; there is no bar without a description or a terminal."""
    hidden = description is None or not stderr.is_terminal
    with Progress(console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(description or "", total=total)
        yield lambda: bar.advance(task)
