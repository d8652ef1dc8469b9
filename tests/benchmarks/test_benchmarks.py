"""Rows of the six benchmarks: exact prompts and golds, full test sets, and what is wrong with a bad file."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from superexperts.benchmarks import BENCHMARKS, default_benchmarks
from superexperts.benchmarks.base import prompt
from superexperts.benchmarks.loading import load_benchmarks
from superexperts.core.errors import DataError

TASKS = default_benchmarks()

ROWS: dict[str, dict[str, Any]] = {
    "mmlu": {"question": " Which? ", "subject": "s", "choices": ["1", " 2", "2", "4"], "answer": 2},
    "gsm8k": {"question": "How many?", "answer": "a <<1+1=2>>2\n#### 2,125"},
    "arc_easy": {
        "id": "X_1",
        "question": "Which?",
        "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "boolq": {"question": "is it so", "passage": "It is. ", "answer": True},
    "medqa": {"question": "Why?", "answer": "b", "options": {"A": "a", "B": "b"}, "answer_idx": "B"},
    "openbookqa": {
        "id": "X_2",
        "question_stem": "A thing is",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "vmlu": {"id": "01-0001", "question": "Nào?", "choices": ["A. một", "B.hai", "C. ba "], "answer": "C"},
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


@pytest.mark.parametrize(
    ("task", "item_id", "said", "gold", "kind"),
    [
        ("mmlu", "mmlu-6", "Question: Which?\nA. 1\nB. 2\nC. 2\nD. 4\nAnswer:", "C", "choice"),
        ("gsm8k", "gsm8k-6", "Question: How many?\nAnswer:", "2125", "number"),
        ("arc_easy", "X_1", "Question: Which?\n1. a\n2. b\n3. c\nAnswer:", "2", "choice"),
        ("boolq", "boolq-6", "Question: It is.\nis it so?\nAnswer:", "yes", "yesno"),
        ("medqa", "medqa-6", "Question: Why?\nA. a\nB. b\nAnswer:", "B", "choice"),
        ("arc_challenge", "X_1", "Question: Which?\n1. a\n2. b\n3. c\nAnswer:", "2", "choice"),
        ("openbookqa", "X_2", "Question: A thing is\nA. a\nB. b\nAnswer:", "B", "choice"),
        ("vmlu", "01-0001", "Question: Nào?\nA. một\nB. hai\nC. ba\nAnswer:", "C", "choice"),
    ],
)
def test_prompt_and_gold(task: str, item_id: str, said: str, gold: str, kind: str) -> None:
    item = BENCHMARKS[task].item(ROWS[task], 6)
    assert (item.id, prompt(item), item.gold, item.kind) == (item_id, said, gold, kind)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("mmlu", {"question": None}, "mmlu: row 3: field 'question' is missing"),
        ("mmlu", {"answer": 4}, "the answer is '4'"),
        ("mmlu", {"answer": True}, "'answer' is 'True', of the wrong type"),
        ("gsm8k", {"answer": "about five"}, "'#### NUMBER'"),
        ("arc_easy", {"answerKey": "D"}, "the answer is 'D', which is none of the labels"),
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "2 labels and 1 texts"),
        ("boolq", {"answer": "true"}, "'answer' is 'true', of the wrong type"),
        ("boolq", {"passage": "  "}, "'passage' is empty"),
        ("medqa", {"options": {"A": "a", "B": None}}, "two or more different labels"),
        ("vmlu", {"choices": ["một", "hai"]}, "does not begin with a label"),
    ],
)
def test_bad_field(task: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match="row 3") as caught:
        BENCHMARKS[task].item(ROWS[task] | change, 2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _rows(folder: Path, stem: str) -> Iterator[dict[str, Any]]:
    file = next(folder.glob(f"{stem}.jsonl*"))
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
        yield from map(json.loads, stream)


@pytest.mark.parametrize(
    ("task", "count"),
    [
        ("mmlu", 14042),
        ("gsm8k", 1319),
        ("arc_easy", 2376),
        ("arc_challenge", 1172),
        ("boolq", 3270),
        ("medqa", 1273),
        ("vmlu", 744),
    ],
)
def test_full_real_test_sets(task: str, count: int, shared_data: Path) -> None:
    benchmark = load_benchmarks([task], shared_data)[task]
    assert len(benchmark.items) == len(benchmark.parts[0].task.eval_docs) == count
    for index, (row, item) in enumerate(zip(_rows(shared_data, BENCHMARKS[task].file), benchmark.items, strict=True)):
        assert item == BENCHMARKS[task].item(row, index), "the harness's rows are not the file's"
        said, question = prompt(item), row["question"].strip()
        texts = dict(item.choices)
        if task == "mmlu":
            assert said.startswith(f"Question: {question}\nA. ")
            assert texts[item.gold] == row["choices"][row["answer"]].strip()
        elif task == "gsm8k":
            assert said == f"Question: {question}\nAnswer:"
            assert float(item.gold) == float(row["answer"].split("####")[1].replace(",", ""))
        elif task in ("arc_easy", "arc_challenge"):
            assert (item.id, list(texts), item.gold) == (row["id"], row["choices"]["label"], row["answerKey"])
        elif task == "boolq":
            assert said == f"Question: {row['passage'].strip()}\n{question}?\nAnswer:"
            assert item.gold == ("yes" if row["answer"] else "no")
        elif task == "medqa":
            assert texts[item.gold] == row["answer"].strip()
        else:
            lines = [" ".join(choice.split()) for choice in row["choices"]]
            assert [" ".join(line.split()) for line in said.split("\n")[-1 - len(lines) : -1]] == lines or "\n" in str(
                row["choices"]
            )
            assert item.gold == row["answer"]


def test_both_published_shapes_of_medqa_are_the_same_items(shared_data: Path) -> None:
    shapes = [_rows(shared_data, stem) for stem in ("medqa_gbaker_test", "medqa_lavita_test")]
    ours, lavita = ([BENCHMARKS["medqa"].item(row, i) for i, row in enumerate(rows)] for rows in shapes)
    assert len(ours) == 1273
    assert ours == lavita


def test_real_rows_word_for_word(shared_data: Path) -> None:
    """The first MMLU row (choices by index), and one of ARC's rows labelled 1-4."""
    benchmarks = load_benchmarks(["mmlu", "arc_easy"], shared_data)
    first = benchmarks["mmlu"].items[0]
    assert prompt(first) == (
        "Question: Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
        "A. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    assert first.gold == "B"
    numbered = [item for item in benchmarks["arc_easy"].items if item.choices[0][0] == "1"]
    assert len(numbered) == 97
    assert all(item.gold in "1234" and "\n1. " in item.body for item in numbered)


def test_a_folder_with_the_other_shape_only(tmp_path: Path) -> None:
    """As lavita/medical-qa-datasets has it, which the original project asked; the usual file comes first."""
    row = ROWS["medqa"]
    options = [{"key": label, "value": text} for label, text in row["options"].items()]
    (tmp_path / "medqa_lavita_test.jsonl").write_text(json.dumps(row | {"options": options}) + "\n")
    found = load_benchmarks(["medqa"], tmp_path)["medqa"]
    assert found.items == (BENCHMARKS["medqa"].item(row, 0),)
    _write(tmp_path, "medqa", [row, row | {"question": "Who?"}])
    assert len(load_benchmarks(["medqa"], tmp_path)["medqa"].items) == 2


@pytest.mark.parametrize(
    ("task", "stem", "index", "body", "gold"),
    [
        ("mmlu", "mmlu_all_test", 2178, "Subtract. 2,396 – 1,709\nA. 687\nB. 687\nC. 1,493\nD. 1,695", "A"),
        (
            *("gsm8k", "gsm8k_main_test", 610),
            "It costs $194 per meter to repave a street. Monica's street is 150 meters long. How much more does it "
            "cost to repave Lewis' street, which is 490 meters long?",
            "65960",
        ),
        (
            *("gsm8k", "gsm8k_main_test", 1113),
            "The temperature was 2 degrees Celsius. It dropped 8 degrees Celsius overnight and then increased 3 "
            "degrees Celsius in the morning. What was the temperature, in degrees Celsius, in the morning?",
            "-3",
        ),
        (
            "arc_easy",
            "arc_easy_test",
            1749,
            "Earth's hydrosphere is a layer of\n1. rock\n2. air\n3. lava\n4. water",
            "4",
        ),
        (
            *("arc_easy", "arc_easy_test", 500),
            "What gas in the air do we need to breathe in order to live?\n"
            "A. nitrogen\nB. oxygen\nC. carbon dioxide\nD. hydrogen\nE. water vapor",
            "B",
        ),
        (
            *("arc_easy", "arc_easy_test", 1447),
            "A male puppy inherits traits from\nA. both parents\nB. its mother, only\nC. its father, only",
            "A",
        ),
        (
            *("arc_challenge", "arc_challenge_test", 385),
            "If the force used to push a shopping cart increases, the cart's acceleration will\n"
            "1. decrease\n2. increase\n3. remain the same",
            "2",
        ),
        (
            *("boolq", "boolq_validation", 3127),
            "A sequel, Allegiant, was released on March 18, 2016.\nis there going to be another insurgent movie?",
            "yes",
        ),
        (
            *("medqa", "medqa_lavita_test", 267),
            "A 34-year-old male suffers from inherited hemophilia A. He and his wife have three unaffected daughters. "
            "What is the probability that the second daughter is a carrier of the disease?\n"
            "A. 0%\nB. 25%\nC. 50%\nD. 100%",
            "D",
        ),
        ("vmlu", "vmlu_valid", 668, "Được giữ chức vụ cao hơn:\nA. Đề cử\nB. Đề bạt\nC. Ứng cử", "B"),
        (
            *("vmlu", "vmlu_dev", 76),
            "Vai trò của bể điều hòa\nA. Điều chỉnh pH của nước thải trước khi xử lý\n"
            "B. Là bể chứa để thu gom nước thải\nC. Để giảm bớt tải trọng cho các bể xử lý\nD. Câu A, B, C đều đúng\n"
            "E. Không có câu đúng",
            "E",
        ),
    ],
)
def test_exact_prompts_of_real_rows(task: str, stem: str, index: int, body: str, gold: str, shared_data: Path) -> None:
    """Repeated choices, commas and signs, labels 1-4, three and five choices, choices that begin with their label."""
    row = next(itertools.islice(_rows(shared_data, stem), index, None))
    item = BENCHMARKS[task].item(row, index)
    assert (prompt(item), item.gold) == (f"Question: {body}\nAnswer:", gold)


@pytest.mark.parametrize(
    ("task", "change", "said", "gold"),
    [
        ("gsm8k", {"answer": "so\n#### -1,234.5"}, "How many?", "-1234.5"),
        ("arc_easy", {"answerKey": "3"}, "1. a\n2. b\n3. c", "3"),
        ("medqa", {"options": [{"key": "B", "value": "b"}, {"key": "A", "value": "a"}]}, "A. a\nB. b", "B"),
        ("medqa", {"options": {"B": "C. difficile", "A": "a"}}, "A. a\nB. C. difficile", "B"),
        ("vmlu", {"choices": ["A. 1", "B: 2", "C) 3", "D. 4", "E.5"], "answer": "E"}, "D. 4\nE. 5", "E"),
        ("boolq", {"question": "is it so?", "answer": False}, "It is.\nis it so?", "no"),
    ],
)
def test_what_real_rows_hold(task: str, change: dict[str, Any], said: str, gold: str) -> None:
    """As above, of rows made up, for where the real ones are missing."""
    item = BENCHMARKS[task].item(ROWS[task] | change, 0)
    assert item.body.endswith(said)
    assert item.gold == gold


PINNED = {
    "mmlu": ("cais/mmlu", "all"), "gsm8k": ("openai/gsm8k", "main"), "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"), "openbookqa": ("allenai/openbookqa", "main"),
    "boolq": ("google/boolq", None), "medqa": ("GBaker/MedQA-USMLE-4-options", None),
}  # fmt: skip


@pytest.mark.parametrize("task", PINNED)
def test_every_hub_data_set_is_pinned_to_a_commit(task: str) -> None:
    hub = BENCHMARKS[task].hub
    assert hub is not None
    assert (hub.path, hub.config) == PINNED[task]
    assert re.fullmatch(r"[0-9a-f]{40}", hub.revision)


def test_pocket_rows() -> None:
    benchmarks = load_benchmarks(TASKS, Path("pocket"))
    assert {name: len(benchmark.items) for name, benchmark in benchmarks.items()} == dict.fromkeys(TASKS, 200)


def _write(folder: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"{BENCHMARKS[task].file}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_task_of_the_harness(tmp_path: Path) -> None:
    """The harness itself builds our prompt, zero-shot and greedy, from a plain or gzipped file, without a metric."""
    file = _write(tmp_path, "boolq", [ROWS["boolq"]])
    with gzip.open(f"{file}.gz", "wt") as stream:
        stream.write(file.read_text())
    file.unlink()
    task = load_benchmarks(["boolq"], tmp_path)["boolq"].parts[0].task
    task.build_all_requests(limit=None)
    [instance] = task.instances
    text, settings = instance.args
    assert text == "Question: It is.\nis it so?\nAnswer:"
    assert settings["do_sample"] is False
    assert settings["until"] == ["\nQuestion:"]
    assert task.process_results(ROWS["boolq"], [" no"]) == {"bypass": 0.0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "boolq has no rows"),
        ('{"question": "a", "passage": "b", "answer": true}\n{"question": "a", "answer": true}\n', "row 2: field 'pas"),
        ('{"question": "a", "answer": true}\n', "row 1: field 'passage' is missing"),
        ('{"question": "a", "passage": "b", "answer": true}\n{"question": ', "boolq_validation.jsonl"),
        ('{"question": "a", "passage": "b", "answer": true}\n{"question": 1, "passage": [], "answer": 3}\n', "row 2"),
        ("[1]\n", "is a JSON array, not JSONL"),
    ],
)
def test_bad_file(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "boolq_validation.jsonl").write_text(lines)
    with pytest.raises(DataError) as caught:
        load_benchmarks(["boolq"], tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no medqa_gbaker_test\.jsonl or \.jsonl\.gz"):
        load_benchmarks(["medqa"], tmp_path)
    with pytest.raises(DataError, match="ZaloAI-Jaist/VMLU"):
        load_benchmarks(["vmlu"], tmp_path)
    monkeypatch.delenv("SUPEREXPERTS_DATA", raising=False)
    with pytest.raises(DataError, match=r"not on the Hub.*vmlu_valid\.jsonl"):
        load_benchmarks(["vmlu"])


def test_ids_are_unique(tmp_path: Path) -> None:
    _write(tmp_path, "arc_easy", [ROWS["arc_easy"], ROWS["arc_easy"]])
    with pytest.raises(DataError, match="two rows with the id 'X_1'"):
        load_benchmarks(["arc_easy"], tmp_path)


def test_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "gsm8k", [ROWS["gsm8k"]])
    monkeypatch.setenv("SUPEREXPERTS_DATA", str(tmp_path))
    assert [item.gold for item in load_benchmarks(["gsm8k"])["gsm8k"].items] == ["2125"]


def test_a_number_among_texts_changes_no_other_row(tmp_path: Path) -> None:
    """The JSON reader of `datasets` would make 1.5 of "1.50" and True of "true" in the other rows."""
    rows = [
        {"question": "Which?", "choices": {"text": texts, "label": ["A", "B", "C"]}, "answerKey": "A"}
        for texts in (["1.50", "007", "true"], [3, 4.5, 5], ["null", "[1]", "2020-01-01"])
    ]
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_benchmarks(["arc_easy"], tmp_path)["arc_easy"]
    assert [[text for _, text in item.choices] for item in loaded.items] == [
        ["1.50", "007", "true"],
        ["3", "4.5", "5"],
        ["null", "[1]", "2020-01-01"],
    ]
    asked = [loaded.parts[0].task.doc_to_text(row) for row in loaded.parts[0].task.eval_docs]
    assert asked == [prompt(item) for item in loaded.items]
