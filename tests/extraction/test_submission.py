"""VMLU's test rows, which have no published gold answers; and averages over subjects."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import tasks as harness_tasks

from superexperts.benchmarks import BENCHMARKS
from superexperts.benchmarks.loading import load_benchmarks
from superexperts.cli import main
from superexperts.core.errors import DataError, OptionError
from superexperts.core.types import Answer, Extraction
from superexperts.evaluation import evaluate
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.extraction.scores import extract, extract_folder, submission
from superexperts.extraction.subjects import by_subject
from superexperts.results.statistics import single_run

CHOICES = (("A", "đỏ"), ("B", "xanh"), ("C", "vàng"))


def _answer(number: int, response: str, **changes: Any) -> Answer:
    settings: dict[str, Any] = {"kind": "choice", "task": "vmlu", "variant": "base", "seed": 0, "gold": None}
    prompt = "Question: Màu gì?\nA. đỏ\nB. xanh\nC. vàng\nAnswer:"
    made = {"id": f"07-{number:04d}", "prompt": prompt, "response": response, "choices": CHOICES, "subject": "07"}
    return Answer(**settings | made | changes)


def test_real_test_rows_have_items_without_gold(shared_data: Path) -> None:
    benchmark = load_benchmarks(["vmlu"], shared_data, split="test")["vmlu"]
    assert len(benchmark.items) == 9833
    assert {item.gold for item in benchmark.items} == {None}
    assert len({item.subject for item in benchmark.items}) == 58
    with gzip.open(shared_data / "vmlu_test.jsonl.gz", "rt", encoding="utf-8") as stream:
        assert [item.id for item in benchmark.items] == [json.loads(line)["id"] for line in stream]
    few = load_benchmarks(["vmlu"], shared_data, split="test", protocol="loglikelihood")["vmlu"]
    assert sum(len(part.numbers) for part in few.parts) == 9833


def test_rows_without_gold_are_refused_where_they_would_be_scored(tmp_path: Path) -> None:
    row = {"id": "01-0001", "question": "Nào?", "choices": ["A. một", "B. hai"]}
    (tmp_path / "vmlu_valid.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="01-0001: field 'answer' is missing; .* split test"):
        load_benchmarks(["vmlu"], tmp_path)
    with pytest.raises(DataError, match=r"has no vmlu_test\.jsonl"):
        load_benchmarks(["vmlu"], tmp_path, split="test")
    with pytest.raises(OptionError, match="split: 'test' is for vmlu only; ask boolq in another run, without split"):
        EvaluateConfig(tasks="vmlu,boolq", split="test")


def test_the_file_to_submit(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the questions to the CSV: no accuracy, and nothing counted wrong. A graded run takes its place whole."""
    rows = [json.loads(line) for line in (data / "vmlu_valid.jsonl").read_text(encoding="utf-8").splitlines()]
    mine = tmp_path / "data"
    mine.mkdir()
    for row in rows:
        del row["answer"]
    (mine / "vmlu_test.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    out = tmp_path / "run"
    settings: dict[str, Any] = {"tasks": "vmlu", "limit": 30, "max_new_tokens": 40, "device": "cpu", "out": out}
    evaluate.run(EvaluateConfig(data_dir=mine, split="test", **settings))
    answers = [json.loads(line) for line in (out / "answers" / "vmlu.jsonl").read_text().splitlines()]
    assert [answer["gold"] for answer in answers] == [None] * 30
    assert main(["extract", str(out)]) == 0
    reported = capsys.readouterr().out
    assert "vmlu: 30 answers without gold answers, no accuracy;" in reported
    assert "accuracy │" not in reported
    read = [json.loads(line) for line in (out / "extractions" / "vmlu.jsonl").read_text().splitlines()]
    assert {row["correct"] for row in read} == {None}
    file = out / "extractions" / "vmlu_submission.csv"
    with file.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.reader(stream))
    assert lines[0] == ["id", "answer"]
    assert lines[1:] == [[row["id"], row["extracted"] or ""] for row in read]
    assert {answer for _, answer in lines[1:]} & set("ABCD")
    assert b"\r" not in file.read_bytes()
    scores = json.loads((out / "scores.json").read_text())
    unparsed = sum(row["extracted"] is None for row in read)
    [entry] = scores["ungraded"]
    assert (scores["scores"], entry["items"], entry["unparsed"]) == ([], 30, unparsed)

    evaluate.run(EvaluateConfig(data_dir=data, overwrite=True, **settings))
    [score] = extract_folder(out)
    assert score.items == 30
    assert not file.exists()


def test_an_unread_answer_is_an_empty_field_and_never_a_guess() -> None:
    rows = [extract(_answer(1, " B")), extract(_answer(2, " Tôi không biết.")), extract(_answer(3, " C. vàng"))]
    assert submission("vmlu", rows) == "id,answer\n07-0001,B\n07-0002,\n07-0003,C\n"
    assert [row.correct for row in rows] == [None] * 3


def test_nothing_counts_what_has_no_gold() -> None:
    rows = [Extraction(id="07-1", extracted="A", how="rule:boxed", correct=None)]
    with pytest.raises(DataError, match="vmlu: item '07-1' has no gold answer and no score"):
        single_run.score("vmlu", "base", rows)
    with pytest.raises(DataError, match="vmlu: item '07-1' has no gold answer and no score"):
        single_run.graded("vmlu", rows[0])


def test_answers_with_and_without_gold_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    lines = [json.dumps(_answer(i, " A", gold=gold).to_json()) for i, gold in enumerate(("A", None))]
    (tmp_path / "answers" / "vmlu.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 2: some answers have a gold answer, some none"):
        extract_folder(tmp_path)
    assert not (tmp_path / "extractions").exists()


@pytest.mark.parametrize("change", [{}, {"task": "mmlu"}, {"variant": "lora"}])
def test_no_item_counts_twice_and_no_two_benchmarks_or_variants_as_one(change: Any, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    rows = [_answer(1, " A", gold="A"), _answer(2 if change else 1, " A", gold="A", **change)]
    lines = [json.dumps(row.to_json()) for row in rows]
    (tmp_path / "answers" / "vmlu.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 2: a second answer to item '07-000.', or one of another benchmark"):
        extract_folder(tmp_path)


def test_an_answer_without_what_is_optional_is_written_as_before() -> None:
    answer = _answer(1, " A", gold="A", subject=None)
    keys = ["id", "prompt", "response", "gold", "choices", "kind", "task", "variant", "seed"]
    assert list(answer.to_json()) == keys
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer
    full = _answer(1, "A", num_fewshot=2, loglikelihoods=(("A", -0.5, 1), ("B", -1.5, 1), ("C", -2.0, 1)))
    assert Answer.from_json(json.loads(json.dumps(full.to_json()))) == full


# ---- subjects ----------------------------------------------------------------------------------------------------


def test_averages_by_hand() -> None:
    subjects = ["anatomy"] * 4 + ["virology"] + ["no_such_subject"]
    found = by_subject("mmlu", subjects, [True, True, True, False, False, True])
    assert found == {
        **{"items": 6, "correct": 4, "accuracy": 4 / 6, "macro": pytest.approx((0.75 + 0 + 1) / 3)},
        "groups": {
            "STEM": {"items": 4, "correct": 3, "accuracy": 0.75, "macro": 0.75},
            "other": {"items": 1, "correct": 0, "accuracy": 0.0, "macro": 0.0},
        },
        "subjects": {
            "anatomy": {"items": 4, "correct": 3, "accuracy": 0.75},
            "no_such_subject": {"items": 1, "correct": 1, "accuracy": 1.0},
            "virology": {"items": 1, "correct": 0, "accuracy": 0.0},
        },
    }
    assert by_subject("gsm8k", [None, None], [True, True]) is None


def test_groups_are_the_published_ones(shared_data: Path) -> None:
    """MMLU's as the harness's files have them; VMLU's 58 numbers; every real item belongs to one."""
    folder = Path(harness_tasks.__file__).parent / "mmlu" / "default"
    tags = {"STEM": "stem", "humanities": "humanities", "social sciences": "social_sciences", "other": "other"}
    for group, names in BENCHMARKS["mmlu"].groups.items():
        tagged = [file for file in folder.glob("mmlu_*.yaml") if f'mmlu_{tags[group]}_tasks"' in file.read_text()]
        assert {file.stem.removeprefix("mmlu_") for file in tagged} == set(names)
    counts = {"mmlu": {}, "vmlu": {}}
    for task, benchmark in load_benchmarks(["mmlu", "vmlu"], shared_data).items():
        group_of = {name: group for group, names in BENCHMARKS[task].groups.items() for name in names}
        for item in benchmark.items:
            group = group_of[str(item.subject)]
            counts[task][group] = counts[task].get(group, 0) + 1
    # The sizes that lm-evaluation-harness's documentation and the rows give for MMLU's groups.
    assert sum(counts["mmlu"].values()) == 14042
    assert (counts["mmlu"]["humanities"], counts["mmlu"]["social sciences"]) == (4705, 3077)
    assert [len(names) for names in BENCHMARKS["vmlu"].groups.values()] == [21, 10, 18, 9]


def test_scores_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answers").mkdir()
    rows = [
        _answer(i, " A", gold="A" if i < 3 else "B", subject=subject)
        for i, subject in enumerate(("01", "01", "22", "50"))
    ]
    text = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
    (tmp_path / "answers" / "vmlu.jsonl").write_text(text)
    assert main(["extract", str(tmp_path)]) == 0
    reported = " ".join(capsys.readouterr().out.split())
    assert "vmlu, 3 subjects, mean over items (over subjects): 75.00 (66.67); STEM 100.00 (100.00)" in reported
    [found] = json.loads((tmp_path / "scores.json").read_text())["subjects"]
    assert (found["task"], found["accuracy"], found["items"]) == ("vmlu", 0.75, 4)
