"""Accuracy by subject and by group of subjects, for the benchmarks that have subjects.

Micro: every item counts once. Macro: every subject counts once, whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from superexperts.benchmarks import BENCHMARKS

__all__ = ["by_subject"]


def by_subject(task: str, subjects: Sequence[str | None], correct: Sequence[bool]) -> dict[str, Any] | None:
    """Micro and macro accuracy (0..1) of all items and of each group, and each subject's; None without subjects.

    `subjects` and `correct` are the items', in one order. A subject that is in none of the benchmark's groups counts in
    the whole only.
    """
    if not subjects or None in subjects:
        return None
    counts: dict[str, list[bool]] = {}
    for subject, right in zip(subjects, correct, strict=True):
        counts.setdefault(str(subject), []).append(right)
    groups = {
        group: found
        for group, names in (BENCHMARKS[task].groups if task in BENCHMARKS else {}).items()
        if (found := {name: counts[name] for name in names if name in counts})
    }
    return {
        **_averages(counts),
        "groups": {group: _averages(found) for group, found in groups.items()},
        "subjects": {name: _share(rows) for name, rows in sorted(counts.items())},
    }


def _averages(counts: dict[str, list[bool]]) -> dict[str, Any]:
    accuracies = [sum(rows) / len(rows) for rows in counts.values()]
    return {**_share([row for rows in counts.values() for row in rows]), "macro": sum(accuracies) / len(accuracies)}


def _share(rows: list[bool]) -> dict[str, Any]:
    return {"items": len(rows), "correct": sum(rows), "accuracy": sum(rows) / len(rows)}
