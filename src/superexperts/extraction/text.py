"""What the extraction rules share: an answer's own text, its sentences, its words.

Everything is linear in the text: no pattern has an unbounded repeat inside another, and every look around is bounded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from superexperts.extraction.cued import lowered, strange

__all__ = ["first_sentence", "last_sentences", "normalise", "own_span", "own_turn", "plain", "sentences"]

# ---- the answer's own text ------------------------------------------------------------------------------------------

# Escape sequences of terminals (CSI and OSC), control characters but for tab and the ends of lines, invisible format
# marks, and those that turn the direction of writing. That the pattern begins with a set of characters makes it fast.
_NOISE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
    r"(?:(?<=\x1b)\[[0-9;?]{0,20}[@-~]|(?<=\x9b)[0-9;?]{0,20}[@-~]|(?<=\x1b)\][^\x07\x1b]{0,200}\x07?)?"
)
_VULGAR = re.compile("[½⅓⅔¼¾⅕-⅞]")

# All others are composed as they are, whatever stands before them.
_COMPOSES = re.compile(
    "[^\x00-\u02ff\u1e00-\u1eff\u2002-\u20cf\u2100-\u2125\u2190-\u2328\u232b-\u2a00\u3041-\u3098\u4e00-\u9fff\uff01-\uffee]"
)
# Chinese and Japanese write no blanks around letters and figures either: 答案是C。
_CJK = "\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_ANY_CJK = re.compile(f"[{_CJK}]")
_CJK_BEFORE = re.compile(rf"[{_CJK}](?=[A-Za-z0-9$\\(])")
_CJK_AFTER = re.compile(rf"[{_CJK}](?<=[A-Za-z0-9%)].)")
# Full-width letters, figures and brackets; full-width stops and colons are known to the patterns.
_FULL_WIDTH = {
    chr(ord(narrow) + 0xFEE0): narrow
    for narrow in map(chr, range(0x21, 0x7F))
    if narrow.isalnum() or narrow in "()[]{}%$+-=./*#"
}
_BLANKS = re.compile(r"\s\s{19,}")  # that it begins with a set of characters makes it fast
_SIX_BLANKS = re.compile(r"\s\s{5}")
LONGEST = 200_000  # characters; a reasoning model's 32,768 tokens are about 130,000

# Of chat models; DeepSeek writes its bars and blanks in other characters.
_ANY_TEMPLATE = re.compile(
    r"[<\[](?:(?<=<)(?:[|｜][\w\s▁]{1,30}[|｜]>|/?s>|(?:start|end)_of_turn>)|(?<=\[)/?INST\])", re.IGNORECASE
)
_TEMPLATE = re.compile(_ANY_TEMPLATE.pattern.replace("INST", "inst"))  # of what is in lower case
_TOKEN_END = re.compile(r">(?<=[|｜sSſnN]>)")
_TURN = r"""
    [\s>*\#\-\[]{0,12}+(?=[uhnqpecbiatv])(?:
        (?:user|human|người\ dùng)\s?[:：]                               # a new turn
        | (?:new\ |next\ |another\ )?
          (?:question|problem|exercise|q|câu\ hỏi|câu|bài\ tập|bài)\s?\d{0,4}\s?\*{0,3}[:：]
        | (?:question|problem|exercise|câu\ hỏi|câu|bài)\s\d{1,4}\s?\*{0,3}(?:[.)]\s|\n)    # ### Question 2
        | (?:example|ví\ dụ)\s\d{1,3}\s?\*{0,3}[:：]
        | (?:instruction|input)s?\s?[:：]
        | (?:answer|trả\ lời)\ (?:the\ following|this|these|câu\ hỏi)\b
      )
    """
"""At the beginning of a line."""
_FIRST_TURN, _NEXT_TURN = (re.compile(begin + _TURN, re.VERBOSE) for begin in ("", r"\n"))  # of what is in lower case
_ANY_FIRST_TURN, _ANY_NEXT_TURN = (re.compile(p.pattern, re.IGNORECASE | re.VERBOSE) for p in (_FIRST_TURN, _NEXT_TURN))
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
_ASKED_END = re.compile(r"\?[ \t]{0,8}\n\s{0,8}(?:answer|a|trả lời|đáp án)\s?[:：]", re.IGNORECASE)
_ASKED = re.compile(rf"\n[^\n]{{1,600}}{_ASKED_END.pattern}", re.IGNORECASE)
_LISTED = re.compile(r"\n\s{0,8}\(?A[.)]\s{1,4}(\S[^\n]{0,300})\n\s{0,8}\(?B[.)]\s")
_INTRODUCES = re.compile(
    r"(?::|\b(?:options?|choices|statements|answers|each|phương án|lựa chọn|đáp án)\b[^\n]{0,40})\s*\Z", re.IGNORECASE
)
_LATER_ROLE = re.compile(r"\n\s{0,8}assistant\s?[:：]", re.IGNORECASE)
_OPENS = frozenset(("<|", "<｜", "<s", "[/", "as", "mo", "bo"))
"""What an opening begins with."""


def plain(text: str) -> str:
    """The text in Unicode's composed form without terminal codes, control characters and stretches of blanks.

    Of what is longer than any answer, the beginning and the end are kept.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}\n{text[-LONGEST // 2 :]}"
    text = text.replace("\r", "\n")
    others = strange(text)
    if others:
        if _COMPOSES.search(others) and not unicodedata.is_normalized("NFC", text):
            # Word by word: composing takes time with the square of a run of marks.
            text = "".join(unicodedata.normalize("NFC", part) for part in re.findall(r"\s+|\S{1,200}", text))
            others = strange(text)
        for wide in _FULL_WIDTH.keys() & set(others):
            text = text.replace(wide, _FULL_WIDTH[wide])
        if _ANY_CJK.search(others):
            text = spaced(text)
        if _VULGAR.search(others):
            text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/"), text)
    # A cheap test on every third character: a run of twenty blanks leaves at least six blanks in a row there.
    if others.isprintable():  # no other blanks then
        if "      " not in text[::3].replace("\n", " "):
            return text
    else:
        if not others.replace("\t", "").isprintable():
            text = _NOISE.sub("", text)
        if not _SIX_BLANKS.search(text[::3]):
            return text
    return _BLANKS.sub(lambda found: "\n\n" if "\n" in found[0] else " ", text)


def spaced(text: str) -> str:
    """The text with a blank between a Chinese, Japanese or Korean character and a Latin letter or a figure."""
    return _CJK_AFTER.sub(r" \g<0>", _CJK_BEFORE.sub(r"\g<0> ", text))


def own_turn(text: str, question: str = "", choices: Sequence[tuple[str, str]] = ()) -> str:
    """What a response says before it goes on to another question, turn or example.

    A response that first says its own question again is still about it.
    """
    start, end = own_span(text, lowered(text), question, choices)
    return text[start:end]


def own_span(text: str, lower: str | None, question: str, choices: Sequence[tuple[str, str]]) -> tuple[int, int]:
    """(start, end) of `own_turn`; `lower` is the text `lowered`."""
    opening = _OPENING.match(text) if text[:30].lstrip()[:2].casefold() in _OPENS else None
    start = opening.end() if opening and opening[0].strip() else 0
    end = len(text)
    passed = start
    for begin, after in _turns(text, lower, start):
        if begin < passed:
            continue  # inside the one before
        passed = after
        if not _repeats(text[after : after + 200], question) or re.search(r"\w", text[start:begin]):
            end = begin
            break
    if "\n" not in text:
        return start, end
    if lower is None or "assistant" in lower:
        end = _before(_LATER_ROLE, text, start, end, question)
    if "?" in text and _ASKED_END.search(text, start, end):
        end = _before(_ASKED, text, start, end, question)
    if choices and ("A." in text or "A)" in text):
        listed = _LISTED.search(text, start, end)
        # "Let us look at each option:" introduces its own choices.
        introduced = listed is not None and _INTRODUCES.search(text[max(start, listed.start() - 160) : listed.start()])
        if listed and not introduced and not _own_list(normalise(listed[1]), choices):
            before = max(text.rfind("\n\n", start, listed.start()), start)
            end = before if before > start else listed.start()
    return start, end


def _before(marker: re.Pattern[str], text: str, start: int, end: int, question: str) -> int:
    """Index of a marker in `start` to `end` that follows some text and does not repeat the question; else `end`."""
    later = marker.search(text, start, end)
    if later and text[start : later.start()].strip() and not _repeats(later[0], question):
        return later.start()
    return end


def _own_list(first: str, choices: Sequence[tuple[str, str]]) -> bool:
    """Whether a list with the first line `first` (normalised) goes through these choices; it may say more on each."""
    words = normalise(choices[0][1])
    return first.strip() in normalise(" ".join(f"{a} {b}" for a, b in choices)) or (
        len(words) > 3 and first.startswith(words)
    )


def _repeats(text: str, question: str) -> bool:
    """Whether a text holds the question's first words."""
    words = " ".join(question.split(None, 6)[:6])
    return bool(words) and words in " ".join(text.split())


def _turns(text: str, lower: str | None, start: int) -> Iterable[tuple[int, int]]:
    """(start, end) of the marks of templates and of the lines that begin a turn, in order. Mostly one is looked at."""
    found, folded = [], text.lower() if lower is None else lower
    if ("<" in text and _TOKEN_END.search(text)) or ("[" in text and ("nst]" in folded or "ſt]" in folded)):
        marks = _ANY_TEMPLATE.finditer(text, start) if lower is None else _TEMPLATE.finditer(lower, start)
        found = [mark.span() for mark in marks]
    if lower is None:
        first, later, lines_of = _ANY_FIRST_TURN, _ANY_NEXT_TURN, text
    elif ":" in text or "\n#" in text or "answer " in lower or "：" in text or "trả lời " in lower:
        first, later, lines_of = _FIRST_TURN, _NEXT_TURN, lower
    else:
        return found
    lines = _lines(first.match(lines_of) if start == 0 else None, later.finditer(lines_of, max(0, start - 1)))
    return sorted([*found, *lines], key=lambda span: span[0]) if found else lines


def _lines(at_once: re.Match[str] | None, later: Iterable[re.Match[str]]) -> Iterator[tuple[int, int]]:
    """(start, end) of the lines that were found: one at the beginning, and others with the end of the line before."""
    if at_once is not None:
        yield at_once.span()
    for line in later:
        yield line.start() + 1, line.end()


# A stop and the blanks after it, or new lines; that it begins with a set of characters makes it fast.
_SENTENCE_END = re.compile(
    r"[.!?。！？\n](?:(?<=[。！？])[”」』）]?\s*|(?<=[.!?])(?:(?<![\s(\[*][A-Z]\.)|(?=\s(?:That|So|Therefore|Thus|Hence)\b))(?<!\n\d\.)[\"'”’)\]]{0,3}\s+|(?<=\n)\n*)"
)


def sentences(text: str) -> list[str]:
    """Sentences and lines, stripped, without the blank ones. The period after a label (`B. west`) ends none."""
    padded, start, found = f"\n{text}", 1, []
    for end in _SENTENCE_END.finditer(padded, 1):
        if part := padded[start : end.start() + 1].strip():  # a newline goes with the strip, a stop is the sentence's
            found.append(part)
        start = end.end()
    if part := padded[start:].strip():
        found.append(part)
    return found


def first_sentence(text: str) -> str:
    """The first of `sentences(text)`, "" where there is none."""
    padded, start = f"\n{text}", 1
    while end := _SENTENCE_END.search(padded, start):
        if part := padded[start : end.start() + 1].strip():
            return part
        start = end.end()
    return padded[start:].strip()


_WORD_BEGINS = re.compile(r" (?=\w)")
_FENCES = re.compile(r"```|</?\w{1,12}>")


def last_sentences(text: str, count: int) -> list[str]:
    """The last `count` or more of `sentences(text)`, or all; code fences and tags are ends of lines."""
    # No fence holds a blank and no sentence's end a letter: from a word on, all sentences but the first are the same.
    begin = _WORD_BEGINS.search(text, len(text) - 140 * count) if len(text) > 200 * count else None
    if begin is not None:
        found = sentences(_without_fences(text[begin.end() :]))[1:]
        if len(found) >= count:
            return found
    return sentences(_without_fences(text))


def _without_fences(text: str) -> str:
    return _FENCES.sub("\n", text) if "`" in text or "<" in text else text


_ARTICLES = (" the ", " a ", " an ")
_PUNCTUATION = re.compile(r"[\W_]+")
# Vietnamese writes i or y in the same word: Mĩ and Mỹ, lí and lý.
_Y_TO_I = tuple(zip("yýỳỷỹỵ", "iíìỉĩị", strict=True))
_ASCII_WORDS = bytes(ord("i" if c in "yY" else c.lower() if c.isalnum() else " ") for c in map(chr, range(128))).ljust(
    256
)


def normalise(text: str) -> str:
    """Words only, casefolded, without English articles, one space between and at either end, to find ` phrase `."""
    if text.isascii():
        words = f" {' '.join(text.encode().translate(_ASCII_WORDS).decode().split())} "
    else:
        folded = spaced(text).casefold() if _ANY_CJK.search(text) else text.casefold()
        for y, i in _Y_TO_I:
            folded = folded.replace(y, i)
        words = f" {_PUNCTUATION.sub(' ', folded).strip()} "
    if len(words) > 6:
        for article in _ARTICLES:
            while article in words:  # of two in a row, one is replaced at a time
                words = words.replace(article, " ")
    return words
