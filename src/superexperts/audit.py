"""How well the extraction reads: its rules against generations whose answers a person has labelled.

A labelled file is JSONL with `id`, `task_type` (mcq, numeric, yesno), `question`, `choices` (`{label, text}` each),
`generation`, and `key_answer`: what the generation commits to, right or wrong, null where it commits to nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import DataError
from .extraction import number_value, read
from .stats import wilson

__all__ = ["Reading", "audit", "audit_file", "outcome"]

KINDS: dict[str, Literal["choice", "number", "yesno"]] = {"mcq": "choice", "numeric": "number", "yesno": "yesno"}
AUDIT_SCHEMA = "superexperts/audit/1"

Outcome = Literal["right", "empty", "wrong", "missed", "invented"]
"""The label was read; rightly nothing was read; another answer; nothing although there is one; one although there is
none. The first two are what should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """One labelled generation and what the rules made of it."""

    id: str
    kind: str
    label: str | None
    extracted: str | None
    rule: str
    """The rule that decided; "unparsed" where none did."""
    outcome: Outcome


def outcome(kind: str, label: str | None, extracted: str | None) -> Outcome:
    """Numbers are compared as numbers, all else without regard to case."""
    if extracted is None:
        return "empty" if label is None else "missed"
    if label is None:
        return "invented"
    same = (
        number_value(extracted) == number_value(label) if kind == "number" else extracted.casefold() == label.casefold()
    )
    return "right" if same else "wrong"


def audit(rows: Sequence[dict[str, Any]]) -> tuple[Reading, ...]:
    """Reads every row's generation by the rules. `DataError` names the row where a field is missing or wrong."""
    readings = []
    for number, row in enumerate(rows, start=1):
        try:
            kind = KINDS[row["task_type"]]
            choices = tuple((choice["label"], choice["text"]) for choice in row["choices"])
            label, name = row["key_answer"], str(row["id"])
            extracted, rule = read(kind, row["generation"], row["question"], choices)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"--audit: row {number}: a field is missing or wrong ({error}); repair the file") from error
        readings.append(
            Reading(
                id=name,
                kind=kind,
                label=label,
                extracted=extracted,
                rule=rule if extracted is not None else "unparsed",
                outcome=outcome(kind, label, extracted),
            )
        )
    return tuple(readings)


def audit_file(path: Path) -> dict[str, Any]:
    """The audit of a labelled file as a JSON value: in all, per kind, per rule, and every reading that is not right."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise DataError(f"--audit: cannot read {path} ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DataError(f"--audit: {path} is not JSONL ({error}); repair the file") from error
    if not rows:
        raise DataError(f"--audit: {path} holds no row; give labelled generations")
    readings = audit(rows)
    kinds, rules = sorted({r.kind for r in readings}), sorted({r.rule for r in readings})
    return {
        "schema": AUDIT_SCHEMA,
        "out": str(path),
        "all": _summary(readings),
        "kinds": {kind: _summary([r for r in readings if r.kind == kind]) for kind in kinds},
        "rules": {rule: _summary([r for r in readings if r.rule == rule]) for rule in rules},
        "not_right": [dataclasses.asdict(r) for r in readings if r.outcome not in ("right", "empty")],
    }


def _summary(readings: Sequence[Reading]) -> dict[str, Any]:
    """Counts of the outcomes, and the share that is as it should be with its 95% Wilson interval."""
    counts = Counter(reading.outcome for reading in readings)
    good = counts["right"] + counts["empty"]
    low, high = wilson(good, len(readings))
    names: tuple[Outcome, ...] = ("right", "empty", "wrong", "missed", "invented")
    return {
        "items": len(readings),
        **{name: counts[name] for name in names},
        "accuracy": good / len(readings),
        "low": low,
        "high": high,
    }
