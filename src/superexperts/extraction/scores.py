"""From answers to extractions and scores: by the rules of `extraction` and, if there is one, by a judge.

An answer that cannot be read is counted as unparsed, and is wrong.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from superexperts.benchmarks import BENCHMARKS
from superexperts.benchmarks.base import Withheld
from superexperts.core.console import note
from superexperts.core.errors import DataError
from superexperts.core.parallel import parallel_map
from superexperts.core.paths import require_folder
from superexperts.core.runs import (
    MANIFEST,
    completed,
    fingerprint,
    prepare_folder,
    read_json,
    write_json,
    write_manifest,
    write_text,
)
from superexperts.core.types import Answer, Ended, Extraction, Score
from superexperts.extraction import exact_value, number_value, read_parts, said
from superexperts.extraction.audit import JudgeReport, joined, judge_report
from superexperts.extraction.judge import Case, Judge, Verdict, recorded_prompt
from superexperts.extraction.original_files import raw_files, read_raw, task_of
from superexperts.extraction.subjects import by_subject
from superexperts.results.statistics import single_run

__all__ = ["extract", "extract_all", "extract_folder", "judged", "normalized", "submission"]

WORTH = 2000
"""Answers that take the rules several times as long as it takes to start a process."""
SCORES_SCHEMA = "superexperts/scores/1"


def extract(answer: Answer) -> Extraction:
    """What an answer commits to, and whether that is right. The gold answer plays no part in the reading.

    `extracted` is a choice's label, "yes" / "no", or a plain number or fraction; None, `how` "unparsed" and not
    correct where nothing, or more than one thing, is committed to. Numbers are compared as numbers.
    """
    if answer.loglikelihoods is not None:  # the response is a label: there is nothing to read
        label = answer.response
        return Extraction(id=answer.id, extracted=label, how="rule:loglikelihood", correct=_right(answer, label))
    parts = answer.parts
    ended = answer.ended(parts)
    if ended == "refused":
        return _unparsed(answer, ended)
    value, rule = read_parts(answer.kind, parts, answer.question, answer.choices)
    if value is None:
        return _unparsed(answer, ended)
    return Extraction(id=answer.id, extracted=value, how=f"rule:{rule}", correct=_right(answer, value), ended=ended)


def extract_all(answers: Sequence[Answer]) -> list[Extraction]:
    """`extract` of each, on all cores where there are many."""
    return parallel_map(extract, answers, worth=WORTH)


def _unparsed(answer: Answer, ended: Ended | None) -> Extraction:
    correct = None if answer.gold is None else False
    return Extraction(id=answer.id, extracted=None, how="unparsed", correct=correct, ended=ended)


def _right(answer: Answer, value: str) -> bool | None:
    """Whether a value equals the gold answer; None without one."""
    if answer.gold is None:
        return None
    if answer.kind == "number":
        if value == answer.gold:  # most are written alike, and numbers take time
            return True
        gold = exact_value(answer.gold)
        return gold is not None and number_value(value) == gold
    return value.casefold() == answer.gold.casefold()


def normalized(answer: Answer) -> bool | None:
    """Whether the choice of the highest log-probability per character is right: the harness's acc_norm.

    None where no choices were compared, without a gold answer, and for benchmarks of which the harness has no acc_norm.
    """
    if answer.loglikelihoods is None or answer.gold is None or not _has_acc_norm(answer.task):
        return None
    label, _, _ = max(answer.loglikelihoods, key=lambda choice: choice[1] / max(choice[2], 1))  # the first of equals
    return _right(answer, label)


def judged(answers: Sequence[Answer], judge: Judge, scope: str) -> tuple[list[Extraction], JudgeReport]:
    """As `extract`, with a judge for what the rules left unparsed, or for all; and how the judge did."""
    by_rules = extract_all(answers)
    read_all = scope == "all"
    asked = [
        i
        for i, (answer, found) in enumerate(zip(answers, by_rules, strict=True))
        if answer.loglikelihoods is None and found.ended != "refused" and (read_all or found.extracted is None)
    ]
    verdicts = dict(zip(asked, judge.read([_case(answers[i]) for i in asked]), strict=True))
    found = [
        _judged(answer, verdicts[i], by_rules[i].ended) if i in verdicts else by_rules[i]
        for i, answer in enumerate(answers)
    ]
    pairs = [(answers[i].kind, by_rules[i].extracted, verdict.value) for i, verdict in verdicts.items()]
    return found, judge_report(list(verdicts.values()), pairs if read_all else None)


def _case(answer: Answer) -> Case:
    """What a judge may know of an answer."""
    listed = "".join(f"\n{label}. {text}" for label, text in answer.choices)
    return Case(
        kind=answer.kind,
        question=answer.question.removesuffix(listed),
        choices=answer.choices,
        answer=said(answer.parts),
    )


def _judged(answer: Answer, verdict: Verdict, ended: Ended | None) -> Extraction:
    if verdict.value is None:
        return _unparsed(answer, ended)
    correct = _right(answer, verdict.value)
    return Extraction(id=answer.id, extracted=verdict.value, how="judge", correct=correct, ended=ended)


def extract_folder(folder: Path, judge: Judge | None = None, scope: str = "left") -> list[Score]:
    """Reads answers/*.jsonl, or the original's raw_result_*.json; writes extractions/ and scores.json.

    Answers without gold get no score, and a file for the benchmark's publisher instead. Scores come in the benchmarks'
    usual order. Nothing is done where both were read from these very answers.
    `DataError` if there are no answers, a line is not an answer, or `evaluate` was interrupted.
    """
    started = time.monotonic()
    what = "the folder that `evaluate` wrote"
    require_folder(folder, "folder", what)
    files = sorted((folder / "answers").glob("*.jsonl"), key=_order)
    raw = raw_files(folder)
    if any((folder / "answers").glob(".*.partial")):
        raise DataError(
            f"the answers in {str(folder)!r} are not complete; run `evaluate` again, it continues", field="folder"
        )
    if files and raw:
        raise DataError(f"{str(folder)!r} has answers/ and raw_result_*.json; keep them in two folders", field="folder")
    if not files and not raw:
        raise DataError(f"{str(folder)!r} has no answers/*.jsonl; give {what}", field="folder")
    inputs = {
        "answers": {file.name: fingerprint(file) for file in files or raw},
        "judge": None if judge is None else {"model": judge.identity, "scope": scope, **recorded_prompt()},
    }
    if completed(folder / "extractions", "extract", inputs):
        note(f"extract: {folder} is up to date, nothing to do")
        return [Score.from_json(row) for row in read_json(folder / "scores.json", "folder")["scores"]]
    answers, filled = _read_all(files, raw)  # all of them, before anything is written
    prepare_folder(folder / "extractions", "folder")
    scores, reports, more = [], [], dict[str, list[dict[str, Any]]]()
    written = []
    for task, rows in answers.items():
        if judge is None:
            extractions = extract_all(rows)
        else:
            extractions, report = judged(rows, judge, scope)
            reports.append(report)
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in extractions]
        written.append(f"{task}.jsonl")
        write_text(folder / "extractions" / written[-1], "".join(lines))
        if rows[0].gold is None:
            written.append(f"{task}_submission.csv")
            write_text(folder / "extractions" / written[-1], submission(task, extractions))
            entry = {"task": task, "variant": rows[0].variant, "items": len(rows), "submission": written[-1]}
            unparsed = sum(row.extracted is None for row in extractions)
            more.setdefault("ungraded", []).append(entry | {"unparsed": unparsed})
            continue
        scores.append(single_run.score(rows[0].task, rows[0].variant, extractions))
        for name, found in _details(rows, extractions).items():
            more.setdefault(name, []).append({"task": task, **found})
    for name, value in filled.items():
        text = json.dumps(value, ensure_ascii=False, indent=2)  # as the notebook writes it
        write_text(folder / "extractions" / name, text)
    outputs = [*written, *filled]
    old = {file for kind in ("*.json*", "*.csv") for file in (folder / "extractions").glob(kind)}
    for stale in old - {folder / "extractions" / name for name in [*outputs, MANIFEST]}:
        stale.unlink()
    value = {**_scores_json(scores), **more}
    if judge is not None:
        value["judge"] = {"model": judge.name, "scope": scope, **joined(reports)}
    write_json(folder / "scores.json", value)
    write_manifest(folder / "extractions", "extract", inputs, [*outputs, "../scores.json"], time.monotonic() - started)
    return scores


def _has_acc_norm(task: str) -> bool:
    return task in BENCHMARKS and BENCHMARKS[task].acc_norm


def submission(task: str, extractions: Sequence[Extraction]) -> str:
    """The CSV that VMLU's publisher takes: `id,answer`, a line an item; without an answer where none could be read."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    withheld = BENCHMARKS[task].withheld if task in BENCHMARKS else None
    writer.writerow((withheld or Withheld(file="")).columns)
    writer.writerows((row.id, row.extracted or "") for row in extractions)
    return text.getvalue()


def _details(answers: Sequence[Answer], extractions: Sequence[Extraction]) -> dict[str, dict[str, Any]]:
    """Further figures of a benchmark: acc_norm if choices were compared, and averages over subjects."""
    details = {}
    by_length = [normalized(answer) for answer in answers]
    if None not in by_length:
        right = sum(map(bool, by_length))
        low, high = single_run.wilson(right, len(by_length))
        accuracy = right / len(by_length)
        details["normalized"] = {"correct": right, "accuracy": accuracy, "low": low, "high": high}
    subjects = by_subject(
        answers[0].task, [answer.subject for answer in answers], [bool(row.correct) for row in extractions]
    )
    if subjects is not None:
        details["subjects"] = subjects
    return details


def _read_all(files: Sequence[Path], raw: Sequence[Path]) -> tuple[dict[str, list[Answer]], dict[str, Any]]:
    """(answers by benchmark; rows by raw file's name, with `full_choice`)."""
    answers = {file.stem: list(_read_answers(file)) for file in files}
    filled = {}
    for file in sorted(raw, key=lambda file: _order(Path(task_of(file)))):
        if task_of(file) in answers:
            raise DataError(f"{file} is a second file of {task_of(file)}; keep them in two folders", field="folder")
        filled[file.name], answers[task_of(file)] = read_raw(file)
    return answers, filled


def _order(file: Path) -> tuple[int, str]:
    known = list(BENCHMARKS)
    return known.index(file.stem) if file.stem in known else len(known), file.stem


def _scores_json(scores: Sequence[Score]) -> dict[str, Any]:
    return {"schema": SCORES_SCHEMA, "scores": [score.to_json() for score in scores]}


def _read_answers(file: Path) -> Iterator[Answer]:
    found, graded, seen = 0, set(), set()
    of: tuple[str, str] | None = None
    # A byte that is not UTF-8 becomes a replacement character, so that one bad answer does not stop the others.
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                answer = Answer.from_json(json.loads(line))
            except (json.JSONDecodeError, DataError) as error:
                raise DataError(
                    f"{file} line {number} is not an answer ({error}); evaluate again", field="folder"
                ) from error
            found = number
            graded.add(answer.gold is not None)
            if len(graded) > 1:
                raise DataError(
                    f"{file} line {number}: some answers have a gold answer, some none; evaluate again", field="folder"
                )
            of = of or (answer.task, answer.variant)
            if answer.id in seen or of != (answer.task, answer.variant):
                raise DataError(
                    (
                        f"{file} line {number}: a second answer to item {answer.id!r:.60}, or one of another benchmark "
                        "or variant; keep one file for each benchmark of a variant"
                    ),
                    field="folder",
                )
            seen.add(answer.id)
            yield answer
    if not found:
        raise DataError(f"{file} is empty; evaluate again", field="folder")
