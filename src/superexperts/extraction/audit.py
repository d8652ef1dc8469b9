"""How well the extraction reads: its rules, and a judge, against generations that a person has labelled.

A labelled file is JSONL with `id`, `task_type` (mcq, numeric, yesno), `question`, `choices` (`{label, text}` each),
`generation`, and `key_answer`: what the generation commits to, right or wrong, null where it commits to nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from superexperts.core.errors import DataError
from superexperts.extraction import number_value, read
from superexperts.extraction.judge import Case, Judge, Verdict
from superexperts.extraction.statements import Choices
from superexperts.results.statistics.single_run import wilson

__all__ = ["JudgeReport", "Reading", "audit", "audit_file", "joined", "judge_report", "outcome"]

KINDS: dict[str, Literal["choice", "number", "yesno"]] = {"mcq": "choice", "numeric": "number", "yesno": "yesno"}
AUDIT_SCHEMA = "superexperts/audit/1"

Outcome = Literal["right", "empty", "wrong", "missed", "invented"]
"""right: the labelled answer was read. empty: none was read, and there is none. wrong: another one was read. missed:
none was read, but there is one. invented: one was read, but there is none. The first two are correct."""


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
            label, name = _label(row["key_answer"], kind, choices), str(row["id"])
            extracted, rule = read(kind, row["generation"], row["question"], choices)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"row {number}: a field is missing or wrong ({error}); repair the file", field="audit"
            ) from error
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


def _label(value: Any, kind: str, choices: Choices) -> str | None:
    """A row's `key_answer` as text; people write numbers, true and false without quotes as well.

    `TypeError` for one that no reading could ever equal: it would count against the extraction.
    """
    if isinstance(value, bool) and kind == "yesno":
        value = "yes" if value else "no"
    if isinstance(value, int | float) and not isinstance(value, bool) and kind == "number":
        value = str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"key_answer is {value!r:.40}, not text or null")
    if kind == "number":
        known = number_value(value) is not None
    else:
        known = value.casefold() in ({label.casefold() for label, _ in choices} if kind == "choice" else ("yes", "no"))
    if not known:
        expected = {"choice": "one of the labels", "number": "a number", "yesno": "yes or no"}[kind]
        raise TypeError(f"key_answer is {value!r:.40}, not {expected} or null")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeReport:
    """How often a judge was asked, what came back, and how often it says what the rules say."""

    asked: int
    committed: int
    """Verdicts that name an answer."""
    none: int
    """Verdicts that the answer commits to nothing."""
    unreadable: int
    agreement: Mapping[str, int] | None
    """Counts over all items: `same`, `differ` (both read something), `neither` read anything, `rules_only`,
    `judge_only`. None unless the judge was asked for all, and at least one of its verdicts was readable."""


PARTS = ("same", "differ", "neither", "rules_only", "judge_only")


def judge_report(
    verdicts: Sequence[Verdict], pairs: Sequence[tuple[str, str | None, str | None]] | None
) -> JudgeReport:
    """`pairs` are those of every item, None where the judge saw only some."""
    values = [verdict.value for verdict in verdicts if verdict.readable]
    counts = None if pairs is None else Counter(_part(*pair) for pair in pairs)
    return JudgeReport(
        asked=len(verdicts),
        committed=len(values) - values.count(None),
        none=values.count(None),
        unreadable=len(verdicts) - len(values),
        agreement=None if counts is None or not values else {part: counts[part] for part in PARTS},
    )


def _part(kind: str, by_rules: str | None, by_judge: str | None) -> str:
    if by_rules is None or by_judge is None:
        return "neither" if by_rules is by_judge else "judge_only" if by_rules is None else "rules_only"
    return "same" if outcome(kind, by_rules, by_judge) == "right" else "differ"


def joined(reports: Sequence[JudgeReport]) -> dict[str, Any]:
    """Several benchmarks' reports as one JSON value, with the share of items on which rules and judge say the same."""
    whole = {name: sum(getattr(r, name) for r in reports) for name in ("asked", "committed", "none", "unreadable")}
    counts = [report.agreement for report in reports if report.agreement is not None]
    if not counts:
        return {**whole, "agreement": None}
    parts = {part: sum(count[part] for count in counts) for part in PARTS}
    items, same = sum(parts.values()), parts["same"] + parts["neither"]
    low, high = wilson(same, items)
    agreement = {"items": items, **parts, "share": same / items, "low": low, "high": high}
    return {**whole, "agreement": agreement}


def audit_judge(rows: Sequence[dict[str, Any]], readings: Sequence[Reading], judge: Judge) -> dict[str, Any]:
    """The same audit of a judge that reads every row, and of the rules with the judge for what they leave."""
    cases = [
        Case(
            kind=KINDS[row["task_type"]],
            question=row["question"],
            choices=tuple((choice["label"], choice["text"]) for choice in row["choices"]),
            answer=row["generation"],
        )
        for row in rows
    ]
    verdicts = judge.read(cases)
    judged = [
        dataclasses.replace(
            reading,
            extracted=verdict.value,
            rule="judge" if verdict.value is not None else "unparsed",
            outcome=outcome(reading.kind, reading.label, verdict.value),
        )
        for reading, verdict in zip(readings, verdicts, strict=True)
    ]
    together = [two if one.extracted is None else one for one, two in zip(readings, judged, strict=True)]
    pairs = [(one.kind, one.extracted, two.extracted) for one, two in zip(readings, judged, strict=True)]
    return {
        "model": judge.name,
        **joined([judge_report(verdicts, pairs)]),
        "all": _summary(judged),
        "kinds": {kind: _summary([r for r in judged if r.kind == kind]) for kind in sorted({r.kind for r in judged})},
        "together": _summary(together),
        "not_right": [dataclasses.asdict(r) for r in judged if r.outcome not in ("right", "empty")],
    }


def audit_file(path: Path, judge: Judge | None = None) -> dict[str, Any]:
    """The audit of a labelled file as a JSON value: in all, per kind, per rule, and every reading that is not right.

    With a judge also its own audit, and its agreement with the rules.
    """
    try:
        # Not splitlines(): a generation may hold U+2028, which is a line's end only to Python.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); check the path", field="audit") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSONL ({error}); repair the file", field="audit") from error
    if not rows:
        raise DataError(f"{path} holds no row; give labelled generations", field="audit")
    readings = audit(rows)
    kinds, rules = sorted({r.kind for r in readings}), sorted({r.rule for r in readings})
    return {
        "schema": AUDIT_SCHEMA,
        "out": str(path),
        "all": _summary(readings),
        "kinds": {kind: _summary([r for r in readings if r.kind == kind]) for kind in kinds},
        "rules": {rule: _summary([r for r in readings if r.rule == rule]) for rule in rules},
        "confusion": {kind: _confusion([r for r in readings if r.kind == kind]) for kind in kinds if kind != "number"},
        "not_right": [dataclasses.asdict(r) for r in readings if r.outcome not in ("right", "empty")],
        "judge": None if judge is None else audit_judge(rows, readings, judge),
    }


def _confusion(readings: Sequence[Reading]) -> dict[str, dict[str, int]]:
    """Label -> what was read -> how often; "nothing" where there is none."""
    table: dict[str, Counter[str]] = {}
    for one in readings:
        table.setdefault((one.label or "nothing").casefold(), Counter())[(one.extracted or "nothing").casefold()] += 1
    return {label: dict(sorted(counts.items())) for label, counts in sorted(table.items())}


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
