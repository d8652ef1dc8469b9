"""Answers that go through the options, one by one."""

from __future__ import annotations

import re

from superexperts.extraction.statements import CONCLUSION, Reading
from superexperts.extraction.text import normalise

__all__ = ["INLINE_LABEL", "LINE_LABEL", "lists_options", "option_line"]

LINE_LABEL = re.compile(r"[\s*\-•(\[|]{0,8}(?:option\s)?([A-H])(?:\s?[.):\]|]|\s[-–]\s)", re.IGNORECASE)


_NEXT_LINE = re.compile(rf"\n{LINE_LABEL.pattern}", re.IGNORECASE)


INLINE_LABEL = re.compile(r"(?:^|[\s(\[])([A-H])[.)\]]\s")
_ABC = ["A", "B", "C"]


def lists_options(reading: Reading) -> bool:
    """Whether the answer lists the options: one per line, or all in the first line ("A. oil B. sand C. iron")."""
    known = vars(reading)
    if "listing" not in known:
        known["listing"] = _lists(reading)
    found: bool = known["listing"]
    return found


def _lists(reading: Reading) -> bool:
    if reading.text[:3].lstrip("([")[:1] == "A":
        line = reading.text[:1000].partition("\n")[0]
        if INLINE_LABEL.findall(line)[:3] == _ABC:
            return True
    if reading.text.count("\n") < 2:
        return False
    text = reading.text[:CONCLUSION]
    first = LINE_LABEL.match(text)
    labels = [*([first[1]] if first else []), *_NEXT_LINE.findall(text)]
    return len(labels) > 2 and len(set(map(str.upper, labels))) > 2


_OPTION_LINE = re.compile(r"\n[\s*_>-]{0,6}\(?([A-Z])[.):\]]{1,2}[*_]{0,3}\s([^\n]{1,300})(?=\n|$)")


def option_line(reading: Reading) -> str | None:
    """The only line that is an option, label and text, and nothing else."""
    if reading.text.count("\n") < 1:
        return None
    lines = _OPTION_LINE.findall(f"\n{reading.text}")
    if not lines:
        return None
    options = dict(reading.options)
    named = {label for label, text in lines if normalise(text) == options.get(label)}
    return named.pop() if len(named) == 1 and not lists_options(reading) else None
