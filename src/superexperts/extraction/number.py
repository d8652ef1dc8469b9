"""Rules for answers that are a number."""

from __future__ import annotations

import re

from superexperts.extraction.endings import breaks_off_in, open_markup
from superexperts.extraction.expression import expression_value
from superexperts.extraction.numbers import find_numbers
from superexperts.extraction.statements import (
    CONCLUSION,
    INSTEAD,
    NONE,
    NOT,
    REFUSAL,
    Reading,
    first_part,
    is_said_again,
    lead_end,
    statements,
)
from superexperts.extraction.text import normalise

# "21 books out of 30", "12 miles in 4 days": the first number is the answer.
_OF = re.compile(r"[^\d,;&]{0,60}\b(?:out of|of|per|in|every|for|from|after|over|each|than|at|on|within|by|during)\b")
_ARITHMETIC = re.compile(r"\d\s?[*×x·/÷+−-]\s?\$?\(?\d")
_UNDONE = re.compile(r"\s?(?:[*×x·÷+−-]|\\times)\s?[$(]{0,2}")
"""Between two numbers of a calculation without a result: "3 * 4"."""
_TOTAL = re.compile(r"\b(?:total|altogether|in\ all|final|sum|tổng)\b", re.IGNORECASE | re.VERBOSE)
_COPULA = re.compile(rf"{_TOTAL.pattern}|\b(?:is|are|was|were|be|equals?|là|còn)\b", re.IGNORECASE | re.VERBOSE)


_SUMS_UP = re.compile(
    r"[,;:]\s(?:so|therefore|thus|hence|i\.e\.|that\sis|for\sa\stotal|which\s(?:is|makes|gives|equals|totals|comes)|nên|vậy|tức\slà)\b",
    re.IGNORECASE,
)
"""What follows says the same as a result: "2 hours and 30 minutes, so 150 minutes"."""
_UNSOLVED = re.compile(r"(?:\d|[-+*/]\s?)[xyzn]\b|\b[xyzn]\s?[-+*/]\s?[\dxyzn]")
"""Before "=": an equation that is still to be solved, "2x + 3 = 15"."""
_JOINED = re.compile(r"\band\b|&|;")
_SO = re.compile(r"\b(?:so|therefore|thus|hence)\b", re.IGNORECASE)
_COMES_TO = re.compile(r"[^,;.]{0,40}(?<!that)(?<!which)\s(?:is|are|equals?|makes?|gives?)\s[^,;.]{0,20}")
"""Between the last two numbers: 3 miles a day for 4 days is 12 miles."""


def _result(sentence: str) -> str | None:
    """The result of a calculation: the number after the last "=" of "12 + 3 = 15".

    `NONE` if "and" joins two calculations of which the second does not use the first: "2 + 2 = 4 and 3 + 3 = 6".
    """
    parts = sentence[-CONCLUSION:].split("=")
    if _UNSOLVED.search(parts[-2]):
        return None
    last = list(find_numbers(parts[-1]))
    if len(last) > 1 and _UNDONE.fullmatch(parts[-1], last[0][1], last[1][0]):
        return None
    joined = _JOINED.search(parts[-2])
    if last and not joined:  # most
        return last[0][2]
    sides = [list(find_numbers(side)) for side in parts[:-1]] + [last]
    results = [side[0][2] for side in sides[1:] if side]
    if len(results) > 1 and joined:
        builds_on = (len(sides[-2]) > 1 and sides[-2][1][2] == results[-2]) or _SO.search(parts[-2])
        if not builds_on and results[-1] != results[-2]:
            return NONE
    return results[-1] if results else None


def number_in(reading: Reading, sentence: str) -> str | None:
    """The one number that a sentence states, as in "She has 34 apples left"; `NONE` if it states several.

    Numbers of the question are ignored if there are others.
    """
    if "=" in sentence:
        return _result(sentence)
    # Brackets after a word explain it: "34 apples (12 red and 22 green)".
    bare = re.sub(r"(?<=\w)\s?\([^()]{0,200}\)", " ", sentence) if "(" in sentence else sentence
    numbers = list(find_numbers(bare))
    if not numbers:
        return None
    if len({value for *_, value in numbers}) > 1:
        numbers = [number for number in numbers if number[2] not in reading.asked] or numbers
    if len({value for *_, value in numbers}) == 1:
        return None if len(numbers) > 1 and _ARITHMETIC.search(bare) else numbers[0][2]
    sums_up = list(_SUMS_UP.finditer(bare))
    if sums_up and len(found := {number[2] for number in numbers if number[0] >= sums_up[-1].end()}) == 1:
        return found.pop()
    if re.search(r"\bbetween\b|\beither\b", bare):
        return NONE
    if _ARITHMETIC.search(bare):
        return None
    _, end, value = numbers[0]
    share = "/" in value or bare[end : end + 1] == "%"  # 1/4 of 48 is 12
    if not share and _OF.match(bare, end, numbers[1][0]):  # 21 books out of 30
        return numbers[-1][2] if _COMES_TO.fullmatch(bare, numbers[-2][1], numbers[-1][0]) else value
    joined = re.search(r"\band\b|&|,", bare[numbers[-2][1] : numbers[-1][0]])
    for cue in reversed(list((_COPULA if joined is None else _TOTAL).finditer(bare))):
        following = [number for number in numbers if number[0] >= cue.end()]
        if following:
            return following[0][2]
    return NONE


def statement(reading: Reading) -> str | None:
    """ "The answer is 34 apples"; of "not 30 but 34" it is 34."""
    for tail in statements(reading):
        part = first_part(tail)
        lead = lead_end(part)
        if REFUSAL.match(part, lead) and not re.search(r"\d", part):
            return NONE
        if NOT.match(part, lead):
            other = INSTEAD.search(part, lead)
            if other is None:
                continue
            part = part[other.end() :]
        value = stated(reading, part)
        if value is not None:
            return value
    return None


_BEFORE = re.compile(r"(?:[\s:*≈~]|(?:approximately|about|equal to)\s)+")


def stated(reading: Reading, part: str) -> str | None:
    """The value of the expression after "the answer is" (`\\frac{1}{2}`, `12 + 3`), else the one number there."""
    before = _BEFORE.match(part)
    value = expression_value(part[before.end() :] if before else part)
    return number_in(reading, part) if value is None else value


_CONCLUDES = re.compile(
    r"^\W{0,6}(?:(?:so|therefore|thus|hence|in total|total|altogether|finally|overall|then|vậy|do đó|as a result)\b"
    r"|所以|因此|总共|一共|综上|故)",
    re.IGNORECASE,
)


_NOT_RUN = re.compile(r"(?:return|print)\b")
"""Code that was not run: `print(3 * 4)`."""
_SMALL_WORDS = r"(?:and|or|of|in|to|for|from|with|by|at|on|the|an?|plus|minus|per|is|are|but|about)"
_LAST_WORDS = re.compile(r"(?:[%)]|\.0{1,3})?(?:/\w{1,12})?(?:\s[\w'’-]{1,20}){0,4}")
_LEADS_ON = re.compile(
    rf"(?:\b(?:{_SMALL_WORDS}(?<!is)(?<!are)|times|first|add|subtract)\s|[-+*/×÷·(]\s?)$", re.IGNORECASE
)
_SUM = re.compile(r"\d[^=]{0,200}=\s?(?:\$?<<[^<>]{1,200}>>)?$")
"""Before the result of a calculation, also in the form of GSM8K: `48/2 = <<48/2=24>>`."""


def _is_result(reading: Reading, sentence: str) -> bool:
    """Whether a last sentence without a stop is complete all the same: a conclusion, or a calculation on a line of its
    own, that ends with a number and a few words, as "So she has 36 - 9 = 27 apples". A step of a list is neither."""
    line = reading.text.rstrip().rpartition("\n")[2].lstrip()
    cue = _CONCLUDES.match(sentence)
    if (
        _ITEM.match(line)
        or open_markup(reading.text[-CONCLUSION:], line)
        or not (cue or ("=" in sentence and line == sentence))
    ):
        return False
    sentence = sentence[-CONCLUSION:]
    numbers = list(find_numbers(sentence))
    if not numbers:
        return False
    before, after = sentence[: numbers[-1][0]], sentence[numbers[-1][1] :]
    if _LAST_WORDS.fullmatch(after) is None or breaks_off_in(after, reading.question, reading.text):
        return False
    if cue:
        return before[cue.end() :].strip(" ,:") != "" and _LEADS_ON.search(before[-20:]) is None
    return _SUM.search(before) is not None


_ITEM = re.compile(r"^\W{0,8}\d{1,2}[.)]\s+(?=\D)")
"""The number of a step or an item: "3. She has 34 apples"."""


def _is_asked(reading: Reading, words: str) -> bool:
    """Whether the question contains the normalised words. The longest is looked for first, since questions are long."""
    if reading.question.isascii() and max(words.split(), key=len) not in reading.question.lower().replace("y", "i"):
        return False
    return words in normalise(reading.question)


def conclusion(reading: Reading) -> str | None:
    """The number of the last sentence: "She has 34 apples." Questions and incomplete sentences do not count."""
    found = reading.ending
    if not found:
        return None
    for place, sentence in enumerate(reversed(found[-3:])):
        words = normalise(sentence)
        if sentence.endswith("?") or (len(words) > 12 and _is_asked(reading, words)):
            return None
        if reading.cut and not (is_said_again(reading, sentence) if place else _is_result(reading, sentence)):
            continue
        value = number_in(reading, _ITEM.sub("", sentence, count=1))
        if value is not None:
            return value
        if _NOT_RUN.match(sentence):
            return None
    return None
