"""Rows as people write them: what is plain is read, and everything else is one line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from superexperts.core.errors import DataError
from superexperts.training.rows import Row, encode, read_rows
from tests.support.chats import PLAIN
from tests.training.test_train import BOS, EOS, byte_tokenizer, ids

LISTED = "Pick.\nA. one\nB. two"


def read(folder: Path, *rows: Any, name: str = "rows.json") -> list[Row]:
    (folder / name).write_text(json.dumps(list(rows)), encoding="utf-8")
    return read_rows(folder / name)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("[b]", "B"),
        ("B.", "B"),
        ("b)", "B"),
        (["B"], "B"),
        ("two", "two"),
        ("Two.", "Two."),
        ("B. two", "B. two"),
    ],
)
def test_forms_of_an_answer(answer: Any, wanted: str, tmp_path: Path) -> None:
    [row] = read(tmp_path, {"question": LISTED, "explain": "e", "answer": answer})
    assert row.answer == wanted


@pytest.mark.parametrize(("question", "answer"), [("Pick.\nA. b\nB. c", "b"), ("Pick.\nA. 2\nB. 1", 1)])
def test_the_text_of_a_choice_comes_first(question: str, answer: Any, tmp_path: Path) -> None:
    """Where a choice's text looks like a letter or an index, that text is meant."""
    [row] = read(tmp_path, {"question": question, "explain": "e", "answer": answer})
    assert row.answer == str(answer)


@pytest.mark.parametrize(
    "choices", [["x", "y", "z"], {"A": "x", "B": "y", "C": "z"}, {"text": ["x", "y", "z"], "label": [1, 2, 3]}]
)
def test_choices_in_a_column(choices: Any, tmp_path: Path) -> None:
    [row] = read(tmp_path, {"question": "Which?", "choices": choices, "rationale": "e", "answerKey": "c"})
    assert row.question == "Which?\nA. x\nB. y\nC. z"
    assert (row.explain, row.answer) == ("e", "C")


def test_an_index_is_read_where_the_file_shows_how_it_counts(tmp_path: Path) -> None:
    def row(answer: Any) -> dict[str, Any]:
        return {"question": "Which?", "choices": ["x", "y", "z"], "explain": "e", "answer": answer}

    assert [one.answer for one in read(tmp_path, row(0), row(2), row(1))] == ["A", "C", "B"]
    assert [one.answer for one in read(tmp_path, row(1), row(3))] == ["A", "C"]
    with pytest.raises(DataError, match="row 1: 'answer' is 1, which would mean B if choices count from 0 and A"):
        read(tmp_path, row(1), row(2))
    with pytest.raises(DataError, match="row 1: 'answer' is 7, which would mean no choice; write the letter"):
        read(tmp_path, row(7), row(0))
    with pytest.raises(DataError, match="row 1: 'answer' is 1, which would mean B if"):
        read(tmp_path, {"question": LISTED, "explain": "e", "answer": "1"})


def test_mixed_types_in_a_column_stay_as_they_are_written(tmp_path: Path) -> None:
    values = ["007", 7, "1.50", 1.5, "true", "null"]
    rows = read(
        tmp_path, *({"question": f"q{i}", "explain": ["a", "b"], "answer": one} for i, one in enumerate(values))
    )
    assert [row.answer for row in rows] == ["007", "7", "1.50", "1.5", "true", "null"]
    assert rows[0].explain == "a\nb"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"question": "q", "explain": "e", "answer": ["A", "B"]}, r"'answer' is \[\"A\", \"B\"\], not text"),
        ({"question": "q", "explain": "e", "answer": True}, "'answer' is true, not text"),
        ({"question": "q", "answer": "a"}, "has no 'explain'; it takes question, explain, answer"),
        ({"text": "t", "label": 1}, "has text, label; it takes question, explain, answer .* or messages"),
        ({"question": "q", "choices": "x", "explain": "e", "answer": "A"}, "'choices' is \"x\"; write a list"),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "'messages' is not a conversation that ends",
        ),
        ({"messages": [{"text": "q"}, {"text": "a"}]}, "a message of 'messages' has no role and text"),
        ({"instruction": "q", "output": " "}, "'output' is empty"),
    ],
)
def test_what_is_not_plain_is_one_line(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"rows.json row 1:? ?{said}") as caught:
        read(tmp_path, value)
    assert "\n" not in str(caught.value)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    ],
)
def test_a_question_and_a_reply(value: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = read(tmp_path, value)
    [plain] = encode(rows, tokenizer, max_length=100, file=tmp_path)
    assert plain.input_ids == [BOS, *ids("Question: q\nAnswer: a"), EOS]
    tokenizer.chat_template = PLAIN
    [chat] = encode(rows, tokenizer, max_length=100, file=tmp_path, chat=True)
    assert chat.input_ids == [BOS, *ids("<user>q"), EOS, *ids("<assistant>a"), EOS]


def test_a_longer_conversation_needs_a_chat(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = read(tmp_path, {"messages": [{"role": "system", "content": "s"}, *CHAT, *CHAT]})
    with pytest.raises(DataError, match="a conversation of 5 messages, which plain text cannot hold; give prompt"):
        encode(rows, tokenizer, max_length=100, file=tmp_path)
    tokenizer.chat_template = PLAIN
    [example] = encode(rows, tokenizer, max_length=100, file=tmp_path, chat=True, system_prompt="other")
    start = [BOS, *ids("<system>s"), EOS, *ids("<user>q"), EOS, *ids("<assistant>a"), EOS, *ids("<user>q"), EOS]
    assert example.input_ids == [*start, *ids("<assistant>a"), EOS]
    assert [label for label in example.labels if label != -100] == [*ids("a"), EOS]


ROWS = [{"question": f'q {i}, "so"\nA. x\nB. y', "explain": "e", "answer": "B"} for i in range(3)]


def write(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif file.suffix in (".csv", ".tsv"):
        with file.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(
                stream, ["question", "explain", "answer"], delimiter="\t" if file.suffix == ".tsv" else ","
            )
            table.writeheader()
            table.writerows(ROWS)
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.parquet", "a.parquet"),
        ("a.csv", "a.csv"),
        ("a.tsv", "a.tsv"),
        ("hub/data/train-00000-of-00001.parquet", "hub"),
        ("hub/default/train.jsonl.gz", "hub"),
    ],
)
def test_files_and_folders_with_the_same_columns(name: str, data: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    if data == "hub":
        write((tmp_path / name).with_name((tmp_path / name).name.replace("train", "test")))
        (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    assert [(row.question, row.explain, row.answer) for row in read_rows(tmp_path / data)] == [
        (row["question"], "e", "B") for row in ROWS
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.csv": "question,explain,answer\nq,e\n"}, r"a\.csv row 1 does not have the 3 columns of the header"),
        ({"a.parquet": "no"}, r"a\.parquet is not readable as Parquet"),
        ({"f/a.csv": "", "f/a.json": "[]"}, r"f has files of rows as \.csv and \.json; give one of them"),
        ({"f/a.md": ""}, "f has no file of rows; give JSON, JSONL, CSV or Parquet"),
        ({"f/b/a.md": ""}, "f has no file of rows"),
    ],
)
def test_files_that_cannot_be_read(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_rows(tmp_path / Path(next(iter(files))).parts[0])
