"""Reads what each raw answer commits to, by the rules in `extraction`; what cannot be read is counted, and wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import stats
from .artifacts import Answer, Extraction, Score
from .audit import audit_file
from .config import MORE_TASKS, TASKS, ExtractConfig
from .console import note
from .errors import DataError
from .extraction import number_value, read
from .rundir import completed, fingerprint, prepare_folder, read_json, write_json, write_manifest, write_text

__all__ = ["extract", "extract_folder", "run"]

SCORES_SCHEMA = "superexperts/scores/1"


def extract(answer: Answer) -> Extraction:
    """What an answer commits to, and whether that is right. The gold answer plays no part in the reading.

    `extracted` is a choice's label, "yes" / "no", or a plain number or fraction; None, `how` "unparsed" and not
    correct where nothing, or more than one thing, is committed to. Numbers are compared as numbers.
    """
    question = answer.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    value, rule = read(answer.kind, answer.response, question, answer.choices)
    if value is None:
        return Extraction(id=answer.id, extracted=None, how="unparsed", correct=False)
    return Extraction(id=answer.id, extracted=value, how=f"rule:{rule}", correct=_right(answer, value))


def _right(answer: Answer, value: str) -> bool:
    if answer.kind == "number":
        gold = number_value(answer.gold)
        return gold is not None and number_value(value) == gold
    return value.casefold() == answer.gold.casefold()


def extract_folder(folder: Path) -> list[Score]:
    """Reads answers/*.jsonl; writes extractions/*.jsonl and scores.json. Scores in the benchmarks' usual order.

    Nothing is done where both were read from these very answers. `DataError` without answers, where a line is no
    answer, or where `evaluate` was interrupted.
    """
    started = time.monotonic()
    files = sorted((folder / "answers").glob("*.jsonl"), key=_order)
    if any((folder / "answers").glob(".*.partial")):
        raise DataError(f"DIR: the answers in {str(folder)!r} are not complete; run `evaluate` again, it continues")
    if not files:
        raise DataError(f"DIR: {str(folder)!r} has no answers/*.jsonl; give a folder that `evaluate` wrote")
    inputs = {"answers": {file.name: fingerprint(file) for file in files}}
    if completed(folder / "extractions", "extract", inputs):
        note(f"extract: {folder} is up to date, nothing to do")
        return [Score.from_json(row) for row in read_json(folder / "scores.json", "DIR")["scores"]]
    answers = {file.name: list(_read_answers(file)) for file in files}  # all of them, before anything is written
    prepare_folder(folder / "extractions", "DIR")
    scores = []
    for name, rows in answers.items():
        extractions = [extract(answer) for answer in rows]
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in extractions]
        write_text(folder / "extractions" / name, "".join(lines))
        scores.append(stats.score(rows[0].task, rows[0].variant, extractions))
    for stale in set((folder / "extractions").glob("*.jsonl")) - {folder / "extractions" / name for name in answers}:
        stale.unlink()
    write_json(folder / "scores.json", _scores_json(scores))
    outputs = [*answers, "../scores.json"]
    write_manifest(folder / "extractions", "extract", inputs, outputs, time.monotonic() - started)
    return scores


def _order(file: Path) -> tuple[int, str]:
    known = TASKS + MORE_TASKS
    return known.index(file.stem) if file.stem in known else len(known), file.stem


def _scores_json(scores: Sequence[Score]) -> dict[str, Any]:
    return {"schema": SCORES_SCHEMA, "scores": [score.to_json() for score in scores]}


def _read_answers(file: Path) -> Iterator[Answer]:
    found = 0
    # A byte that is no UTF-8 becomes a replacement character: it cannot turn one answer into another's error.
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield Answer.from_json(json.loads(line))
            except (json.JSONDecodeError, DataError) as error:
                raise DataError(f"DIR: {file} line {number} is no answer ({error}); evaluate again") from error
            found = number
    if not found:
        raise DataError(f"DIR: {file} is empty; evaluate again")


def run(config: ExtractConfig) -> dict[str, Any]:
    """The command: extracts a folder's answers and returns the scores, or audits the extraction."""
    if config.audit is not None:
        return audit_file(config.audit)
    assert config.folder is not None
    scores = extract_folder(config.folder)
    return {"out": str(config.folder), **_scores_json(scores)}
