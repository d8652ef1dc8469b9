"""Numbers as other countries write them, rewritten as `numbers` reads them: 12'345, 1.500 đồng, 22,8, 20 nghìn, $70k.

A point before three digits is ambiguous: 1.500 is a thousand and a half, or one and a half. It parts thousands where
the text is in a language that writes so, or a currency of such a country follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial

from superexperts.extraction.cued import strange

__all__ = ["english_numbers"]


def _signs(gaps: str, scales: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """What stands behind a figure where a number may need to be rewritten; most texts hold none.

    That the pattern begins with two sets of characters makes it fast.
    """
    return re.compile(
        rf"\d(?=[\s{gaps},.kKmMbBntlc万亿])(?=(?P<gap>[{gaps}]\d{{3}}(?!\d))|(?P<blank> \d{{3}}(?!\d))"
        r"|(?P<comma>,(?!\d{3}(?!\d))\d)|(?P<point>\.\d{3}(?!\d))|(?P<suffix>\s?[kKmMbB]n?\b)"
        rf"|(?P<scale>\s?(?:{scales})))",
        flags,
    )


_SIGNS = _signs("\u00a0\u202f\u2009'’_", "ngh|ng[àa]n|tri|t[ỷỉ]|lakh|crore|万|亿")
_ASCII_SIGNS = _signs("'_", "ngh|ngan|tri|lakh|crore", re.ASCII)
_GAPS = re.compile(r"(?<![\d.,])\d{1,3}(?:[\u00a0\u202f\u2009'’_]\d{3}){1,6}(?![\d'’_])")
_BLANKS = re.compile(r"(?<![\d.,])(?<!\d )(\d{1,3})((?: \d{3}){1,6})(?! ?\d)")
_INDIAN = re.compile(r"(?<![\d,.])\d{1,2}(?:,\d{2}){1,5},\d{3}(?![\d,])")
_POINTS_AND_COMMA = re.compile(r"(?<![\d,.])(\d{1,3}(?:\.\d{3})+),(\d{1,4})(?![\d,])")
_POINTS = re.compile(r"(?<![\d,.])(?!0\.)(\d{1,3}(?:\.\d{3})+)(?![\d,]|\.\d)")
_COMMA = re.compile(r"(?<![\d,.])(\d+),(\d{1,2}|\d{4,})(?![\d,])")
_POINT_MONEY = re.compile(
    r"(?<![\d,.])(?!0\.)(\d{1,3}(?:\.\d{3})+)(?=\s?(?:đồng|đ\b|VNĐ|VND|₫|€|euros?\b|EUR|Rp\b|rupiah|pesos?\b|reais\b))"
)
_POINT_CURRENCY = re.compile(r"đ|VN[ĐD]|₫|€|euro|EUR|Rp|rupiah|peso|reais")
_COMMA_MONEY = re.compile(r"(?<![\d,.])(\d+),(\d{1,2})(?=\s?(?:đồng|đ\b|VNĐ|VND|₫|€|euros?\b|EUR|reais\b))")
_VIETNAMESE_LETTERS = "ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ"
_VIETNAMESE = re.compile(f"[{_VIETNAMESE_LETTERS}{_VIETNAMESE_LETTERS.upper()}]")
_OTHERS = (
    frozenset(
        ("die", "der", "das", "ist", "und", "sind", "antwort", "lösung", "beträgt", "ergebnis", "insgesamt", "euro")
    ),
    frozenset(("la", "le", "les", "est", "une", "des", "réponse", "donc", "euros", "sont", "au", "total")),
    frozenset(("el", "la", "es", "los", "una", "respuesta", "resposta", "por", "tanto", "euros", "é", "o", "são")),
)
"""Frequent words of German, French, and Spanish or Portuguese."""

_SCALES = {
    "nghìn": 10**3, "ngàn": 10**3, "triệu": 10**6, "tỷ": 10**9, "tỉ": 10**9, "lakh": 10**5, "lakhs": 10**5,
    "crore": 10**7, "crores": 10**7, "万": 10**4, "亿": 10**8,
}  # fmt: skip
_SCALED = re.compile(rf"(?<![\w.,])(\d+(?:\.\d+)?)\s?({'|'.join(_SCALES)})(?!\w)", re.IGNORECASE)
_SUFFIXES = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
_MONEY_SUFFIX = re.compile(r"(?<=[$€£₹¥])(\s?\d+(?:\.\d+)?)\s?(k|m|mn|b|bn)\b", re.IGNORECASE)
_K = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)[kK]\b")
_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905 - read more easily
_DOZEN = re.compile(rf"\b(\d+(?:\.\d+)?|{'|'.join(_WORDS)}|half\sa)\sdozens?\b", re.IGNORECASE)


def english_numbers(text: str, question: str = "") -> str:
    """The text with its numbers written as in English: 12345, 22.8, 20000."""
    if "dozen" in text:
        text = _DOZEN.sub(_dozens, text)
    signs = {found.lastgroup for found in (_ASCII_SIGNS if text.isascii() else _SIGNS).finditer(text)}
    if not signs:
        return text
    text = _rewritten(text, _REWRITES, signs)
    if ("point" in signs or "comma" in signs) and _writes_commas(text, question):
        text = _POINTS.sub(lambda found: found[1].replace(".", ""), text)
        text = _COMMA.sub(r"\1.\2", text)
    if "scale" in signs:
        signs.add("suffix")  # once "nghìn" is gone, what followed it stands behind the figure
    return _rewritten(text, _SCALINGS, signs)


def _rewritten(text: str, rewrites: _Rewrites, signs: set[str | None]) -> str:
    for sign, part, rewrite in rewrites:  # a part is found faster than the whole pattern
        if sign in signs and part.search(text):
            text = rewrite(text)
    return text


def _without_blanks(found: re.Match[str]) -> str:
    """12 345 and 150 000 are one number; 100 200 300 are three."""
    if len(found[1]) == 3 and " 000" not in found[2]:
        return found[0]
    return found[0].replace(" ", "")


def _writes_commas(text: str, question: str) -> bool:
    """Whether the language of a text writes 22,8 for twenty-two and eight tenths."""
    if any(len(_VIETNAMESE.findall(strange(part))) > 1 for part in (text[-2000:], question)):
        return True
    said = {word.strip(".,:;!?*()") for word in text[-2000:].lower().split()}
    return any(len(words & said) > 2 for words in _OTHERS)


def _times(digits: str, scale: int) -> str:
    value = Decimal(digits.strip()) * scale
    return format(value.normalize(), "f")


def _dozens(found: re.Match[str]) -> str:
    word = found[1].lower()
    if word.startswith("half"):
        return "6"
    return _times(str(_WORDS.index(word) + 1) if word in _WORDS else word, 12)


_Rewrites = tuple[tuple[str, re.Pattern[str], Callable[[str], str]], ...]
"""(group of `_SIGNS`, what every match holds, what rewrites all matches)"""
_REWRITES: _Rewrites = (
    (
        "gap",
        re.compile(r"\d[\u00a0\u202f\u2009'’_]\d{3}"),
        partial(_GAPS.sub, lambda found: re.sub(r"\D", "", found[0])),
    ),
    ("blank", re.compile(r"\d \d{3}"), partial(_BLANKS.sub, _without_blanks)),
    ("comma", re.compile(r"\d,\d{2},"), partial(_INDIAN.sub, lambda found: found[0].replace(",", ""))),
    (
        "point",
        re.compile(r"\d\.\d{3},\d"),
        partial(_POINTS_AND_COMMA.sub, lambda found: f"{found[1].replace('.', '')}.{found[2]}"),
    ),
    ("comma", _POINT_CURRENCY, partial(_COMMA_MONEY.sub, r"\1.\2")),
    ("point", _POINT_CURRENCY, partial(_POINT_MONEY.sub, lambda found: found[1].replace(".", ""))),
)
_SCALINGS: _Rewrites = (
    (
        "scale",
        re.compile(r"\d\s?(?:ngh|ng[àa]n|tri|t[ỷỉ]|lakh|crore|万|亿)"),
        partial(_SCALED.sub, lambda found: _times(found[1], _SCALES[found[2].lower()])),
    ),
    (
        "suffix",
        re.compile(r"[$€£₹¥]\s?\d"),
        partial(_MONEY_SUFFIX.sub, lambda found: _times(found[1], _SUFFIXES[found[2].lower()])),
    ),
    ("suffix", re.compile(r"\d[kK]\b"), partial(_K.sub, lambda found: _times(found[1], 1000))),
)
