"""The original project's raw files: `raw_result_*.json`, lists of `question`, `choices`, `gold`, `answer`.

What the original's scripts write:

    MMLU, ARC, OpenBookQA   {"question": "Which ...", "choices": ["sand", "oil"], "gold": "B", "answer": " B. oil"}
    MedQA                   {"question": "A ...", "choices": "A. Tell ...\\nB. Hide ...\\n", "gold": "B", "answer": ...}
    BoolQ                   {"passage": "Property tax ...", "question": "is house ...", "gold": true, "answer": ...}
    GSM8K                   {"question": "Janet's ducks ...", "gold": "... #### 18", "answer": ...}
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

from superexperts.benchmarks import BENCHMARKS
from superexperts.core.errors import DataError
from superexperts.core.prompt import prompt_of
from superexperts.core.runs import read_json
from superexperts.core.types import Answer
from superexperts.extraction import number_value

__all__ = ["full_choice", "raw_files", "read_raw", "task_of"]


def raw_files(folder: Path) -> list[Path]:
    """The folder's raw files, by name."""
    return sorted(folder.glob("raw_result_*.json"))


def task_of(file: Path) -> str:
    """`raw_result_baseline_arc.json` -> `arc_challenge`."""
    name = re.sub(r"^raw_result_(?:baseline(?:_|$))?", "", file.stem)
    return next((task for task, benchmark in BENCHMARKS.items() if benchmark.original_name == name), name)


def full_choice(gold: Any, choices: Any) -> str | None:
    """The gold choice with its letter, as the original's notebook fills it in: `D. oil`.

    A list's choices are lettered by their place; None if the gold answer is not a letter of one. Of a text with a line
    a choice it is that line, "" where there is none.
    """
    if isinstance(choices, str):
        lines = [line for line in choices.strip().split("\n") if ". " in line]
        return {line.split(". ", 1)[0].strip(): line.strip() for line in lines}.get(gold, "")
    letters = list(string.ascii_uppercase)
    if not isinstance(gold, str) or gold not in letters or not isinstance(choices, list):
        return None
    place = letters.index(gold)
    return f"{gold}. {choices[place]}" if place < len(choices) else None


def read_raw(file: Path) -> tuple[list[dict[str, Any]], list[Answer]]:
    """A raw file's rows with `full_choice` filled in, and the answers in them; the folder's name is the variant's.

    `DataError` names the row and the field. The prompt of an answer is made anew from the row: the file has none.
    """
    value = read_json(file, "folder")
    rows = [value] if isinstance(value, dict) else value  # the notebook writes a single row without a list
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file} holds no list of rows; give the file as rep/<benchmark>.py wrote it", field="folder")
    answers = []
    for number, row in enumerate(rows, start=1):
        try:
            answers.append(_answer(row, number - 1, file))
        except (KeyError, TypeError) as error:
            raise DataError(f"{file} row {number}: {error}; repair the row", field="folder") from error
    filled = [{**row, "full_choice": full_choice(row["gold"], row.get("choices", []))} for row in rows]
    return filled, answers


def _answer(row: Any, index: int, file: Path) -> Answer:
    if not isinstance(row, dict):
        raise TypeError(f"a {type(row).__name__} where a row should be")
    question, gold, response = row["question"], row["gold"], row["answer"]
    if not isinstance(question, str) or not isinstance(response, str | None):
        raise TypeError("question and answer must be text")
    choices = _choices(row.get("choices"))
    body = "\n".join([str(row.get("passage", "")), question, *(f"{label}. {text}" for label, text in choices)]).strip()
    kind, right = _gold(gold, bool(choices))
    return Answer(
        id=f"{task_of(file)}-{index}",
        prompt=prompt_of(body),
        response=response or "",
        gold=right,
        choices=choices,
        kind=kind,
        task=task_of(file),
        variant=file.resolve().parent.name,
        seed=0,
    )


def _choices(value: Any) -> tuple[tuple[str, str], ...]:
    """(label, text) of a list, lettered by place, or of a text with a line a choice that begins with its label."""
    if not value:
        return ()
    if isinstance(value, str):
        found = re.findall(r"^\s*(\w{1,2})\. (.*)$", value, re.MULTILINE)
        if not found:
            raise TypeError("field 'choices' has no line like 'A. text'")
        return tuple((label, text.strip()) for label, text in found)
    if not isinstance(value, list) or len(value) > len(string.ascii_uppercase):
        raise TypeError("field 'choices' is neither a list of at most 26 nor a text")
    return tuple(zip(string.ascii_uppercase, (str(text).strip() for text in value), strict=False))


def _gold(gold: Any, chooses: bool) -> tuple[Any, str]:
    """(kind, gold answer) in our own form."""
    text = json.dumps(gold) if isinstance(gold, bool | int | float) else gold
    if not isinstance(text, str) or not text.strip():
        raise TypeError("field 'gold' is empty")
    text = text.strip()
    if chooses:
        return "choice", text
    if text.casefold() in ("true", "yes", "false", "no"):
        return "yesno", "yes" if text.casefold() in ("true", "yes") else "no"
    number = text.rpartition("####")[2].strip().replace(",", "").lstrip("$")
    if number_value(number) is None:
        raise TypeError(f"field 'gold' is {text[:40]!r}: neither true nor false, nor does it end in a number")
    return "number", number
