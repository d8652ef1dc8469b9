"""The audit of the extraction: outcomes by hand, and the real labelled generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from superexperts.cli import main
from superexperts.core.errors import DataError
from superexperts.extraction.audit import audit, audit_file, outcome


@pytest.mark.parametrize(
    ("kind", "label", "extracted", "want"),
    [
        ("number", "1/2", "0.5", "right"), ("number", "2125", "2125.0", "right"), ("number", "3", "4", "wrong"),
        ("yesno", "yes", "Yes", "right"), ("choice", "B", "C", "wrong"), ("choice", None, "C", "invented"),
        ("choice", "B", None, "missed"), ("choice", None, None, "empty"),
    ],
)  # fmt: skip
def test_outcome(kind: str, label: str | None, extracted: str | None, want: str) -> None:
    assert outcome(kind, label, extracted) == want


def row(generation: str, label: Any, **more: Any) -> dict[str, Any]:
    base = {"id": "a", "task_type": "numeric", "question": "What is 2 + 2?", "choices": []}
    return {**base, "generation": generation, "key_answer": label, **more}


def test_counts_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("#### 4", "4"), row("#### 5", "4"), row("who knows", None), row("who knows", "4"), row("#### 4", None)]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = audit_file(file)
    one_each = {"right": 1, "empty": 1, "wrong": 1, "missed": 1, "invented": 1}
    assert found["all"] == found["kinds"]["number"]
    assert {name: found["all"][name] for name in one_each} == one_each
    assert (found["all"]["items"], found["all"]["accuracy"]) == (5, 0.4)
    assert {rule: section["items"] for rule, section in found["rules"].items()} == {"hashes": 3, "unparsed": 2}
    assert [r["outcome"] for r in found["not_right"]] == ["wrong", "missed", "invented"]
    assert found["confusion"] == {}
    assert main(["extract", "--audit", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "40.00" in shown
    assert "unparsed" in shown  # whole names in 80 columns
    assert "…" not in shown


def test_confusion_by_hand(tmp_path: Path) -> None:
    said = [("Yes", "yes"), ("Yes.", "YES"), ("Yes", "no"), ("who knows", "no"), ("No", None), ("who knows", None)]
    rows = [row(text, label, task_type="yesno") for text, label in said]
    (tmp_path / "f").write_text("".join(json.dumps(r) + "\n" for r in rows))
    expected = {"no": {"nothing": 1, "yes": 1}, "nothing": {"no": 1, "nothing": 1}, "yes": {"yes": 2}}
    assert audit_file(tmp_path / "f")["confusion"] == {"yesno": expected}


@pytest.mark.parametrize(
    ("label", "more"),
    [
        (4, {}), (4.0, {}), ("4", {}), ("4.0", {}),
        (True, {"task_type": "yesno", "generation": "Yes."}), ("Yes", {"task_type": "yesno", "generation": "Yes."}),
        ("b", {"task_type": "mcq", "generation": "B", "choices": [{"label": x, "text": x * 3} for x in "AB"]}),
        ("4", {"generation": "So\u2028it is\x85\x0b\x0c\x1c four.\n#### 4"}),
    ],
)  # fmt: skip
def test_rows_as_people_write_them(label: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """Labels without quotes, line ends that only Python knows, a byte-order mark."""
    text = json.dumps(row("#### 4", label) | more, ensure_ascii=False)
    (tmp_path / "f").write_text(f"\ufeff{text}\n\n{text}\n", encoding="utf-8")
    found = audit_file(tmp_path / "f")
    assert (found["all"]["items"], found["all"]["right"]) == (2, 2)


@pytest.mark.parametrize(
    ("label", "task_type", "said"),
    [
        ("many", "numeric", "row 1: .*'many', not a number or null"),
        (True, "numeric", "row 1: .*True, not text or null"),
        ("true", "yesno", "row 1: .*'true', not yes or no or null"),
        ("oil", "mcq", "row 1: .*'oil', not one of the labels or null"),
        (2, "mcq", "row 1: .*2, not text or null"),
    ],
)
def test_a_label_that_nothing_can_equal_is_refused(label: Any, task_type: str, said: str, tmp_path: Path) -> None:
    choices = [{"label": "A", "text": "oil"}] if task_type == "mcq" else []
    (tmp_path / "f").write_text(json.dumps(row("A", label, task_type=task_type, choices=choices)))
    with pytest.raises(DataError, match=said):
        audit_file(tmp_path / "f")


def test_real_labelled_generations(shared_data: Path) -> None:
    """At least 95% by rules alone, and of the answers that commit to nothing at most 5% turned into one."""
    found = audit_file(shared_data / "extraction_dev.jsonl")
    assert found["all"]["items"] == 196
    assert found["all"]["accuracy"] >= 0.95
    assert found["all"]["invented"] <= 0.05 * (found["all"]["invented"] + found["all"]["empty"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no row"),
        ("{", "is not JSONL"),
        ("3\n", "row 1"),
        (json.dumps(row("4", "4", task_type="x")), "row 1"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(DataError, match=said):
        audit_file(tmp_path / "f")
    with pytest.raises(DataError, match="cannot read"):
        audit_file(tmp_path / "nowhere")
    with pytest.raises(DataError, match="row 2"):
        audit([row("4", "4"), {}])
