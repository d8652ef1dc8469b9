"""What the extraction rules share: an answer's own text, its sentences, and the numbers in it.

Everything is linear in the text: no pattern has an unbounded repeat inside another, and every look around is bounded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction

__all__ = [
    "Cued",
    "Quantity",
    "find_numbers",
    "first_sentence",
    "normalise",
    "number_value",
    "own_turn",
    "plain",
    "sentences",
]

# ---- patterns that need not be tried at every character --------------------------------------------------------------


class Cued:
    """A pattern (verbose, in lower case, to be found whatever the case) whose every match begins with a cue.

    Cues are found by `str.find`, and only there the pattern is tried, on lower case: several times faster than one that
    ignores case and is tried at every character.
    """

    def __init__(
        self, source: str, words: Sequence[str], marks: str | None = None, where_are: Sequence[str] = ()
    ) -> None:
        """The cues are `words`, the characters that the pattern `marks` finds, and `where_are`, which "are" follows."""
        self._anywhere = re.compile(source, re.IGNORECASE | re.VERBOSE)
        self._at_cue = re.compile(source, re.VERBOSE)
        self._words = tuple(words)
        self._ascii = tuple(filter(str.isascii, words))
        self._where_are = tuple(where_are)
        self._marks = None if marks is None else re.compile(marks)

    def matches(self, text: str) -> list[re.Match[str]]:
        """All that a pattern's `finditer` gives; what is found is in lower case."""
        lower = text.lower()
        if len(lower) != len(text) or "ı" in lower or "ſ" in lower:  # i and s to a pattern, but not to `lower`
            return list(self._anywhere.finditer(text))
        places = [] if self._marks is None else [mark.start() for mark in self._marks.finditer(lower)]
        words = self._ascii if lower.isascii() else self._words
        for word in (*words, *self._where_are) if self._where_are and "are" in lower else words:
            if word in lower:  # of most there is none
                at = lower.find(word)
                while at >= 0:
                    places.append(at)
                    at = lower.find(word, at + 1)
        places.sort()
        found, end, match_at = [], 0, self._at_cue.match
        for at in places:
            if at >= end and (match := match_at(lower, at)):
                found.append(match)
                end = match.end()
        return found


# ---- the answer's own text ------------------------------------------------------------------------------------------

# Escape sequences of terminals (CSI and OSC), control characters but for tab and the ends of lines, invisible format
# marks, and those that turn the direction of writing.
_NOISE = re.compile(
    r"(?:\x1b\[|\x9b)[0-9;?]{0,20}[@-~]|\x1b\][^\x07\x1b]{0,200}\x07?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
_VULGAR = re.compile("[½⅓⅔¼¾⅕-⅞]")

_BLANKS = re.compile(r"\s\s{19,}")  # that it begins with a set of characters makes it fast, as the next one
LONGEST = 200_000  # characters; a reasoning model's 32,768 tokens are about 130,000

# Of chat models; DeepSeek writes the bars and the blanks of its own in other characters.
_TEMPLATE = re.compile(
    r"[<\[](?:(?<=<)(?:[|｜][\w\s▁]{1,30}[|｜]>|/?s>|(?:start|end)_of_turn>)|(?<=\[)/?INST\])", re.IGNORECASE
)
_TURN = re.compile(  # at the beginning of a line
    r"""
    [\s>*\#\-\[]{0,12}(?:
        (?:user|human|người\ dùng)\s?[:：]                               # a new turn
        | (?:new\ |next\ |another\ )?
          (?:question|problem|exercise|q|câu\ hỏi|câu|bài\ tập|bài)\s?\d{0,4}\s?\*{0,3}[:：]
        | (?:instruction|input)s?\s?[:：]
        | (?:answer|trả\ lời)\ (?:the\ following|this|these|câu\ hỏi)\b
      )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_NEXT_TURN = re.compile(rf"\n{_TURN.pattern}", _TURN.flags)
# What a template puts in front of a response, where it was not taken off: tokens that neither end a turn nor begin
# another's, and the role.
_OPENING = re.compile(
    r"""
    (?:\s*(?:<[|｜](?!(?:im_)?end(?:_?of|▁|\b)|eo|user|human|system)[\w\s▁]{1,30}[|｜]>|\[/INST\]|<s>|<start_of_turn>))*
    \s*(?:(?:assistant|model|bot)\s?(?:[:：\n]|<\|(?:end_header_id|im_sep)\|>)\s*)?
    (?!\s*(?:user|human|system)\s?(?:[:：\n]|<\|))
    """,
    re.IGNORECASE | re.VERBOSE,
)
# A line that asks, with an answer to it below; and another question's choices.
_ASKED = re.compile(r"\n[^\n]{1,600}\?[ \t]{0,8}\n\s{0,8}(?:answer|a|trả lời|đáp án)\s?[:：]", re.IGNORECASE)
_LISTED = re.compile(r"\n\s{0,8}\(?A[.)]\s{1,4}(\S[^\n]{0,300})\n\s{0,8}\(?B[.)]\s")
_LATER_ROLE = re.compile(r"\n\s{0,8}assistant\s?[:：]", re.IGNORECASE)
_OPENS = frozenset("<[aAmMbB")
"""What an opening begins with."""


def plain(text: str) -> str:
    """The text in Unicode's composed form without terminal codes, control characters and stretches of blanks.

    Of what is longer than any answer, the beginning and the end are kept.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}\n{text[-LONGEST // 2 :]}"
    if not unicodedata.is_normalized("NFC", text):
        # Word by word: composing takes time with the square of a run of marks.
        text = "".join(unicodedata.normalize("NFC", part) for part in re.findall(r"\s+|\S{1,200}", text))
    text = text.replace("\r", "\n")
    if not text.isascii() and _VULGAR.search(text):
        text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/"), text)
    if text.replace("\n", "").isprintable():  # then it has no noise, and no blanks but spaces and newlines
        if not ("    " in text or "\n\n\n" in text or "\n " in text):  # twenty of these hold one of those
            return text
    else:
        text = _NOISE.sub("", text)
    return _BLANKS.sub(lambda found: "\n\n" if "\n" in found[0] else " ", text)


def own_turn(text: str, question: str = "", choices: Sequence[tuple[str, str]] = ()) -> str:
    """What a response says before it goes on to another question, turn or example.

    A response that first says its own question again is still about it.
    """
    opening = _OPENING.match(text) if text[:30].lstrip()[:1] in _OPENS else None
    start = opening.end() if opening and opening[0].strip() else 0
    end = len(text)
    passed = start
    for begin, after in _turns(text, start):
        if begin < passed:
            continue  # inside the one before
        passed = after
        if not _repeats(text[after : after + 200], question) or re.search(r"\w", text[start:begin]):
            end = begin
            break
    if "\n" not in text:
        return text[start:end]
    for marker in (_LATER_ROLE, _ASKED) if "?" in text else (_LATER_ROLE,):
        later = marker.search(text, start, end)
        if later and text[start : later.start()].strip() and not _repeats(later[0], question):
            end = later.start()
    if choices:
        listed = _LISTED.search(text, start, end)
        if listed and not _own_list(normalise(listed[1]), choices):
            before = max(text.rfind("\n\n", start, listed.start()), start)
            end = before if before > start else listed.start()
    return text[start:end]


def _own_list(first: str, choices: Sequence[tuple[str, str]]) -> bool:
    """Whether a list whose first line says `first`, normalised, goes through these choices: it may say more of each."""
    words = normalise(choices[0][1])
    return first.strip() in normalise(" ".join(f"{a} {b}" for a, b in choices)) or (
        len(words) > 3 and first.startswith(words)
    )


def _repeats(text: str, question: str) -> bool:
    """Whether a text holds the question's first words."""
    words = " ".join(question.split(None, 6)[:6])
    return bool(words) and words in " ".join(text.split())


def _turns(text: str, start: int) -> list[tuple[int, int]]:
    """(start, end) of the marks of templates and of the lines that begin a turn, in order."""
    found, lower = [], text.lower()
    tokens = "<" in text and ("<|" in text or "<s>" in lower or "</s>" in lower or "_turn>" in lower or "｜>" in text)
    if tokens or ("t]" in lower and "[" in text):
        found = [mark.span() for mark in _TEMPLATE.finditer(text, start)]
    if ":" in text or "：" in text or "answer " in lower or "trả lời " in lower or "ſ" in lower:
        first = _TURN.match(text) if start == 0 else None
        lines = [] if first is None else [first.span()]
        lines += [(line.start() + 1, line.end()) for line in _NEXT_TURN.finditer(text, max(0, start - 1))]
        found = sorted(found + lines, key=lambda span: span[0]) if found else lines
    return found


# A stop and the blanks after it, or new lines; that it begins with a set of characters makes it fast.
_SENTENCE_END = re.compile(r"[.!?。\n](?:(?<=[.!?。])(?<![\s(\[*][A-Z]\.)(?<!\n\d\.)[\"'”’)\]]{0,3}\s+|(?<=\n)\n*)")


def sentences(text: str) -> list[str]:
    """Sentences and lines, stripped, without the blank ones. The period after a label (`B. west`) ends none."""
    return list(_sentences(text))


def first_sentence(text: str) -> str:
    """The first of `sentences(text)`, "" where there is none."""
    return next(_sentences(text), "")


def _sentences(text: str) -> Iterator[str]:
    padded, start = f"\n{text}", 0
    for end in _SENTENCE_END.finditer(padded):
        if part := padded[start : end.start() + 1].strip():  # a newline goes with the strip, a stop is the sentence's
            yield part
        start = end.end()
    if part := padded[start:].strip():
        yield part


_PUNCTUATION = re.compile(r"[\W_]+")
_ARTICLE = re.compile(r" (?:the|an?)(?= )")
# Vietnamese writes i or y in the same word: Mĩ and Mỹ, lí and lý.
_Y_TO_I = str.maketrans("yýỳỷỹỵ", "iíìỉĩị")
_ASCII_WORDS = "".join("i" if c == "y" else c if c.isalnum() else " " for c in map(chr, range(128)))


def normalise(text: str) -> str:
    """Words only, casefolded, without English articles, one space between and at either end, to find ` phrase `."""
    if text.isascii():
        words = f" {' '.join(text.lower().translate(_ASCII_WORDS).split())} "
    else:
        words = f" {_PUNCTUATION.sub(' ', text.casefold().translate(_Y_TO_I)).strip()} "
    if len(words) > 6 and (" the " in words or " a " in words or " an " in words):
        return _ARTICLE.sub("", words)
    return words


# ---- numbers --------------------------------------------------------------------------------------------------------

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
    r"\d{1,3}(?=[,.{\\])(?:(?:(?:,|\{,\}|\\,|,\\!)\d{3}){1,9}(?!\d)(?:\.\d{1,30})?|(?:\.\d{3}){2,9}(?![\d.]\d))"
    r"|\d{1,30}(?!\d)(?:\.\d{1,30})?|\.\d{1,30}"
)
_NUMBER = Cued(
    rf"""
    (?P<sign>(?<![\w)])[-−–]|\bnegative\s(?=[\d$€£₫\\]))?(?:\\?[$€£₫]\s?|us\$)?(?P<sign2>(?<=[$€£₫])[-−])?
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
    words=(
        *(
            "us$",
            "negative",
            "zero",
            "one",
            "two",
            "three",
            "four",
            "fort",
            "five",
            "fif",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
        ),
        *("eleven", "twelve", "thirt", "twent", "hundred", "thousand", "million", "billion"),
    ),
    # A sign, a currency, a decimal point, or a whole run of digits: nothing begins in the middle of one. That the
    # pattern begins with a set of characters makes it fast.
    marks=r"[−–\\$€£₫\-.\d](?:(?<=\d)\d*|(?<=\.)(?=\d)|(?<=-)(?=[\d.$€£₫\\u])|(?<=[−–\\$€£₫]))",
)


def find_numbers(text: str) -> Iterator[Quantity]:
    """Every number of a text in order: digits with commas, signs, decimals, fractions, and English number words."""
    for found in _NUMBER.matches(text):
        if found.lastgroup == "digits" and found[0].isdigit():  # most are, and the rest takes longer
            yield found.start(), found.end(), found[0].lstrip("0") or "0"
            continue
        if found["words"]:
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
                value += f"/{found['over']}"
            if found["scale"]:
                value = _plain_decimal(Fraction(value) * _SCALES[found["scale"].lower()])
        if "/" in value and int(value.rpartition("/")[2]) == 0:
            continue
        if found["sign"] or found["sign2"] or found["sign3"]:
            value = f"-{value}"
        yield found.start(), found.end(), _canonical(value)


_UNMARKED = re.compile(r"[,{}\\!]")


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


def number_value(text: str) -> Fraction | None:
    """The exact value of a plain number or fraction (`-3`, `2.50`, `1/3`, `2,125`), None for anything else."""
    if len(text) <= 400 and text.isascii() and text.isdigit():
        return Fraction(int(text))  # most are, and the rest takes ten times as long
    if not re.fullmatch(r"\s*[-+]?[\d,]{0,400}(?:\.\d{0,400})?(?:/\d{1,400})?\s*", text) or not re.search(r"\d", text):
        return None
    top, _, bottom = text.replace(",", "").strip().partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / int(bottom or 1) if re.search(r"\d", top) else None
