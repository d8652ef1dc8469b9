"""The numbers in a text, and the exact value of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from superexperts.extraction.cued import Cued

__all__ = ["Quantity", "find_numbers", "number_value"]

Quantity = tuple[int, int, str]
"""(start, end, value) of a number in a text; the value is as `number_value` reads it."""

_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_UNITS)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORD = "|".join([*_WORDS, *_SCALES])

# With commas, LaTeX's too; with two points or more, which can only part thousands; without either.
_DIGITS = (
    r"\d{1,3}(?=[,.{\\])(?:(?:(?:,|\{,\}|\\,|,\\![ ]?)\d{3}){1,9}(?!\d)(?:\.\d{1,30})?|(?:\.\d{3}){2,9}(?![\d.]\d))"
    r"|\d{1,30}(?!\d)(?:\.\d{1,30})?|\.\d{1,30}"
)
_NUMBER = Cued(
    rf"""
    (?P<sign>(?<![\w)])[-−–]|\bnegative\s(?=[\d$€£₫\\])
      |(?:(?<=\bis\s)|(?<=\bbe\s)|(?<=[:=]\s))minus\s(?=[\d$€£₫\\]))?(?:\\?[$€£₫]\s?|us\$)?(?P<sign2>(?<=[$€£₫])[-−])?
    (?:
      \\[dt]?frac\{{(?P<top>\d{{1,30}})\}}\{{(?P<bottom>\d{{1,30}})\}}
      | (?<![\w.^])(?P<digits>{_DIGITS})
        (?:(?=\s?[\d/\\x×*e])(?:  # most numbers end here
          \s(?P<part>\d{{1,3}})/(?P<parts>\d{{1,3}})(?![\d/])                            # 2 1/2
          | \s?\\[dt]?frac\{{(?P<part2>\d{{1,3}})\}}\{{(?P<parts2>\d{{1,3}})\}}
          | \s?/\s?(?P<over>\d{{1,30}})(?![\d/])
          | \s?(?:[x×*]|\\times|\\cdot)\s?10\s?\^\s?\{{?(?P<power>[-−]?\d{{1,2}})\}}?(?!\d)  # 3 x 10^4
          | e(?P<power2>[-+]?\d{{1,2}})(?!\w)
        ))?
        (?:\s(?P<scale>hundred|thousand|million|billion)\b)?
    )
    | (?<![\w-])(?P<sign3>negative\s)?(?P<words>(?:{_WORD})(?:(?:\s|-|\sand\s)(?:{_WORD})){{0,12}})(?![\w-])
    """,
    words=("minus", "zero", "four", "three", "fif", "six", "eight", "ten", "thirt", "hundred", "thousand"),
    where={
        "ve": ("negative", "five", "seven", "eleven", "twelve"),
        "ne": ("one", "nine"),
        "tw": ("two", "twent"),
        "for": ("fort",),
        "ion": ("million", "billion"),
        "$": ("us$",),
    },
    # A sign, a currency, a decimal point, or a whole run of digits: nothing begins in the middle of one. Most numbers
    # are no more than such a run, or one after a dollar. That it begins with a set of characters makes it fast.
    marks=r"""[−–\\$€£₫\-.\d](?:
      (?:(?<=\$)(?=\d)|(?<=\d)(?<![\w.^]\d))\d{0,29}
        (?![\d{\\e]|[.,]\d|,\\|\s?[\d/\\x×*]|\s(?:hundred|thousand|million|billion))(?P<whole>)
      | (?<=\d)\d* | (?<=\.)(?=\d) | (?<=-)(?=[\d.$€£₫\\u]) | (?<=[−–\\$€£₫])
    )""",
)


def find_numbers(text: str) -> Iterator[Quantity]:
    """Every number of a text in order: digits with commas, signs, decimals, fractions, and English number words."""
    for found in _NUMBER.matches(text):
        if found.lastgroup == "whole":  # most numbers
            yield found.start(), found.end(), found[0].lstrip("$0") or "0"
            continue
        if found.lastgroup == "digits":  # most are no more than that, and the rest takes longer
            value = found["digits"]
            if value.isdigit():
                value = value.lstrip("0") or "0"
            else:
                value = _UNMARKED.sub("", value)
                value = _canonical(value.replace(".", "") if value.count(".") > 1 else value)
            if value != "0" and (found["sign"] or found["sign2"]):
                value = f"-{value}"
            yield found.start(), found.end(), value
            continue
        if found["words"]:
            if found["words"] in ("one", "One") and _THAT_ONE.search(text[max(0, found.start() - 12) : found.start()]):
                continue
            value = str(_from_words(found["words"].lower()))
        elif found["top"]:
            value = f"{found['top']}/{found['bottom']}"
        else:
            value = _UNMARKED.sub("", found["digits"])
            value = value.replace(".", "") if value.count(".") > 1 else value
            part, parts = found["part"] or found["part2"], found["parts"] or found["parts2"]
            power = found["power"] or found["power2"]
            if part and int(parts):
                value = str(Fraction(value) + Fraction(int(part), int(parts)))
            elif power:
                value = _plain_decimal(Fraction(value) * Fraction(10) ** int(power.replace("−", "-")))
            if found["over"]:
                if not int(found["over"]):
                    continue
                value += f"/{found['over']}"
            if found["scale"]:
                value = _plain_decimal(Fraction(value) * _SCALES[found["scale"].lower()])
        if "/" in value and int(value.rpartition("/")[2]) == 0:
            continue
        if found["sign"] or found["sign2"] or found["sign3"]:
            value = f"-{value}"
        yield found.start(), found.end(), _canonical(value)


_THAT_ONE = re.compile(
    r"\b(?:the|this|that|next|last|first|each|every|which|any|no|other|another|correct|right)\s\Z", re.I
)
"""Before "one" that is not a number: "the next one"."""
_UNMARKED = re.compile(r"[,{}\\! ]")


def _from_words(words: str) -> int:
    total = part = 0
    for word in re.split(r"[\s-]+", words):
        if word in _WORDS:
            part += _WORDS[word]
        elif word == "hundred":
            part = max(part, 1) * 100
        elif word in _SCALES:
            total, part = total + max(part, 1) * _SCALES[word], 0
    return total + part


def _canonical(value: str) -> str:
    """`2,125.50` -> `2125.5`; a fraction stays one."""
    if "." in value and "/" not in value:
        value = value.rstrip("0").rstrip(".")
    sign, digits = ("-", value[1:]) if value.startswith("-") else ("", value)
    digits = digits.lstrip("0")
    digits = f"0{digits}" if not digits or not digits[0].isdigit() else digits
    return digits if digits == "0" else sign + digits


def _plain_decimal(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else format(Decimal(value.numerator) / value.denominator, "f")


def number_value(text: str) -> Fraction | int | None:
    """The exact value of a plain number or fraction (`-3`, `2.50`, `1/3`, `2,125`), None for anything else."""
    if len(text) <= 400 and text.isascii() and text.isdigit():
        return int(text)  # most are, and the rest takes twenty times as long
    if not re.fullmatch(r"\s*[-+]?[\d,]{0,400}(?:\.\d{0,400})?(?:/\d{1,400})?\s*", text) or not re.search(r"\d", text):
        return None
    top, _, bottom = text.replace(",", "").strip().partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / int(bottom or 1) if re.search(r"\d", top) else None
