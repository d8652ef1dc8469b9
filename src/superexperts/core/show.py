"""What a command's result looks like in a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
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
    elif command == "extract" and "scores" in result:
        _show_scores(result)
        if "judge" in result:
            _show_judge(result["judge"])
    elif command == "extract":
        _show_audit(result)
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


def _show_audit(result: dict[str, Any]) -> None:
    table = Table(caption="accuracy: right, and rightly empty, over all", box=SIMPLE, padding=0)
    for column in ("", "items", "right", "empty", "wrong", "missed", "invented", "accuracy", "95% interval"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)  # a row fits into 80 columns
    sections = [("all", result["all"]), *result["kinds"].items(), *(result["rules"].items())]
    if result["judge"] is not None:
        judge = result["judge"]
        sections += [("judge", judge["all"]), *((f"judge {kind}", row) for kind, row in judge["kinds"].items())]
        sections.append(("rules + judge", judge["together"]))
    for name, row in sections:
        counts = [str(row[column]) for column in ("items", "right", "empty", "wrong", "missed", "invented")]
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        table.add_row(name, *counts, f"{100 * row['accuracy']:.2f}", interval)
    stdout.print(table)
    for row in result["not_right"]:
        stdout.print(Text(ascii(f"{row['id']}: {row['label']} read as {row['extracted']} ({row['rule']})")))
    if result["judge"] is not None:
        _show_judge(result["judge"])


def _show_judge(result: dict[str, Any]) -> None:
    told = [f"judge {result['model']!a}: asked {result['asked']:,}, named an answer in {result['committed']:,}"]
    told.append(f"none in {result['none']:,}, unreadable {result['unreadable']:,}")
    stdout.print(Text(", ".join(told)), soft_wrap=True)
    found = result["agreement"]
    if found is not None:
        interval = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}"
        told = [f"{name.replace('_', ' ')} {found[name]}" for name in ("differ", "rules_only", "judge_only")]
        share = f"agrees with the rules on {100 * found['share']:.2f}% of {found['items']:,} ({interval})"
        stdout.print(Text(f"judge {share}; {', '.join(told)}"), soft_wrap=True)


def _show_scores(result: dict[str, Any]) -> None:
    table = Table()
    for column in ("benchmark", "variant", "items", "accuracy", "95% interval", "unparsed"):
        table.add_column(column, justify="left" if column in ("benchmark", "variant") else "right")
    for row in result["scores"]:
        table.add_row(
            Text(row["task"]),
            Text(row["variant"]),
            str(row["items"]),
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['unparsed']} ({100 * row['unparsed'] / row['items']:.1f}%)",
        )
    if result["scores"]:
        stdout.print(table)
    for row in result.get("normalized", []):
        stdout.print(f"{row['task']}, by log-probability per character (acc_norm): {100 * row['accuracy']:.2f}")
    for row in result.get("subjects", []):
        groups = "".join(
            f"; {group} {100 * found['accuracy']:.2f} ({100 * found['macro']:.2f})"
            for group, found in row["groups"].items()
        )
        stdout.print(
            f"{row['task']}, {len(row['subjects'])} subjects, mean over items (over subjects): "
            f"{100 * row['accuracy']:.2f} ({100 * row['macro']:.2f}){groups}",
            soft_wrap=True,
            markup=False,
        )
    for row in result.get("ungraded", []):
        stdout.print(
            f"{row['task']}: {row['items']} answers without gold answers, no accuracy; {row['unparsed']} unparsed; "
            f"to submit: extractions/{row['submission']}",
            soft_wrap=True,
            markup=False,
        )
