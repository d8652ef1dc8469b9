"""The items that some variants have right and others wrong, with the raw answers, as data for the report's browser."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .artifacts import Answer, Extraction
from .errors import DataError
from .results import Results, task_title

__all__ = ["Disagreements", "disagreements", "script_safe", "visible"]

MAX_PER_TASK = 60
MAX_BYTES = 2 * 2**20  # the report stays under 5 MB with its pictures
PROMPT_LENGTH, RESPONSE_LENGTH = 1200, 1000

Lines = Mapping[str, Mapping[str, Sequence[Any]]]

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb]"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disagreements:
    """What the browser shows, and how much of it there was."""

    asked: int
    found: int
    shown: int
    json: str
    """Safe inside a `<script type="application/json">`."""


def disagreements(results: Results, answers: Lines, extractions: Lines) -> Disagreements:
    """Items whose correctness differs between variants, the first ones of each benchmark, cut and made visible.

    `answers` and `extractions` are by variant and benchmark; `DataError` where an item lacks either.
    """
    items: list[dict[str, Any]] = []
    tasks = []
    asked = found = 0
    budget = MAX_BYTES // max(1, len(results.columns))
    for task in results.columns:
        correct = {
            variant.name: {row.id: row for row in extractions[variant.name][task]} for variant in results.variants
        }
        said = {variant.name: {row.id: row for row in answers[variant.name][task]} for variant in results.variants}
        shown = size = 0
        for first in answers[results.base.name][task]:
            asked += 1
            try:
                rows = [(correct[v.name][first.id], said[v.name][first.id]) for v in results.variants]
            except KeyError as error:
                raise DataError(
                    f"{task}: item {first.id!r} is not answered by every variant; evaluate again"
                ) from error
            if len({row.correct for row, _ in rows}) == 1:
                continue
            found += 1
            item = _item(task, first, rows)
            size += len(json.dumps(item, ensure_ascii=False).encode("utf-8", errors="replace"))
            if shown < MAX_PER_TASK and size <= budget:
                items.append(item)
                shown += 1
        tasks.append({"name": task, "title": task_title(task), "shown": shown})
    variants = [{"title": visible(variant.title), "base": variant.kind == "base"} for variant in results.variants]
    data = {"variants": variants, "tasks": tasks, "items": items}
    return Disagreements(asked=asked, found=found, shown=len(items), json=script_safe(data))


def _item(task: str, first: Answer, rows: Sequence[tuple[Extraction, Answer]]) -> dict[str, Any]:
    return {
        "task": task,
        "id": visible(first.id),
        "prompt": visible(_cut(first.prompt, PROMPT_LENGTH)),
        "gold": visible(_cut(first.gold or "", 200)),
        "answers": [
            {
                "correct": row.correct,
                "extracted": None if row.extracted is None else visible(_cut(row.extracted, 80)),
                "how": visible(row.how),
                "response": visible(_cut(answer.response, RESPONSE_LENGTH)),
            }
            for row, answer in rows
        ],
    }


def visible(text: str) -> str:
    """Shows what would hide or reorder text: NUL as ␀, ESC as ␛, others such as U+202E by their number in ⟨⟩."""
    return CONTROL.sub(_symbol, text.replace("\r\n", "\n"))


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def script_safe(value: Any) -> str:
    """JSON that no HTML parser takes for markup: `<`, `>` and `&` as their escapes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cut(text: str, length: int) -> str:
    """The first two thirds and the last third of a text that is too long: an answer's end holds the answer."""
    if len(text) <= length:
        return text
    head = 2 * length // 3
    return f"{text[:head]}\n[… {len(text) - length:,} characters …]\n{text[head - length :]}"
