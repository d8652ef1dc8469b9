"""What a command's result looks like in a terminal."""

from __future__ import annotations

from typing import Any

from superexperts.core.console import stdout

__all__ = ["show"]


def show(command: str, result: dict[str, Any]) -> None:
    """Prints a command's result for a person; model output goes through `ascii` and `Text`."""
    if command == "evaluate":
        for task, items in result["tasks"].items():
            stdout.print(f"{task}: {items} answers")
        if result["perplexity"] is not None:
            interval = result["perplexity_interval"]
            told = f" (95%: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            stdout.print(f"perplexity: {result['perplexity']:.3f}{told}")
    if "out" in result:
        stdout.print(f"in {result['out']}", soft_wrap=True)
