"""Rules for answers of yes or no (true or false), in English and Vietnamese."""

from __future__ import annotations

import re

from superexperts.extraction.statements import (
    CONCLUSION,
    CUE,
    INSTEAD,
    NONE,
    NOT,
    REFUSAL,
    Reading,
    first_part,
    lead_end,
    statements,
)

# "Có" is yes but "có thể" is maybe; "không" is no but "không biết" is "I do not know".
_WORDS = (
    r"yes|true|có(?!\s(?:thể|lẽ))|đúng|no|false|không(?!\s(?:rõ|biết|chắc|đủ|thể\s(?:xác|biết|kết|trả)))|sai"
    r"|是的|对的|正确|不是|不对|不正确|错误|否|对|ja|nein|oui|non|sí"
)
_YES_NO = re.compile(
    rf"({_WORDS}|correct|incorrect|yeah|yep|nope|nah)\b"
    r"(?!\s(?:one|doubt|longer|evidence|information|mention|details?|data|indication|phải là không))",
    re.IGNORECASE,
)
# "According to the passage, yes": the word of the answer follows the source.
_ACCORDING = re.compile(r"(?:according to|based on|as per|theo)\b[^,.]{1,80},\s", re.IGNORECASE)
_SAID = re.compile(rf"[\"'“*]{{0,3}}({_WORDS})\b(?=[\"'”*]{{0,3}}[,.;:!]|\s?$)", re.IGNORECASE)
# "So the statement is false", "phát biểu này là đúng".
_IT_IS = re.compile(
    r"\b(?:the\ (?:statement|claim)|it|this|that|(?:điều|câu|phát\ biểu|mệnh\ đề|nhận\ định)\ (?:này|trên))"
    r"\s(?:is|was|là)\s(true|false|(?:not\ |in)?correct|not\ true|đúng|sai)\b",
    re.IGNORECASE | re.VERBOSE,
)
_NOT_SO = re.compile(r"(?:not|n't) (?:true|correct|the case|right)\b", re.IGNORECASE)
_NOT_ALONE = re.compile(r"not\s?(?:[.,;!]|$)", re.IGNORECASE)
_OF_COURSE = re.compile(
    r"[\s*\"']{0,4}(?:absolutely|definitely|certainly|of course|indeed|chắc chắn)\s?[*\"']{0,3}(?:[.,!]|$)",
    re.IGNORECASE,
)
_UNDER_CONDITION = re.compile(r"\s(?:if|unless|provided|only\s(?:if|when)|nếu)\b", re.IGNORECASE)
_MAYBE = re.compile(r"maybe\b|possibly\b", re.IGNORECASE)
_YES = frozenset(
    ("yes", "yeah", "yep", "true", "correct", "có", "đúng", "是的", "对的", "正确", "对", "ja", "oui", "sí")
)


def _yes_no(word: str) -> str:
    return "yes" if word.casefold() in _YES else "no"


def yes_no_in(reading: Reading, tail: str) -> str | None:
    """Yes or no at the beginning of a text: "probably not.", "absolutely!", "not true". `NONE` for "yes or no"."""
    part = first_part(tail)
    lead = lead_end(part)
    if _NOT_SO.match(part, lead) or (lead and _NOT_ALONE.match(part, lead)):  # probably not
        return "no"
    if _OF_COURSE.match(part):
        return "yes"
    if NOT.match(part, lead) and (other := INSTEAD.search(part, lead)):
        rather = yes_no_in(reading, part[other.end() :])
        if rather is not None:
            return rather
    found = _YES_NO.match(part, lead)
    if found:
        other = re.match(
            r"[\"'”*]{0,3}\s?(?:/|or|and|hoặc)\s?(yes|no|true|false|có|không)\b", part[found.end() :], re.IGNORECASE
        )
        return NONE if other or _UNDER_CONDITION.match(part, found.end()) else _yes_no(found[1])
    if REFUSAL.match(part, lead) or _MAYBE.match(part, lead):
        return NONE
    return None


def statement(reading: Reading) -> str | None:
    """ "So the answer is no"; else the last "the statement is false"."""
    for tail in statements(reading):
        value = yes_no_in(reading, tail)
        if value is not None:
            return value
    for said in reversed(list(_IT_IS.finditer(reading.text[-CONCLUSION:]))):
        return "yes" if said[1].casefold() in ("true", "correct", "đúng") else "no"
    return None


def first_word(reading: Reading) -> str | None:
    """ "Yes, because ..." at the very beginning."""
    return yes_no_in(reading, reading.text)


def conclusion(reading: Reading) -> str | None:
    """ "So, no, she was not": after a word of conclusion, or at the beginning of a sentence, the last one."""
    for sentence in reversed(reading.conclusion):
        for cue in reversed(list(CUE.finditer(sentence))):
            found = _YES_NO.match(sentence, cue.end())
            if found:
                return _yes_no(found[1])
        source = _ACCORDING.match(sentence)
        found = _SAID.match(sentence, source.end() if source else 0)
        if found:
            return _yes_no(found[1])
    return None
