"""Rules for multiple choice: an answer names an option by its label or by its text."""

from __future__ import annotations

import functools
import re

from superexperts.extraction.cued import Cued, Gated
from superexperts.extraction.listings import INLINE_LABEL, LINE_LABEL, lists_options
from superexperts.extraction.statements import (
    CONCLUSION,
    CUE,
    INSTEAD,
    NONE,
    NOT,
    NOT_IN,
    REFUSAL,
    Reading,
    first_part,
    is_said_again,
    lead_end,
    statements,
)
from superexperts.extraction.text import normalise


def choice_in(reading: Reading, tail: str) -> str | None:
    """The option named after "the answer is": by its label, "(B)", else by its text, "a desk drawer"."""
    part = first_part(tail)
    if not part:
        return None
    lead = lead_end(part)
    rest = part[lead:]
    if REFUSAL.match(rest):
        return _refusing_option(reading, normalise(rest)) or NONE
    if NOT.match(rest):
        other = INSTEAD.search(rest)
        return None if other is None else choice_in(reading, rest[other.end() :])
    label = label_at(reading, part, lead)
    if label is not None:
        return label
    value = _option_in(reading, normalise(part))
    aside = _ASIDE.search(part) if value == NONE else None
    return value if aside is None else _option_in(reading, normalise(part[: aside.start()]))


# What follows explains the answer, or compares it with others: "friction, not gravity", "B, though C is close".
_ASIDE = Gated(
    re.compile(
        r"[,;(]\s?(?:not|and\snot|but|which|al?though|though|even\sthough|while|whereas|because|since|as|vì|chứ)\b"
        r"|\s(?:rather\sthan|instead\sof|as\sopposed\sto|because|chứ\skhông)\b",
        re.IGNORECASE,
    ),
    (",", ";", "(", "rather", "instead", "opposed", "because", "chứ"),
)
_LABEL = re.compile(r"([A-Z]|\d{1,2})(?![\w%]|['’]\w)(?!\.\d)")
_SMALL_LABEL = re.compile(r"([a-h])(?:\s?[)\]}]|[.:](?:\s|$)|$)")
_GOES_ON = re.compile(r"\s+(?:because|since|as|is|was|vì|là|with|for|đúng)\b")
_GOES_ON_OR_NAME = re.compile(rf"{_GOES_ON.pattern}|\s+[A-Z]")
_DENIED = re.compile(
    r"[)\]}*\"'.]{0,3}(?:,\s[^,.;\n]{1,80},|\s?\([^()\n]{1,80}\))?\s?(?:is|was|are)\s(?:not|incorrect|wrong|false)\b"
)
_WRONG = re.compile(r"(?:is |was |are |là )?(?:also |clearly |therefore |definitely )?(?:incorrect|wrong|sai) ")
_CLOSING = ".)]*:"
_MARK = re.compile(r"\s?(?:[)\]}*_\"'.,:;`$\\!?—–。，、：；！？\u3400-\u9fff\uac00-\ud7af-]|$|\()")


@functools.lru_cache(maxsize=256)
def _joined(labels: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns for another label after one ("B and C"): after an unmarked "A", which may be a word, and otherwise."""
    return (
        re.compile(rf"\s+(?:and|or|và|hoặc|hay|&)\s+\(?(?:{labels})\b"),
        re.compile(
            rf"[)\]}}*\"']{{0,3}}\s?(?:,\s?(?:and\s|or\s|và\s|hoặc\s)?|/|&|\+|、|，|和|与|及|或|\s(?:and|or|và|hoặc|hay|und|oder|et|ou|y)\s)\s?"
            rf"[*(\[\"']{{0,3}}(?:{labels})(?![\w'’])(?!\s(?!(?:and|or|are|both|all|were)\b)[a-z])"
        ),
    )


def label_at(reading: Reading, part: str, at: int) -> str | None:
    """The label at index `at`; `NONE` for "B or C", and for a marked letter that is not an option, "(F)"."""
    found = _LABEL.match(part, at)
    bracket = part[max(0, at - 1) : at] in ("(", "[", "{")
    if found is None:
        small = _SMALL_LABEL.match(part, at)
        if small is None or not (bracket or small.end() > small.end(1) or reading.text.strip() == small[1]):
            return None
        if _joined(reading.labels.lower())[1].match(part, small.end(1)):
            return NONE
        found = small
    label, after = found[1].upper(), part[found.end(1) :]
    marked = bracket or _MARK.match(after) is not None
    known = label in dict(reading.choices)
    if label.isdigit() and (not known or not marked):
        return None  # a number in the answer, not a label
    # "A" and "I" are words too. Without a mark, "A because" is a label, but "A rabbit" is not.
    if not marked and not (_GOES_ON if label in "AI" else _GOES_ON_OR_NAME).match(after):
        return NONE if _joined(reading.labels)[0].match(after) else None
    if known and not after.strip(_CLOSING):  # nothing follows that could deny it
        return label
    if _joined(reading.labels)[1].match(after):
        return NONE
    if _DENIED.match(after):
        return None
    if marked and ("wrong" in after or "incorrect" in after or "sai" in after):  # A. sand is wrong
        words, text = normalise(after[:300]), dict(reading.options).get(label, "")
        if text and words.startswith(text) and _WRONG.match(words, len(text)):
            return None
    if known:
        return label
    return NONE if marked and label <= "H" else None


_NONE_OF = re.compile(r" none of (?:above|these|those|them|other|listed|given|options|choices|answers|statements) ")


def _refusing_option(reading: Reading, words: str) -> str | None:
    """The option that says what `words` (normalised) say: "all of the above", "none of these", "both"."""
    same = [
        label
        for label, text in reading.options
        if words.startswith(text) or (text.strip() in words and len(text) * 2 > len(words))
    ]
    if not same and _NONE_OF.match(words):
        same = [label for label, text in reading.options if _NONE_OF.match(text)]
    return same[0] if len(same) == 1 else None


def _option_in(reading: Reading, words: str) -> str | None:
    """The one option that `words` (normalised) contain or begin; `NONE` if there are several.

    An option within a longer one does not count: with "oil" and "olive oil", "olive oil" names only the second.
    """
    found = [(label, text) for label, text in reading.options if text in words]
    found = [(label, text) for label, text in found if not any(text != other and text in other for _, other in found)]
    if len(found) == 1 or (found and len({text for _, text in found}) == 1):
        return found[0][0]
    if found:
        return NONE
    if len(words) > 12:
        begun = [label for label, text in reading.options if text.startswith(words.rstrip())]
        return begun[0] if len(begun) == 1 else None
    return None


def statement(reading: Reading) -> str | None:
    """ "The answer is (B)", "đáp án đúng là B"; the last one that names an option."""
    for tail in statements(reading):
        value = choice_in(reading, tail)
        if value is not None:
            return value
    return None


_IS_THE_ANSWER = Cued(
    r"\b(?:is|are|was|would\ be|seems|là)\s(?:likely\s|probably\s|indeed\s|also\s)?(?:the\s|an?\s)?"
    r"(?:(?:most|more)\s\w{2,14}|answer|correct|right|best|only|true|false|đúng|chính\ xác|"
    r"phương\ án|đáp\ án|câu\ trả\ lời|lựa\ chọn)"
    r"(?:\s(?:correct|possible|likely|answer|choice|option|statement|one|response|đúng|chính\ xác|nhất))?",
    words=("is", "are", "was", "would be", "seems", "là"),
)
_NAMED_OPTION = r"(?:\b(?i:option|choice|answer|statement|đáp án|phương án|câu)\s|^|[(\[](?=\**\w[\])*]))[*(\[\"]{0,2}"
_HEAD = re.compile(r"[,;:]\s(?:so|therefore|thus|hence|then|nên|but|however)\b|[;:]")
_UNSURE = Gated(
    re.compile(r"\b(?:not|if|whether|nếu|không)\b|n't\b"),
    ("not", "if", "whether", "n't", "nếu", "không"),
)
_CHOSEN = re.compile(r"answer|choice|option|response|most|best|phương án|đáp án|câu trả lời|lựa chọn", re.IGNORECASE)


@functools.lru_cache(maxsize=256)
def _named(labels: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Patterns for a label before "is the answer"; anywhere in a sentence; and at its end ("so it must be B")."""
    return (
        re.compile(rf"{_NAMED_OPTION}({labels})\b(?!'| [a-z])"),
        re.compile(rf"[(\[]({labels})[)\]]|\b(?:option|choice)\s({labels})\b"),
        re.compile(
            rf"\b(?:(?i:is|be|là|leav(?:es|ing)|hence|thus|therefore|so|vậy))[:,]?\s[*\"]{{0,3}}({labels})[*\"]{{0,3}}"
            r"(?:\sas\sthe\s\w+(?:\s\w+)?)?[.)]?$"
        ),
    )


def is_the_answer(reading: Reading) -> str | None:
    """ "Option B is correct", "so the roof is the most likely answer". `NONE` if several options are."""
    if reading.lower is not None and not _IS_THE_ANSWER.matches_lower(reading.lower[-CONCLUSION:]):
        return None  # a search of the whole text first: sentence by sentence takes longer
    values = []
    for sentence in reading.conclusion[:-1] if reading.cut else reading.conclusion:
        found = next(iter(_IS_THE_ANSWER.matches(sentence)), None)
        if found is None:
            continue
        head = _HEAD.split(sentence[: found.start()])[-1].strip()
        if cue := CUE.match(head):  # So B is the best choice
            head = head[cue.end() :]
        if _UNSURE.search(head):
            continue
        labels = set(_named(reading.labels)[0].findall(head))
        value = labels.pop() if len(labels) == 1 else _option_in(reading, normalise(head))
        if value:
            values.append((value, _CHOSEN.search(found[0]) is not None))
    # "is the best answer" is a choice; "is correct" may be said of each option in turn.
    chosen = [value for value, is_choice in values if is_choice]
    if chosen:
        return chosen[-1]
    return NONE if len({value for value, _ in values}) > 1 else values[0][0] if values else None


_CHECKED = re.compile(r"\[\s?[xX✓✔]\s?\]\s?[*(\[]{0,3}([A-H])\b")


_A_FOR_ANSWER = re.compile(r"A\s?[:：]\s?[*(\[]{0,3}(?=[A-H](?:[.)\]*]|\s*$))")
""" "A: B"."""


_HOWEVER = re.compile(r"[,;]\s(?:but|however|nhưng|tuy nhiên)\b")
""" "Both A and C seem plausible, but C is more accurate"."""
_FIRST_OF_PARTS = re.compile(r"\(?(?:[aAiI]|1)\)\s")
_SECOND_PART = re.compile(r"(?:\n|[.:;]\s)\s{0,8}\(?(?:[bB]|ii|II)\)\s")
"""An answer in parts, "(a) ... (b) ...", for a question in parts."""


def _is_part(reading: Reading, sentence: str) -> bool:
    """Whether a sentence that begins with "(a)" is the first part of an answer in parts: it does not say option A."""
    inside = sentence.lstrip("(")
    option = dict(reading.options).get(inside[0].upper(), " ")
    return inside[0] in "ai" and len(sentence) > 25 and not normalise(inside[2:]).startswith(option)


def first_label(reading: Reading) -> str | None:
    """A label at the very beginning: "B", "[B] because ...", "D, garage.", or the only checked box: "[ ] A [x] B"."""
    checked = set(_CHECKED.findall(reading.text)) if reading.text[:1] == "[" or "\n[" in reading.text else ()
    if len(checked) == 1:  # [ ] A, [x] B
        return str(*checked)
    part = first_part(reading.text)
    if not part or lists_options(reading):
        return None
    lead = lead_end(part)
    if _FIRST_OF_PARTS.match(part) and (_SECOND_PART.search(reading.text) or _is_part(reading, part)):
        return None
    if REFUSAL.match(part, lead):
        return None if _HOWEVER.search(part) else _refusing_option(reading, normalise(part[lead:])) or NONE
    if NOT.match(part, lead):
        return choice_in(reading, part)
    if len(set(INLINE_LABEL.findall(part))) > 2:
        return None
    short = _A_FOR_ANSWER.match(part)
    return label_at(reading, part, short.end() if short else lead)


def first_option(reading: Reading) -> str | None:
    """The first line is the text of an option, or names one in a few words or in words of the question."""
    part = first_part(reading.text)
    words = normalise(part)
    if not part or part.endswith("?") or _NUMBERED.match(part) or lists_options(reading):
        return None
    value = _option_in(reading, words)
    if not value or NOT_IN.search(part) or _SAID_WRONG.search(part):
        return None
    only = len(reading.ending) == 1
    if len(words) <= 2 * len(dict(reading.options)[value]) + 12 and not (only and reading.cut):
        return value
    if not _restates(reading, part, value) or (only and reading.cut):
        return None
    others = [(_option_in(reading, normalise(sentence)), sentence) for sentence in reading.conclusion]
    rival = any(other not in (None, NONE, value) and _restates(reading, sentence, other) for other, sentence in others)
    return None if rival else value


_LATER = re.compile(r"[,;(]")


def _restates(reading: Reading, part: str, label: str) -> bool:
    """Whether a sentence has only the option and at least two words of the question: "Hanoi is the capital"."""
    words, option = normalise(_LATER.split(part)[0]), dict(reading.options)[label]
    if option not in words:
        return False
    said = [word for word in words.replace(option, " ").split() if len(word) > 3]
    return len(said) > 1 and set(said) <= set(normalise(reading.question).split())


_SAID_WRONG = Gated(re.compile(r"\b(?:is|are|was|là)\s(?:incorrect|wrong|sai)\b"), ("incorrect", "wrong", "sai"))
_NUMBERED = re.compile(r"\(?1[).]\s")
"""The first of several steps: "1. Read the passage"."""
_SO = re.compile(r"[,;]\s(?:(?:so|therefore|thus|hence|nên|vậy)\b|(?=leaving\b|which\sleaves\b))")
_ILL = Gated(
    re.compile(r"\b(?:incorrect|wrong|if)\b"),
    ("incorrect", "wrong", "if"),
)
_WEIGHED = Gated(
    re.compile(
        r",\s(?:not|and\snot|rather\sthan|(?:chứ\s)?không\sphải|chứ\skhông)\b"
        r"|\s(?:rather\sthan|instead\sof|as\sopposed\sto|chứ\skhông)\b"
    ),
    ("not", "rather", "instead", "opposed", "chứ", "không"),
)
_BUT = re.compile(r"[,;]\s(?:but|nhưng)\s(?=.{0,80}\b(?:is|are|was|were|là)\b)")
_ALSO = re.compile(r"\b(?:also|possible|could|might|may|close|cũng)\b")
_BESIDE = re.compile(r"[,;]\s(?:with|while|whereas|unlike|al?though|though|còn|trong\skhi)\b")
"""What follows is about other options: "it is iron, while sand is not magnetic"."""


@functools.lru_cache(maxsize=256)
def _final(labels: str) -> re.Pattern[str]:
    return re.compile(
        r"\s(?:is|are|be|là)[:,]?\s(?:(?:option|choice|answer|statement|letter|phương án|đáp án|therefore|thus"
        rf"|clearly|likely)\s){{0,2}}[*(\[\"]{{0,4}}({labels})(?:[)\]*\"]{{1,4}}|[.:]|(?=$))([^.]*)[.!*]{{0,3}}$"
    )


def _final_label(reading: Reading, sentence: str) -> str | None:
    """The label with which a sentence ends, whatever it denies before: "The one that is not a metal is (C)."."""
    found = _final(reading.labels).search(sentence)
    if found is None:
        return None
    rest, text = normalise(found[2]), dict(reading.options).get(found[1], " ")
    return found[1] if not rest.strip() or rest == text else None


def conclusion(reading: Reading) -> str | None:
    """One of the last two sentences, if it names one option and does not deny it: "... is a rabbit reservoir (B)."."""
    listed, short = lists_options(reading), len(reading.conclusion) < 3
    for place, sentence in enumerate(reversed(reading.conclusion[-2:])):
        if (listed and LINE_LABEL.match(sentence)) or (
            reading.cut and (place == 0 or not (CUE.match(sentence) or is_said_again(reading, sentence)))
        ):
            continue
        if (label := _final_label(reading, sentence)) is not None:
            return label
        sentence = _SO.split(sentence)[-1]  # it can't be B or C, so it must be A
        aside = _WEIGHED.search(sentence)
        sentence = sentence[: aside.start()] if aside else sentence
        if sentence.endswith(("?", ":")) or NOT_IN.search(sentence) or _ILL.search(sentence):
            continue
        _, named, last_named = _named(reading.labels)
        labels = set(named.findall(sentence))
        names: set[str] = {a or b for a, b in labels}
        last = last_named.search(sentence)
        if last and not names:
            return str(last[1])
        if len(names) == 1:
            return names.pop()
        if len(names) > 1:
            return None
        value = _option_in(reading, normalise(sentence))
        if value and dict(reading.options)[value].strip().isdigit() and not (CUE.match(sentence) or short):
            continue  # a number on the way to the answer
        if value == NONE and (beside := _BESIDE.search(sentence)):
            value = _option_in(reading, normalise(sentence[: beside.start()]))
        if value == NONE and (but := _BUT.search(sentence)) and not _ALSO.search(sentence, but.end()):
            value = _option_in(reading, normalise(sentence[but.end() :]))
        if value:
            return value
    return None


def only_option(reading: Reading) -> str | None:
    """A short answer that contains the text of one option only: `print("desk drawer")`."""
    if len(reading.text) > 400 or reading.cut or lists_options(reading) or _SAID_WRONG.search(reading.text):
        return None
    words = normalise(reading.text)
    value = _option_in(reading, words)
    short = len(reading.text) <= 60
    if value and not short and (NOT_IN.search(reading.text) or len(dict(reading.options)[value]) < 6):
        return None  # it may be what is denied, or a figure on the way
    if value is None and 4 < len(words) <= 40:  # a part of it, as a surname
        part_of = [label for label, text in reading.options if words in text]
        value = part_of[0] if len(part_of) == 1 else None
    return value or None
