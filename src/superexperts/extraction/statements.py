"""What the rules share: an answer with its parts, and patterns for "the answer is", refusals, hedges, conclusions."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Final, Literal

from superexperts.extraction.cued import Cued, Gated, lowered
from superexperts.extraction.endings import breaks_off
from superexperts.extraction.numbers import find_numbers
from superexperts.extraction.text import first_sentence, last_sentences, normalise

__all__ = [
    "CONCLUSION",
    "CUE",
    "INSTEAD",
    "LAST_STATEMENTS",
    "NONE",
    "NOT",
    "NOT_IN",
    "REFUSAL",
    "RETRACTED",
    "RETRACTING",
    "TAIL",
    "Choices",
    "Kind",
    "Reading",
    "first_part",
    "is_said_again",
    "lead_end",
    "statements",
]

NONE: Final = ""
"""A commitment to nothing that can be scored."""

Kind = Literal["choice", "number", "yesno"]
Choices = tuple[tuple[str, str], ...]

# Bounds on what is searched. They keep the time linear for a model that repeats "the answer is" a thousand times.
LAST_STATEMENTS = 40  # statements, counted from the end
TAIL = 400  # characters after "the answer is"
CONCLUSION = 3000  # last characters that may hold a conclusion


@dataclasses.dataclass
class Reading:
    """An answer as the rules see it. It is never changed, but not frozen either: creating it is three times as fast."""

    kind: Kind
    text: str
    """The answer up to the next question or turn, see `own_turn`."""
    question: str
    choices: Choices

    @functools.cached_property
    def options(self) -> tuple[tuple[str, str], ...]:
        """(label, normalised text) of each choice that contains words."""
        return tuple((label, words) for label, text in self.choices if (words := normalise(text)).strip())

    @functools.cached_property
    def labels(self) -> str:
        """The labels of the choices as alternatives of a pattern: `A|B|C|D`."""
        return _alternatives(next(zip(*self.choices, strict=True), ()))

    @functools.cached_property
    def asked(self) -> frozenset[str]:
        """The numbers of the question."""
        return frozenset(value for _, _, value in find_numbers(self.question[-CONCLUSION:]))

    @functools.cached_property
    def lower(self) -> str | None:
        """The text `lowered`."""
        return lowered(self.text)

    @functools.cached_property
    def conclusion(self) -> list[str]:
        """The last sentences, without code fences and tags."""
        return last_sentences(self.text[-CONCLUSION:], CONCLUSION)

    @functools.cached_property
    def ending(self) -> list[str]:
        """At least the last three sentences of `conclusion`, or all if there are fewer."""
        return self.__dict__.get("conclusion") or last_sentences(self.text[-CONCLUSION:], 3)

    @functools.cached_property
    def cut(self) -> bool:
        """Whether the answer breaks off before its conclusion."""
        return breaks_off(self.text, self.question)


@functools.lru_cache(maxsize=256)
def _alternatives(labels: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, labels))


# What may come between "the answer is" and the answer: "the answer is most likely option B", "đáp án là phương án B".
_HEDGE = (
    r"(?:most\ likely|very\ likely|more\ likely|likely|probably|clearly|definitely|simply|therefore|thus|actually|"
    r"still|indeed|perhaps|it's|it\ is|i\ would\ say|i'd\ say|i\ think|i\ believe|i\ guess|closest\ to|approximately|"
    r"about|around|either|option|choice|answer|letter|number|la|el|opción|letra|lettre|选项|"
    r"phương\ án|đáp\ án|lựa\ chọn|câu|ý)"
)
_OPENING = r"[\s*\"'“”‘’`$:=>~≈(\[{\\]"
LEAD = re.compile(
    rf"(?:{_OPENING}|(?:text|mathbf|mathrm|textbf)\{{|{_HEDGE}\b[\s:,]){{0,30}}", re.IGNORECASE | re.VERBOSE
)

_STATEMENT_SOURCE = r"""
    (?:(?<![^\W_])(?:
      (?:answer|solution|result)s?\b[*_\]"']{0,4}
        (?:\s?\([^()\n]{1,40}\))?                                              # the answer (Yes or No) is
        (?:\s(?:to|for|of|from|here|among|choice|option|would\ then)\b[^.\n:?]{0,120}?)?
        \s?(?:[*_]{0,3}[:：=][*_]{0,3} | \s?[-–—](?=\s)
            | \s(?:is|are|was|(?:would|should|must|will|could|may|might|can|has\ to)(?:\s\w{2,10}ly)?\ be)\b[:：]?)
    | (?:correct|right|best|false|true|incorrect|final|accurate|appropriate)\s
        (?:option|choice|statement|one|letter|number)s?\s?(?:\s(?:is|are|would\ be)\b[:：]?|[:：])
    | (?<!từng\ )(?<!các\ )(?<!những\ )(?<!mỗi\ )(?<!bốn\ )
        (?:đáp\ án|câu\ trả\ lời|trả\ lời|phương\ án|lựa\ chọn|kết\ luận|kết\ quả)
        (?:\s(?:đúng(?:\ nhất)?|chính\ xác|cuối\ cùng|phù\ hợp|nhất)){0,3}(?:\scủa\ [^.\n:]{1,60}?)?
        \s?[*_]{0,3}(?:\slà\b[:：]?|[:：])
    | (?:choose|pick|select|go\ with)\s(?:option\s|answer\s)?(?=[*(\["]{0,3}[a-h]\b)
    | answer\s(?=["“'(\[*]{0,2}(?:\$?\d|[a-h]\b|yes\b|no\b))
    | (?:đáp\ án|phương\ án|chọn)\s(?=[*(\["]{0,3}[a-h]\b)
    | (?:actually|correction|wait|sorry|rather|i\ mean|on\ second\ thought|thực\ ra|đúng\ ra|nhầm|sửa\ lại
        |xin\ lỗi|à\ không)
        [,:;.!]{0,3}\s(?:no,?\s)?(?:the\ (?:correct\ )?answer\s|it|that|this|nó)?
        (?:\s?(?:is|'s|should\ be|must\ be)|\s?(?:phải\ )?là)\b
    | (?:approaches|factors|reasons|statements|options|choices)\sare\b(?=\s?:?\s?\(?[a-h]\b)
    | đáp\ số\s?[*_]{0,3}(?:\slà\b)?\s?[:：]?
    | (?:antwort|lösung|ergebnis|réponse|résultat|respuesta|resultado|resposta|risposta|ответ)[*_]{0,4}
        (?:\s(?:correct[aeo]?|richtige?|korrekte?|finale?|final|bonne|esatta|corretta|на\ вопрос)\b){0,2}
        \s?(?:[*_]{0,3}[:：=] | \s?[-–—](?=\s) | \s(?:ist|lautet|wäre|est|serait|es|sería|é|è|sarebbe)\b[:：]?)
    | (?:richtig|korrekt)\s(?:ist|wäre)\b[:：]?
    )
    | (?:答案|正确选项|正確選項)[*】」_]{0,4}\s?
        (?:应该是|应该选|应该为|应为|应是|应选|應為|是|为|為|选|選|就是)?\s?[:：]?
        (?<=[是为為选選:：】])
    | (?:选择|选|選擇|選)(?!项|擇|項)\s?[:：]?\s?(?=[(（*]{0,3}[a-h](?![a-z]))
    | (?:选项|選項)\s?(?:是|为|為|[:：])
    | 结果\s?(?:是|为|[:：]) | (?:解答|答)\s?[:：]
    | (?:答え|正解|解答)\s?は | (?:정답|답)\s?(?:은|[:：])
    )
    """
_STATES = (
    *("answer", "solution", "result", "correct", "right", "best", "false", "true", "incorrect", "final", "accurate"),
    *(
        "antwort",
        "lösung",
        "ergebnis",
        "réponse",
        "résultat",
        "respuesta",
        "resposta",
        "risposta",
        "ответ",
    ),
    *("richtig", "korrekt", "答", "正", "选", "選", "结果", "解答", "정답", "답"),
    *("appropriate", "đáp", "câu", "trả", "phương", "lựa", "kết", "choose", "pick", "select", "go with", "chọn"),
    *(
        "actually",
        "wait",
        "sorry",
        "rather",
        "i mean",
        "on second",
        "thực",
        "đúng",
        "nhầm",
        "sửa",
        "xin lỗi",
        "à không",
    ),
)
"""What a statement begins with."""
_STATE_SEVERAL = ("approaches", "factors", "reasons", "statements", "options", "choices")
_STATEMENT = Cued(_STATEMENT_SOURCE, _STATES, where={"are": _STATE_SEVERAL})
# "Ans: B", "Đ/A: B". The text gets a new line in front, since a pattern that begins with one character is fast. "A: 12"
# is a statement only for numbers: elsewhere "A" is a label.
_SHORT_STATEMENT = re.compile(r"[\n.!?]\s{0,8}(?:Ans|Đ/A|ĐA|TL)\s?[:：.](?=\s)", re.IGNORECASE)
_SHORTEST_STATEMENT = re.compile(r"\n\s{0,8}(?:A|Ans|Đ/A|ĐA|TL)\s?[:：](?=\s)")
_HEADING = re.compile(
    r"\n[#*\s]{1,8}(?:final\s|correct\s)?(?:answer|response|đáp\sán|trả\slời)[*:：]{0,4}\s*\n", re.IGNORECASE
)

NOT = re.compile(r"(?:not|no\ longer|isn't|cannot|can't|unlikely|không\ phải|không)\b", re.IGNORECASE | re.VERBOSE)
NOT_IN = Gated(NOT, ("not", "no longer", "isn't", "can't", "unlikely", "không"))
INSTEAD = re.compile(r"(?:\bbut(?: rather)?|\bit is|\bit's|\binstead|\brather|mà là)\s[:\s]{0,3}", re.IGNORECASE)
# Commits to nothing: "none of the above", "it depends", "cannot be determined", "không xác định".
REFUSAL = re.compile(
    r"""
    (?:_{2,}
    | not\ (?:in|on|one\ of|an?\ option|any|known|given|provided|possible|enough|clear|available|stated|sure|certain
        |determin\w+|specified|mentioned|listed|among)
    | (?:an?\ )?(?:unknown|unclear|uncertain|undetermined|ambiguous|inconclusive|indeterminate|n/a)
    | none\b|neither\b|both\b|all\ of\b|it\ depends|depend(?:s|ent|ing)\b|cannot\ be|can't\ be|could\ be\ either
    | 无|没有|题目|无法|不确定|不知道|以上都不
    | không\ (?:có\ (?:đáp|câu|phương)|rõ|xác\ định|biết|thể)|cả\ (?:hai|ba|bốn)\b|tùy\b|tuỳ\b)
    """,
    re.IGNORECASE | re.VERBOSE,
)


RETRACTED = re.compile(
    r"\b(?:wait|hold on|scratch that|oops|correction|let me (?:re|double|check)\w*"
    r"|(?:that|this|it)(?:'s| is| was) (?:wrong|not (?:right|correct)|incorrect)|made an? (?:mistake|error)"
    r"|khoan|chờ đã|nhầm)\b|等等|不对",
    re.IGNORECASE,
)
"""The text takes back what it said."""
RETRACTING = (
    *("wait", "hold on", "scratch", "oops", "correct", "let me", "wrong", "right", "mistake", "error"),
    *("khoan", "chờ", "nhầm", "等等", "不对"),
)
"""Words of which such a text holds one."""
LONGEST_STATEMENT = 220
"""No match of `_STATEMENT` is longer."""
_RECENT = 400


def lead_end(part: str) -> int:
    """Index at which the answer begins, behind brackets and hedges: of "(most likely B)", the B."""
    if part[:1] in _PLAINLY and not part[1:2].isalpha():
        return 0
    found = LEAD.match(part)
    assert found is not None
    return found.end()


_PLAINLY = frozenset("0123456789ABCDEFGHbcdefgh")
"""No lead begins with one of these alone."""


def statements(reading: Reading) -> Iterator[str]:
    """The text after each "the answer is", from the last to the first."""
    text, lower = reading.text, reading.lower
    if lower is None:
        ends = [found.end() for found in _STATEMENT.matches(text)]
    elif len(text) < _RECENT + LONGEST_STATEMENT:
        ends = [found.end() for found in _STATEMENT.matches_lower(lower)]
    else:
        # Most say it near the end, so the rest is not searched. A match in the end part is reliable only
        # if no longer match began before that part; such a match could not reach beyond LONGEST_STATEMENT characters.
        begin = len(text) - _RECENT
        recent = _STATEMENT.matches_lower(lower, begin)
        sure = not recent or recent[0].start() >= begin + LONGEST_STATEMENT
        last = recent[-LAST_STATEMENTS:] if sure else []
        for found in reversed(last):
            yield text[found.end() : found.end() + TAIL]
        if len(last) == LAST_STATEMENTS:
            return
        earlier = _STATEMENT.matches_lower(lower, 0, begin if sure else None)
        ends = [found.end() for found in earlier][len(last) - LAST_STATEMENTS :]
        if last and not ends:
            return
    if not ends:
        lines = f"\n{text}"
        if reading.kind == "number":
            ends = [found.end() - 1 for found in _SHORTEST_STATEMENT.finditer(lines)][-1:]
        elif lower is None or not lower.isascii() or "ans" in lower or "tl" in lower:
            ends = [found.end() - 1 for found in _SHORT_STATEMENT.finditer(lines)][-1:]
        if not ends and ("#" in lines or "*" in lines):
            ends = [found.end() - 1 for found in _HEADING.finditer(lines)][-1:]
    for end in ends[: -LAST_STATEMENTS - 1 : -1]:
        yield text[end : end + TAIL]


_BLANK = re.compile(r"(?:\s|\[\s?\]|(?:model|assistant)\s?\n|[*#>]|---+|```\w{0,10}|<\w{1,12}>)+")


def first_part(tail: str) -> str:
    """The first sentence or line with words, without a role ("assistant"), heading marks or an empty check box."""
    tail = tail[1:TAIL] if tail[:1] == " " else tail[:TAIL]
    if tail[:1].isalnum() and tail[0] not in "ma":
        return first_sentence(tail)  # most begin with a word or a number, after one blank
    blank = _BLANK.match(tail)
    return first_sentence(tail[blank.end() :] if blank else tail)


CUE = re.compile(
    r"\b(?:so|therefore|thus|hence|then|overall|vì\ vậy|do\ đó|vậy|nên)\b[\s,:]{0,3}", re.IGNORECASE | re.VERBOSE
)


def is_said_again(reading: Reading, sentence: str) -> bool:
    """Whether the answer breaks off while it repeats this sentence."""
    last = reading.ending[-1]
    return sentence.startswith(last) and 2 * len(last) > len(sentence)
