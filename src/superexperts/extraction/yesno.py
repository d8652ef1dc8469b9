"""Rules for answers of yes or no, in English and Vietnamese."""

from __future__ import annotations

import re

from .statements import CONCLUSION, CUE, LEAD, NONE, REFUSAL, Reading, first_part, statements

_YES_NO = re.compile(
    r"(yes|true|correct|có|đúng|no|false|incorrect|không|sai)\b(?!\s(?:one|doubt|longer|evidence|phải là không))",
    re.IGNORECASE,
)
_IT_IS = re.compile(
    r"\b(?:the\ (?:statement|claim)|it|this|that|điều\ này|nhận\ định\ này)\s(?:is|was|là)\s"
    r"(true|false|(?:not\ |in)?correct|not\ true|đúng|sai)\b",
    re.IGNORECASE | re.VERBOSE,
)
_YES = frozenset(("yes", "true", "correct", "có", "đúng"))


def _yes_no(word: str) -> str:
    return "yes" if word.casefold() in _YES else "no"


def yes_no_in(reading: Reading, tail: str) -> str | None:
    part = first_part(tail)
    lead = LEAD.match(part)
    assert lead is not None
    if re.match(r"(?:not|n't) (?:true|correct|the case|right)\b", part[lead.end() :], re.IGNORECASE):
        return "no"
    found = _YES_NO.match(part, lead.end())
    if found:
        other = re.match(
            r"[\"'”*]{0,3}\s?(?:/|or|and|hoặc)\s?(yes|no|true|false|có|không)\b", part[found.end() :], re.IGNORECASE
        )
        return NONE if other else _yes_no(found[1])
    if REFUSAL.match(part, lead.end()) or re.match(r"maybe\b|possibly\b", part[lead.end() :], re.IGNORECASE):
        return NONE
    return None


def statement(reading: Reading) -> str | None:
    for tail in statements(reading):
        value = yes_no_in(reading, tail)
        if value is not None:
            return value
    for said in reversed(list(_IT_IS.finditer(reading.text[-CONCLUSION:]))):
        return "yes" if said[1].casefold() in ("true", "correct", "đúng") else "no"
    return None


def first_word(reading: Reading) -> str | None:
    return yes_no_in(reading, reading.text)


def conclusion(reading: Reading) -> str | None:
    """ "So, no, she was not": after a word of conclusion, or at the beginning of a sentence, the last one."""
    for sentence in reversed(reading.conclusion):
        for cue in reversed(list(CUE.finditer(sentence))):
            found = _YES_NO.match(sentence, cue.end())
            if found:
                return _yes_no(found[1])
        found = re.compile(
            r"[\"'“*]{0,3}(yes|no|true|false|có|không|đúng|sai)\b(?=[\"'”*]{0,3}[,.;:!]|\s?$)", re.IGNORECASE
        ).match(sentence)
        if found:
            return _yes_no(found[1])
    return None
