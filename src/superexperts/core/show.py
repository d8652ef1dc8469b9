"""What a command's result looks like in a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from superexperts.core.console import stdout
from superexperts.core.types import key_name

__all__ = ["show"]


def show(command: str, result: dict[str, Any]) -> None:
    """Prints a command's result for a person; model output goes through `ascii` and `Text`."""
    if command == "profile":
        _show_profile(result)
    elif command == "evaluate":
        for task, items in result["tasks"].items():
            stdout.print(f"{task}: {items} answers")
        if result["perplexity"] is not None:
            interval = result["perplexity_interval"]
            told = f" (95%: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            stdout.print(f"perplexity: {result['perplexity']:.3f}{told}")
    if "out" in result:
        stdout.print(f"in {result['out']}", soft_wrap=True)


def _show_profile(result: dict[str, Any]) -> None:
    peak = "output_max" if result["statistic"] == "all" else "first_token_output_max"
    for name, corpus in result["corpora"].items():
        found = {tuple(key) for key in corpus["super"]}
        told = f"{len(found)} super expert{'s' * (len(found) != 1)}; experts reached by no token: {corpus['unreached']}"
        if corpus["stable"] is not None:
            told += f"; {'the same' if corpus['stable'] else 'not the same'} over the last rounds of the quick look"
        if result["layers_run"] < result["num_layers"]:
            told += f"; layers 0 to {result['layers_run'] - 1} of {result['num_layers']} were run (--depth)"
        title = f"peaks of |down_proj output|: {result['model']} on {name}, {corpus['tokens']:,} tokens"
        table = Table(title=title)
        for column in ("expert", "peak", "channel", "position", "token", "tokens routed", "super"):
            table.add_column(column, justify="left" if column in ("expert", "token", "super") else "right")
        for row in corpus["top"]:
            key = (row["layer"], row["expert"])
            table.add_row(
                key_name(key),
                f"{row[peak]:.4g}",
                str(row["channel"]),
                str(row["position"]),
                Text(ascii(row["token"])),
                f"{row['tokens']:,}",
                "yes" if key in found else "",
            )
        stdout.print(table)
        stdout.print(told, soft_wrap=True)
    if result["sinks"] is not None:
        for row in result["sinks"]["layers"]:
            before, after = (100 * sum(row[side]) / len(row[side]) for side in ("before", "after"))
            decay = "no head has a sink" if row["decay"] is None else f"decay (D_sink) {100 * row['decay']:.1f}%"
            told = f"{before:.1f}% of attention on the first token, {after:.1f}% without them"
            stdout.print(f"layer {row['layer']}: {told}; {decay}", soft_wrap=True)
    if result["stability"] is not None:
        _show_stability(result["stability"])


def _show_stability(result: dict[str, Any]) -> None:
    table = Table(title="super experts, corpus by corpus")
    table.add_column("expert")
    for name in result["corpora"]:
        table.add_column(Text(name), justify="right")
    for row in result["super"]:
        marks = [
            f"{row['peaks'][name]:.4g}" + ("" if name in row["corpora"] else " (no)") for name in result["corpora"]
        ]
        table.add_row(row["expert"], *marks)
    stdout.print(table)
    for pair in result["pairs"]:
        jaccard, rank = (
            "none" if value is None else f"{value:.2f}" for value in (pair["jaccard"], pair["rank_correlation"])
        )
        one, two = pair["corpora"]
        stdout.print(f"{one} and {two}: Jaccard {jaccard}, rank correlation of all peaks {rank}", markup=False)
