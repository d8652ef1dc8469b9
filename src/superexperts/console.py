"""Where text for people goes: results to standard output, progress and notes to standard error."""

from __future__ import annotations

from rich.console import Console

__all__ = ["note", "stderr", "stdout"]

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A line for the person who waits; paths in it are not broken over lines."""
    stderr.print(text, soft_wrap=True, markup=False)
