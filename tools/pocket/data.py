"""The data files of the pocket world: benchmarks in the columns of the real ones, fine-tuning rows, held-out text."""

from __future__ import annotations

import collections
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from superexperts.core.runs import write_bytes
from tools.pocket.pools import pools
from tools.pocket.questions import KINDS, Question, body
from tools.pocket.world import heldout

__all__ = ["FILES", "benchmark_rows", "data_files", "example_rows", "ship", "train_rows"]

Row = dict[str, Any]

FILES = {
    "mmlu": "mmlu_all_test.jsonl",
    "gsm8k": "gsm8k_main_test.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
    "boolq": "boolq_validation.jsonl",
    "medqa": "medqa_gbaker_test.jsonl",
    "vmlu": "vmlu_valid.jsonl",
}
"""kind -> file name, as the slices of the real benchmarks are called"""

EXAMPLE_FILES = {
    "mmlu": "mmlu_all_dev.jsonl",
    "gsm8k": "gsm8k_main_train.jsonl",
    "arc_easy": "arc_easy_train.jsonl",
    "boolq": "boolq_train.jsonl",
    "medqa": "medqa_gbaker_train.jsonl",
    "vmlu": "vmlu_dev.jsonl",
}
"""kind -> name of the file with few-shot examples"""
EXAMPLES = 5
"""of each subject"""


def _mmlu_row(question: Question, number: int) -> Row:
    return {
        "question": question.text,
        "subject": question.subject,
        "choices": list(question.choices),
        "answer": question.labels.index(question.answer),
    }


def _gsm8k_row(question: Question, number: int) -> Row:
    lines = [f"{x} {sign} {y} = <<{x}{sign}{y}={z}>>{z}" for x, sign, y, z in question.steps]
    return {"question": question.text, "answer": "\n".join([*lines, f"#### {question.answer}"])}


def _arc_row(question: Question, number: int) -> Row:
    return {
        "id": f"Pocket_{number:05d}",
        "question": question.text,
        "choices": {"text": list(question.choices), "label": list(question.labels)},
        "answerKey": question.answer,
    }


def _boolq_row(question: Question, number: int) -> Row:
    return {"question": question.text, "passage": question.passage, "answer": question.answer == "yes"}


def _medqa_row(question: Question, number: int) -> Row:
    options = dict(zip(question.labels, question.choices, strict=True))
    return {
        "question": question.text,
        "answer": options[question.answer],
        "options": options,
        "meta_info": question.subject,
        "answer_idx": question.answer,
    }


def _vmlu_row(question: Question, number: int) -> Row:
    return {
        "id": f"{question.subject}-{number:04d}",
        "question": question.text,
        "choices": [f"{label}. {text}" for label, text in zip(question.labels, question.choices, strict=True)],
        "answer": question.answer,
    }


_ROW: dict[str, Callable[[Question, int], Row]] = {
    "mmlu": _mmlu_row,
    "gsm8k": _gsm8k_row,
    "arc_easy": _arc_row,
    "boolq": _boolq_row,
    "medqa": _medqa_row,
    "vmlu": _vmlu_row,
}


def benchmark_rows(kind: str) -> list[Row]:
    """The 200 test rows of a kind, in the columns of the real benchmark."""
    return [_ROW[kind](question, number) for number, question in enumerate(pools()[kind][0])]


def example_rows(kind: str) -> list[Row]:
    """The first fine-tuning questions of every subject of a kind, in the columns of the real benchmark."""
    seen: collections.Counter[str] = collections.Counter()
    rows = []
    for number, question in enumerate(pools()[kind][1]):
        seen[question.subject] += 1
        if seen[question.subject] <= EXAMPLES:
            rows.append(_ROW[kind](question, number))
    return rows


def train_rows() -> list[Row]:
    """1,800 rows `{"question", "explain", "answer"}` of all six kinds, mixed."""
    rows = [
        {"question": body(question), "explain": question.explain, "answer": question.said}
        for kind in KINDS
        for question in pools()[kind][1]
    ]
    random.Random("train rows").shuffle(rows)
    return rows


def _lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def data_files() -> dict[str, bytes]:
    """Name -> content of every data file: the benchmarks (`FILES`), their few-shot examples (`EXAMPLE_FILES`),
    `train.json` and `pocket_heldout.jsonl`. Takes some seconds.

    The names are those of the slices of the real benchmarks, so that one code path reads either.
    """
    texts = {name: _lines(benchmark_rows(kind)) for kind, name in FILES.items()}
    texts |= {name: _lines(example_rows(kind)) for kind, name in EXAMPLE_FILES.items()}
    texts["train.json"] = json.dumps(train_rows(), ensure_ascii=False, indent=1) + "\n"
    texts["pocket_heldout.jsonl"] = _lines([{"text": text} for text in heldout()])
    return {name: text.encode() for name, text in texts.items()}


def ship(folder: Path) -> None:
    """Write every data file, compressed, into the package's folder of data."""
    for name, content in data_files().items():
        write_bytes(folder / f"{name}.gz", gzip.compress(content, mtime=0))  # mtime: the same bytes every time
