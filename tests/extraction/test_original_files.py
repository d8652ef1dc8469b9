"""The original project's raw files: read as they are, `full_choice` as its notebook filled it in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from superexperts.cli import main
from superexperts.core.errors import DataError
from superexperts.core.types import Extraction
from superexperts.extraction.original_files import full_choice, read_raw, task_of
from superexperts.extraction.scores import extract_folder


@pytest.mark.parametrize(
    ("gold", "choices", "expected"),
    [
        ("D", ["12", "24", "26", "0,4"], "D. 0,4"),  # the notebook's own example
        ("A", ["sand", "sand"], "A. sand"),
        ("B", [" b with blanks ", "  x"], "B.   x"),
        ("C", ["sand", "oil"], None),  # no such choice
        ("b", ["sand", "oil"], None),
        ("AB", ["sand", "oil"], None),
        (None, ["sand"], None),
        ("", ["sand"], None),
        (True, [], None),
        ("... #### 18", [], None),
        ("B", "A. Disclose it\nB. Tell her\n", "B. Tell her"),
        ("B", "A. x\n B. Dr. No. \nno choice", "B. Dr. No."),
        ("E", "A. x\nB. y", ""),
    ],
)
def test_full_choice(gold: Any, choices: Any, expected: str | None) -> None:
    assert full_choice(gold, choices) == expected


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("raw_result_baseline.json", "mmlu"),
        ("raw_result_baseline_arc.json", "arc_challenge"),
        ("raw_result_arc.json", "arc_challenge"),
        ("raw_result_med.json", "medqa"),
        ("raw_result_boolq.json", "boolq"),
        ("raw_result_gsm8k.json", "gsm8k"),
        ("raw_result_openbookqa.json", "openbookqa"),
    ],
)
def test_task_of(name: str, task: str) -> None:
    assert task_of(Path(name)) == task


QUESTION = "Where does clay come from?"
FILES: dict[str, list[dict[str, Any]]] = {
    "raw_result_baseline": [
        {"question": QUESTION, "choices": ["sand", "the ground"], "gold": "B", "answer": " B. the ground"},
        {"question": QUESTION, "choices": ["sand", "the ground"], "gold": "B", "answer": "<answer> A </answer>"},
        {"question": QUESTION, "choices": ["sand", "the ground"], "gold": "A", "answer": None},
    ],
    "raw_result_med": [{"question": QUESTION, "choices": "A. sand\nB. the ground\n", "gold": "A", "answer": "A."}],
    "raw_result_boolq": [
        {"passage": "p", "question": "is it", "gold": True, "answer": "Yes, it is.", "predicted_answer": None},
        {"passage": "p", "question": "is it", "gold": False, "answer": "#### true", "predicted_answer": True},
    ],
    "raw_result_gsm8k": [
        {"question": "How many?", "gold": "so\n#### 2,125", "gold_answer_extracted": 2125.0, "answer": "2125."},
        {"question": "How many?", "gold": "#### -3", "answer": "#### 3"},
    ],
}  # fmt: skip


def write(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    for name, rows in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=2))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_as_the_original_left_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "deepseek_pre")
    assert main(["extract", str(tmp_path / "deepseek_pre"), "--json"]) == 0
    scores = {row["task"]: row for row in json.loads(capsys.readouterr().out)["scores"]}
    assert list(scores) == ["mmlu", "gsm8k", "boolq", "medqa"]
    assert {task: (row["items"], row["correct"], row["unparsed"]) for task, row in scores.items()} == {
        "mmlu": (3, 1, 1), "gsm8k": (2, 1, 0), "boolq": (2, 1, 0), "medqa": (1, 1, 0),
    }  # fmt: skip
    assert {row["variant"] for row in scores.values()} == {"deepseek_pre"}
    for name, data in before.items():  # the user's files are as they were
        assert (tmp_path / "deepseek_pre" / name).read_bytes() == data
    filled = tmp_path / "deepseek_pre" / "extractions"
    for name, rows in FILES.items():
        written = json.loads((filled / f"{name}.json").read_text())
        assert [{**row, "full_choice": full_choice(row["gold"], row.get("choices", []))} for row in rows] == written
    assert [row["full_choice"] for row in json.loads((filled / "raw_result_baseline.json").read_text())] == [
        "B. the ground", "B. the ground", "A. sand",
    ]  # fmt: skip
    lines = (filled / "mmlu.jsonl").read_text().splitlines()
    assert [Extraction.from_json(json.loads(line)).extracted for line in lines] == ["B", "A", None]
    # Nothing is read again; a changed file is.
    stamp = (filled / "mmlu.jsonl").stat().st_mtime_ns
    extract_folder(tmp_path / "deepseek_pre")
    assert (filled / "mmlu.jsonl").stat().st_mtime_ns == stamp
    (tmp_path / "deepseek_pre" / "raw_result_med.json").unlink()
    assert [score.task for score in extract_folder(tmp_path / "deepseek_pre")] == ["mmlu", "gsm8k", "boolq"]
    assert not (filled / "raw_result_med.json").exists()


def test_a_single_row_as_the_notebook_writes_it(tmp_path: Path) -> None:
    (tmp_path / "raw_result_med.json").write_text(json.dumps(FILES["raw_result_med"][0]))
    rows, answers = read_raw(tmp_path / "raw_result_med.json")
    assert (len(rows), answers[0].choices) == (1, (("A", "sand"), ("B", "the ground")))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "holds no list of rows"),
        ("text", "holds no list of rows"),
        ([3], "row 1: a int where a row should be"),
        ([{"question": "a", "answer": "b"}], "row 1: 'gold'"),
        ([{"question": "a", "answer": "b", "gold": None}], "row 1: field 'gold' is empty"),
        ([{"question": "a", "answer": 3, "gold": "1"}], "row 1: question and answer must be text"),
        ([{"question": "a", "answer": "b", "gold": "who"}], "row 1: field 'gold' is 'who'"),
        ([{"question": "a", "answer": "b", "gold": "A", "choices": {"a": 1}}], "row 1: field 'choices' is neither"),
        ([{"question": "a", "answer": "b", "gold": "A", "choices": "none"}], "row 1: field 'choices' has no line"),
    ],
)
def test_bad_files_are_one_line(value: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw_result_x.json").write_text(json.dumps(value))
    assert main(["extract", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "extractions").exists()


def test_two_files_of_one_benchmark_or_two_kinds_of_answers(tmp_path: Path) -> None:
    for name in ("raw_result_arc.json", "raw_result_baseline_arc.json"):
        (tmp_path / name).write_text(json.dumps(FILES["raw_result_baseline"]))
    with pytest.raises(DataError, match="is a second file of arc_challenge"):
        extract_folder(tmp_path)
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "mmlu.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"has answers/ and raw_result_\*\.json; keep them in two folders"):
        extract_folder(tmp_path)
