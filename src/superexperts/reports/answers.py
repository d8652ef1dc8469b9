"""The items that some runs got right and others wrong, with the raw answers, as data for the report's browser."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from superexperts.benchmarks import title_of
from superexperts.core.errors import DataError
from superexperts.core.types import Answer, Extraction
from superexperts.results.results import Results

__all__ = ["Disagreements", "disagreements", "script_safe", "visible"]

MAX_PER_TASK = 60
PROMPT_LENGTH = 1200
RESPONSE_LENGTHS = (1000, 500, 250)
"""Answers are cut to the first of these lengths with which all items fit."""

Lines = Mapping[str, Mapping[str, Sequence[Any]]]
Row = tuple[Extraction, Answer]

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb]"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disagreements:
    """What the browser shows: counts of items, and the items as JSON."""

    asked: int
    found: int
    shown: int
    json: str
    """Safe inside a `<script type="application/json">`."""


def disagreements(results: Results, answers: Lines, extractions: Lines, max_bytes: int = 2 * 2**20) -> Disagreements:
    """Items that some runs got right and others wrong: the first ones of each benchmark, shortened.

    `answers` and `extractions` are by run and benchmark; `DataError` if an item lacks either. The JSON of the items
    takes at most `max_bytes`.
    """
    items: list[str] = []
    tasks = []
    asked = found = 0
    budget = max_bytes // max(1, len(results.columns))
    for task in results.columns:
        first, differing = _differing(results, task, answers, extractions)
        asked, found = asked + len(first), found + len(differing)
        shown = _fitting(task, differing[:MAX_PER_TASK], budget)
        items += shown
        tasks.append({"name": task, "title": title_of(task), "found": len(differing), "shown": len(shown)})
    variants = [
        {
            "title": visible(variant.title),
            "base": variant.kind == "base",
            "runs": [f"seed {run.seed}" for run in variant.runs],
        }
        for variant in results.variants
    ]
    head = script_safe({"variants": variants, "tasks": tasks})
    data = f'{head[:-1]},"items":[{",".join(items)}]}}'
    return Disagreements(asked=asked, found=found, shown=len(items), json=data)


def _differing(
    results: Results, task: str, answers: Lines, extractions: Lines
) -> tuple[Sequence[Answer], list[list[list[Row]]]]:
    """The answers of the base, and for each item that differs the rows of every run of every variant."""
    correct = {run.name: {row.id: row for row in extractions[run.name][task]} for _, run in results.runs}
    said = {run.name: {row.id: row for row in answers[run.name][task]} for _, run in results.runs}
    asked = answers[results.base.runs[0].name][task]
    found = []
    for first in asked:
        try:
            rows = [
                [(correct[run.name][first.id], said[run.name][first.id]) for run in variant.runs]
                for variant in results.variants
            ]
        except KeyError as error:
            raise DataError(f"{task}: item {first.id!r} is not answered by every run; evaluate again") from error
        if len({row.correct for runs in rows for row, _ in runs}) > 1:
            found.append(rows)
    return asked, found


def _fitting(task: str, differing: Sequence[list[list[Row]]], budget: int) -> list[str]:
    """As many items as fit into `budget` bytes, with answers as long as possible."""
    items: list[str] = []
    for length in RESPONSE_LENGTHS:
        items = [script_safe(_item(task, rows, length)) for rows in differing]
        sizes = [len(item.encode("utf-8")) for item in items]
        if sum(sizes) <= budget:
            return items
    kept = []
    for item, size in zip(items, sizes, strict=True):
        if size > budget:
            break
        budget -= size
        kept.append(item)
    return kept


def _item(task: str, rows: Sequence[Sequence[Row]], length: int) -> dict[str, Any]:
    """`texts` holds each distinct answer once; `answers` is by variant and run: [text, right, extracted, how]."""
    first = rows[0][0][1]
    texts: dict[str, int] = {}
    answers = [
        [
            [
                texts.setdefault(visible(_cut(answer.response, length)), len(texts)),
                int(bool(row.correct)),
                None if row.extracted is None else visible(_cut(row.extracted, 80)),
                visible(row.how),
            ]
            for row, answer in runs
        ]
        for runs in rows
    ]
    return {
        "task": task,
        "id": visible(first.id),
        "prompt": visible(_cut(first.prompt, PROMPT_LENGTH)),
        "gold": visible(_cut(first.gold or "", 200)),
        "texts": list(texts),
        "answers": answers,
    }


def visible(text: str) -> str:
    """Replaces characters that hide or reorder text: NUL by ␀, ESC by ␛, others such as U+202E by ⟨U+202E⟩."""
    return CONTROL.sub(_symbol, text.replace("\r\n", "\n"))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def script_safe(value: Any) -> str:
    """JSON that is safe inside HTML: `<`, `>` and `&` are escaped, so that no text can end the `<script>` element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cut(text: str, length: int) -> str:
    """The first two thirds and the last third of a text that is too long; the end often holds the answer."""
    if len(text) <= length:
        return text
    head = 2 * length // 3
    return f"{text[:head]}\n[… {len(text) - length:,} characters …]\n{text[head - length :]}"
