"""Answers in a structure: JSON, a tool call, tags, or a list of the options with a verdict on each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from superexperts.extraction.statements import NONE, Reading
from superexperts.extraction.text import normalise

__all__ = ["is_answer_key", "json_values", "marked_option", "tagged"]

# ---- JSON and tool calls --------------------------------------------------------------------------------------------

_KEY = re.compile(
    r"(?:final|correct|right|selected|chosen|best|predicted|my|the)?[_\s-]?"
    r"(?:answer|option|choice|prediction|selection|solution|verdict|conclusion)"
    r"(?:[_\s-]?(?:choice|letter|idx|index|option|key|label|id|value|text|number|final))?",
    re.IGNORECASE,
)
_LABEL_KEYS = ("label", "letter", "option", "key", "id", "value", "answer", "choice", "text")
_SUBMITS = re.compile(r"answer|submit|final|choose|select|respond", re.IGNORECASE)
_ARGUMENTS = ("arguments", "parameters", "args", "input")
# For text that is not valid JSON: cut off, in Python's syntax, or with line ends inside strings.
_LOOSE = re.compile(
    rf"[\"'](?P<key>{_KEY.pattern})[\"']\s?:\s?(?:\"(?P<a>[^\"\n]{{0,400}})\"|'(?P<b>[^'\n]{{0,400}})'|(?P<c>[\w.+-]{{1,40}}))(?=\s*[,}}\]\n])",
    re.IGNORECASE,
)
_CALL = re.compile(
    r"\b(?:final_answer|submit_answer|submit)\(\s?(?:\w{1,20}\s?=\s?)?[\"']?([^\"'()\n]{1,200})[\"']?\s?\)"
)
_LONGEST = 20_000
_TRIES = 8
_DECODER = json.JSONDecoder()


def is_answer_key(key: str) -> bool:
    """Whether a key of JSON holds the answer: `final_answer`, `answer_idx`, `selectedOption`."""
    return _KEY.fullmatch(key) is not None


def json_values(text: str) -> Iterator[Any] | None:
    """The values that the JSON in a text gives as the answer, the last one first. None if it holds no JSON.

    JSON without a key for the answer, such as a call of a calculator, gives none.
    """
    if "{" not in text and "submit" not in text and "final_answer(" not in text:
        return None
    found = list(_objects(text)) if "{" in text else []
    values: list[Any] = [value for one in found for value in _values(one)]
    if not values:
        values = [_constant(loose["a"] or loose["b"] or loose["c"] or "null") for loose in _LOOSE.finditer(text)]
    if not values and ("submit" in text or "final_answer(" in text):
        values = [call[1] for call in _CALL.finditer(text)]
    if values:
        return iter(values[::-1])
    whole = text.strip().removeprefix("```json").removeprefix("```").lstrip()
    is_json = bool(found) and _is_whole(whole)
    return iter(()) if is_json or _cut_json(whole) or "<tool_call>" in text else None


def _constant(text: str) -> Any:
    return {"true": True, "false": False, "null": None, "none": None}.get(text.lower(), text)


def _is_whole(text: str) -> bool:
    return text.startswith(("{", "[{")) and text.rstrip("`\n ").endswith(("}", "}]"))


def _cut_json(text: str) -> bool:
    return re.match(r"\{\s*\"\w{1,40}\"\s*:", text) is not None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text that are in no other, from the first to the last."""
    at, tries = text.find("{", max(0, len(text) - _LONGEST)), 0
    while at >= 0 and tries < _TRIES:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            tries += 1
            end = at + 1
        else:
            if isinstance(value, dict) and value:
                yield value
        at = text.find("{", end)


def _values(value: dict[str, Any], depth: int = 0) -> Iterator[Any]:
    for key in _ARGUMENTS:
        inner = value.get(key)
        if isinstance(inner, str) and inner.lstrip().startswith("{"):
            inner = next(_objects(inner), None)
        if isinstance(inner, dict) and "name" in value:
            if len(inner) == 1 and _SUBMITS.search(str(value["name"])):
                yield from map(_leaf, inner.values())
            elif depth < 3:
                yield from _values(inner, depth + 1)
            return
    for key, inner in value.items():
        if is_answer_key(key):
            yield _leaf(inner)
        elif isinstance(inner, dict) and depth < 3:
            yield from _values(inner, depth + 1)


def _leaf(value: Any) -> Any:
    """A single value: of a list of one, that one; of {"label": "C", "text": "iron"}, the label."""
    if isinstance(value, list):
        return _leaf(value[0]) if len(value) == 1 else tuple(value)
    if isinstance(value, dict):
        named = next((value[key] for key in _LABEL_KEYS if key in value), None)
        return named if not isinstance(named, dict | list) else None
    return value


# ---- tags -----------------------------------------------------------------------------------------------------------

_TAG = re.compile(
    r"[<\[](?:(?<=<)(/?)(?:(?:final|correct|my|the|selected)[_\s-]?)?(?:answer|choice|option|solution)"
    r"(?:[_\s-]?(?:choice|letter|option|final))?\s?>|(?<=\[)(?-i:(/?)(?:FINAL[_ ])?ANSWER\]))",
    re.IGNORECASE,
)


def tagged(text: str) -> list[str]:
    """What stands in the tags for an answer, `<answer> B </answer>`, the last one first; an end may be missing."""
    if "<" not in text and "[" not in text:
        return []
    marks = list(_TAG.finditer(text))
    found = []
    for number, mark in enumerate(marks):
        if mark[1] or mark[2]:
            continue
        end = marks[number + 1].start() if number + 1 < len(marks) else len(text)
        inside = text[mark.end() : end]
        if inside.strip():
            found.append(inside)
    return found[::-1]


# ---- options with verdicts ------------------------------------------------------------------------------------------

_SIGNS = "✅✔✓☑🟢👍❌✗✘✖🔴❎☒"
_SIGN = re.compile(f"[{_SIGNS}]")
_GOOD_SIGNS = frozenset("✅✔✓☑🟢👍")
_VERDICT = re.compile(
    r"(?:[:–—|=→-]\s?|\bis\s|\bare\s|là\s)[*_\"\s(]{0,4}(?P<word>not\scorrect|not\strue|incorrect|wrong|false|no|correct|right|true|yes"
    r"|best|không\sđúng|không|sai|đúng|có|正确|错误|不正确|对|错)\b[*_\"\s)]{0,4}(?=[.,;:!|(–—-]|$)",
    re.IGNORECASE,
)
_GOOD_WORDS = frozenset(("correct", "right", "true", "yes", "best", "đúng", "có", "正确", "对"))
_ROW_LABEL = re.compile(r"[\s|*_\-•(\[>]{0,10}(?:option\s)?([A-Z]|\d)(?:\s?[.):\]|*]|\s[-–—]\s|\s\()", re.IGNORECASE)
_ROW_BEGINS = r"\n[\s|*_\-•(\[>]{0,10}"
_LABEL_ROW = re.compile(_ROW_BEGINS + r"(?:option\s)?(?-i:[A-Z]|\d|[a-h])\s?[.):\]|*(–—-]", re.IGNORECASE)
_SIGN_ROW = re.compile(rf"{_ROW_BEGINS}[^\n]{{0,200}}[{_SIGNS}|]")
"""A line below the first that may be an option's: it begins with a label, or holds a sign or a table's bar."""
_ASKS_FOR_WRONG = re.compile(
    r"\b(?:NOT|EXCEPT|not|except|false|incorrect|wrong|least|không|sai|ngoại trừ|trừ)\b|不正确|错误|不属于|不是"
)


def marked_option(reading: Reading) -> str | None:
    """The one option with a tick, or the verdict "correct", in a list or table that rejects another.

    `NONE` for a table that goes through the options without a verdict.
    """
    text = reading.text
    if not _LABEL_ROW.search(text) and (("|" not in text and text.isascii()) or not _SIGN_ROW.search(text)):
        return None  # as most
    known = dict(reading.choices)
    good: list[str] = []
    bad: list[str] = []
    rows = 0
    for line in text.split("\n"):
        label = _row_option(reading, line, known)
        if label is None:
            continue
        rows += line.lstrip().startswith("|")
        verdict = _verdict(line)
        if verdict is not None:
            (good if verdict else bad).append(label)
    good, bad = list(dict.fromkeys(good)), list(dict.fromkeys(bad))
    if len(good) == 1 and bad and good[0] not in bad:
        return good[0]
    if len(bad) == 1 and len(good) > 1 and bad[0] not in good and _ASKS_FOR_WRONG.search(reading.question):
        return bad[0]
    only_table = rows > 1 and rows >= len(known) and text.rstrip().endswith("|")
    return NONE if only_table else None


def _row_option(reading: Reading, line: str, known: dict[str, str]) -> str | None:
    if (found := _ROW_LABEL.match(line)) and found[1].upper() in known:
        return found[1].upper()
    if not (line.lstrip().startswith("|") or (not line.isascii() and _SIGN.search(line))):
        return None
    words = normalise(line)
    same = [label for label, text in reading.options if text in words]
    return same[0] if len(same) == 1 else None


def _verdict(line: str) -> bool | None:
    """Whether a line accepts or rejects what it names; None if it says neither, or both."""
    signs = set() if line.isascii() else {sign in _GOOD_SIGNS for sign in _SIGN.findall(line)}
    if signs:
        return signs.pop() if len(signs) == 1 else None
    found = list(_VERDICT.finditer(line))
    return " ".join(found[-1]["word"].lower().split()) in _GOOD_WORDS if found else None
