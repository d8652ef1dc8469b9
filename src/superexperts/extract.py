"""Reads what each raw answer commits to, by the rules in `extraction` and, where asked for, by a judge.

What cannot be read is counted, and wrong.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import stats
from .artifacts import Answer, Extraction, Score
from .audit import JudgeReport, audit_file, joined, judge_report
from .config import MORE_TASKS, TASKS, ExtractConfig
from .console import note
from .errors import DataError
from .extraction import number_value, read
from .judge import Case, Judge, Verdict, open_judge
from .original import raw_files, read_raw, task_of
from .rundir import completed, fingerprint, prepare_folder, read_json, write_json, write_manifest, write_text

__all__ = ["extract", "extract_folder", "judged", "run"]

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


def judged(answers: Sequence[Answer], judge: Judge, scope: str) -> tuple[list[Extraction], JudgeReport]:
    """As `extract`, with a judge for what the rules left unparsed, or for all; and how the judge did."""
    by_rules = [extract(answer) for answer in answers]
    asked = [i for i, found in enumerate(by_rules) if scope == "all" or found.extracted is None]
    verdicts = dict(zip(asked, judge.read([_case(answers[i]) for i in asked]), strict=True))
    found = [_judged(answer, verdicts[i]) if i in verdicts else by_rules[i] for i, answer in enumerate(answers)]
    pairs = [(answers[i].kind, by_rules[i].extracted, verdict.value) for i, verdict in verdicts.items()]
    return found, judge_report(list(verdicts.values()), pairs if scope == "all" else None)


def _case(answer: Answer) -> Case:
    """What a judge may know of an answer."""
    question = answer.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    listed = "".join(f"\n{label}. {text}" for label, text in answer.choices)
    return Case(
        kind=answer.kind, question=question.removesuffix(listed), choices=answer.choices, answer=answer.response
    )


def _judged(answer: Answer, verdict: Verdict) -> Extraction:
    if verdict.value is None:
        return Extraction(id=answer.id, extracted=None, how="unparsed", correct=False)
    return Extraction(id=answer.id, extracted=verdict.value, how="judge", correct=_right(answer, verdict.value))


def extract_folder(folder: Path, judge: Judge | None = None, scope: str = "left") -> list[Score]:
    """Reads answers/*.jsonl, or the original's raw_result_*.json; writes extractions/ and scores.json.

    Scores come in the benchmarks' usual order. Nothing is done where both were read from these very answers.
    `DataError` without answers, where a line is no answer, or where `evaluate` was interrupted.
    """
    started = time.monotonic()
    files = sorted((folder / "answers").glob("*.jsonl"), key=_order)
    raw = raw_files(folder)
    if any((folder / "answers").glob(".*.partial")):
        raise DataError(f"DIR: the answers in {str(folder)!r} are not complete; run `evaluate` again, it continues")
    if files and raw:
        raise DataError(f"DIR: {str(folder)!r} has answers/ and raw_result_*.json; keep them in two folders")
    if not files and not raw:
        raise DataError(f"DIR: {str(folder)!r} has no answers/*.jsonl; give a folder that `evaluate` wrote")
    inputs = {
        "answers": {file.name: fingerprint(file) for file in files or raw},
        "judge": None if judge is None else {"model": judge.identity, "scope": scope},
    }
    if completed(folder / "extractions", "extract", inputs):
        note(f"extract: {folder} is up to date, nothing to do")
        return [Score.from_json(row) for row in read_json(folder / "scores.json", "DIR")["scores"]]
    answers, filled = _read_all(files, raw)  # all of them, before anything is written
    prepare_folder(folder / "extractions", "DIR")
    scores, reports = [], []
    for task, rows in answers.items():
        if judge is None:
            extractions = [extract(answer) for answer in rows]
        else:
            extractions, report = judged(rows, judge, scope)
            reports.append(report)
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in extractions]
        write_text(folder / "extractions" / f"{task}.jsonl", "".join(lines))
        scores.append(stats.score(rows[0].task, rows[0].variant, extractions))
    for name, value in filled.items():
        text = json.dumps(value, ensure_ascii=False, indent=2)  # as the notebook writes it
        write_text(folder / "extractions" / name, text)
    outputs = [*(f"{task}.jsonl" for task in answers), *filled]
    for stale in set((folder / "extractions").glob("*.json*")) - {folder / "extractions" / name for name in outputs}:
        stale.unlink()
    value = _scores_json(scores)
    if judge is not None:
        value["judge"] = {"model": judge.name, "scope": scope, **joined(reports)}
    write_json(folder / "scores.json", value)
    write_manifest(folder / "extractions", "extract", inputs, [*outputs, "../scores.json"], time.monotonic() - started)
    return scores


def _read_all(files: Sequence[Path], raw: Sequence[Path]) -> tuple[dict[str, list[Answer]], dict[str, Any]]:
    """(answers by benchmark; rows by raw file's name, with `full_choice`)."""
    answers = {file.stem: list(_read_answers(file)) for file in files}
    filled = {}
    for file in sorted(raw, key=lambda file: _order(Path(task_of(file)))):
        if task_of(file) in answers:
            raise DataError(f"DIR: {file} is a second file of {task_of(file)}; keep them in two folders")
        filled[file.name], answers[task_of(file)] = read_raw(file)
    return answers, filled


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


def run(config: ExtractConfig, judge: Judge | None = None) -> dict[str, Any]:
    """The command: extracts a folder's answers and returns the scores, or audits the extraction.

    `judge` is the one that the settings name, if it is open already.
    """
    if config.audit is not None:
        return audit_file(config.audit, open_judge(config, None))  # a labelled file has no run folder to remember in
    assert config.folder is not None
    judge = judge or open_judge(config, config.folder / "judge.jsonl")
    extract_folder(config.folder, judge, config.judge_scope)
    return {"out": str(config.folder), **read_json(config.folder / "scores.json", "DIR")}
