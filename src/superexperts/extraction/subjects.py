"""Accuracy by subject and by group of subjects, for the benchmarks that have some.

Micro: every item counts once. Macro: every subject counts once, whatever its size. MMLU's groups are those of its
authors, as lm-evaluation-harness has them (D. Hendrycks et al., arXiv 2009.03300); VMLU's those of the table in
github.com/ZaloAI-Jaist/VMLU, whose subjects are the numbers before the items' `-`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["GROUPS", "by_subject"]

GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "mmlu": {
        "STEM": (
            *("abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry"),
            *("college_computer_science", "college_mathematics", "college_physics", "computer_security"),
            *("conceptual_physics", "electrical_engineering", "elementary_mathematics", "high_school_biology"),
            *("high_school_chemistry", "high_school_computer_science", "high_school_mathematics"),
            *("high_school_physics", "high_school_statistics", "machine_learning"),
        ),
        "humanities": (
            *("formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history"),
            *("international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios"),
            *("philosophy", "prehistory", "professional_law", "world_religions"),
        ),
        "social sciences": (
            *("econometrics", "high_school_geography", "high_school_government_and_politics"),
            *("high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology"),
            *("human_sexuality", "professional_psychology", "public_relations", "security_studies", "sociology"),
            "us_foreign_policy",
        ),
        "other": (
            *("business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging"),
            *("management", "marketing", "medical_genetics", "miscellaneous", "nutrition"),
            *("professional_accounting", "professional_medicine", "virology"),
        ),
    },
    "vmlu": {
        "STEM": tuple(f"{number:02d}" for number in range(1, 22)),
        "social science": tuple(f"{number:02d}" for number in range(22, 32)),
        "humanity": tuple(f"{number:02d}" for number in range(32, 50)),
        "other": tuple(f"{number:02d}" for number in range(50, 59)),
    },
}
"""benchmark -> group -> its subjects"""


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
        for group, names in GROUPS.get(task, {}).items()
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
