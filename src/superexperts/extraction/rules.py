"""What an answer commits to, read by rules: one table, `RULES`, tried from top to bottom.

A rule returns a value (the label of a choice, "yes" / "no", a number); or `NONE` if the answer commits to nothing that
can be scored (several options, "none of the above", "it depends"), which ends the search; or None if it does not apply.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Final

from superexperts.core.thoughts import Parts, split_thoughts
from superexperts.extraction import choice, number, yesno
from superexperts.extraction.cued import lowered
from superexperts.extraction.expression import expression_value
from superexperts.extraction.listings import option_line
from superexperts.extraction.locales import english_numbers
from superexperts.extraction.numbers import find_numbers
from superexperts.extraction.statements import (
    LAST_STATEMENTS,
    NONE,
    RETRACTED,
    RETRACTING,
    TAIL,
    Choices,
    Kind,
    Reading,
    first_part,
)
from superexperts.extraction.structured import json_values, marked_option, tagged
from superexperts.extraction.text import own_span, plain

__all__ = ["RULES", "Rule", "read"]


# ---- answers in a tag, a box or after ####, of every kind ----------------------------------------------------------


def _read_marked(reading: Reading, inside: str) -> str | None:
    """Reads the text inside a tag or box, which counts as a statement without "the answer is" in front.

    Of several sentences a statement or the last one counts, not the first.
    """
    inner = Reading(reading.kind, inside.strip(), reading.question, reading.choices)
    single = len(first_part(inside)) > 0.8 * len(inner.text)
    attempts: tuple[Callable[[], str | None], ...]
    if reading.kind == "number":
        whole = (lambda: number.stated(inner, first_part(inside)),)
        attempts = (
            lambda: number.statement(inner),
            *(whole if single else ()),
            lambda: number.conclusion(inner),
            *whole,
        )
    elif reading.kind == "yesno":
        attempts = (
            lambda: yesno.first_word(inner),
            lambda: yesno.statement(inner),
            lambda: yesno.conclusion(inner),
        )
    else:
        named = (lambda: choice.choice_in(inner, inside),)
        attempts = (
            lambda: choice.statement(inner),
            *(named if single else (lambda: choice.first_label(inner),)),
            lambda: choice.conclusion(inner),
            *named,
        )
    return next((value for attempt in attempts if (value := attempt()) is not None), None)


def _tag(reading: Reading) -> str | None:
    """The last `<answer> B </answer>`, `<final_answer>`, `[ANSWER]`; a missing end tag is fine."""
    for inside in tagged(reading.text):
        value = _boxed(Reading(reading.kind, inside, reading.question, reading.choices))
        value = _read_json(reading, inside) if value is None else value
        value = _read_marked(reading, inside) if value is None else value
        return NONE if value is None else value
    return None


def _json(reading: Reading) -> str | None:
    """The key for the answer in JSON or in a tool call: {"reasoning": ..., "answer": "C"}."""
    if reading.text[-1:] not in _JSON_ENDS and "answer" not in reading.text and reading.text[:1] not in "{`<":
        return None
    return _read_json(reading, reading.text)


_JSON_ENDS: Final = frozenset("}`]>)")


def _read_json(reading: Reading, text: str) -> str | None:
    values = json_values(text)
    if values is None:
        return None
    value = next(values, None)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, int | float):
        value = repr(value)
    if not isinstance(value, str) or not value.strip():
        return NONE
    found = _read_marked(reading, value)
    return NONE if found is None else found


def _boxed(reading: Reading) -> str | None:
    """The last `\\boxed{34}`; braces inside it are counted, since it may hold `\\frac{1}{2}`."""
    if "{" not in reading.text:
        return None
    start = max(reading.text.rfind(r"\boxed{"), reading.text.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = reading.text.index("{", start) + 1
    depth, end = 1, min(len(reading.text), begin + TAIL)
    for place in range(begin, end):
        depth += {"{": 1, "}": -1}.get(reading.text[place], 0)
        if depth == 0:
            end = place
            break
    return _read_marked(reading, reading.text[begin:end])


_FOUR = re.compile(r"#{4}(?!#)")
# The form is talked about, not used: "write #### 5", "the line '#### 5' in the example".
_TALKED_ABOUT = re.compile(
    r"(?:['\"`‘“]|\b(?:format|form|line|like|with|write|use|put|says?|as|or|is|be|than|example|after)):?\s?\Z",
    re.IGNORECASE,
)


def _hashes(reading: Reading) -> str | None:
    """The text right after `####`, as in the solutions of GSM8K: `#### 34`. A heading of four marks has words there.

    The first one counts, since base models go on, unless the text takes it back before the next.
    """
    if "#" not in reading.text or "####" not in reading.text:
        return None
    taken, end = None, 0
    for found in itertools.islice(_FOUR.finditer(reading.text), LAST_STATEMENTS):
        if taken is not None and not RETRACTED.search(reading.text, end, found.start()):
            break
        value = _after_hashes(reading, found)
        if value is not None:
            taken, end = value, found.end()
    if taken and reading.cut and (RETRACTED.search(reading.text, end) or "?" in reading.text[end:]):
        return NONE
    return taken


def _after_hashes(reading: Reading, found: re.Match[str]) -> str | None:
    line = reading.text[found.end() : found.end() + TAIL].split("\n", 1)[0]
    if _TALKED_ABOUT.search(reading.text[max(0, found.start() - 12) : found.start()]) or line.endswith("?"):
        return None
    if reading.kind == "number":
        first = next(find_numbers(line), None)
        value = first[2] if first and not re.search(r"\w", line[: first[0]]) else None
        return expression_value(line) or value
    if reading.kind == "yesno":
        return yesno.yes_no_in(reading, line)
    return choice.label_at(reading, line.strip(), 0)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: its name as it appears in `how`, the kinds of answer that it reads, and the function that reads them."""

    name: str
    kinds: tuple[Kind, ...]
    read: Callable[[Reading], str | None]


RULES: Final = (
    Rule("answer-tag", ("choice", "yesno", "number"), _tag),  # <answer> B </answer>
    Rule("json", ("choice", "yesno", "number"), _json),  # {"answer": "B"}
    Rule("boxed", ("choice", "yesno", "number"), _boxed),  # \boxed{34}
    Rule("hashes", ("choice", "yesno", "number"), _hashes),  # #### 34
    Rule("statement", ("choice",), choice.statement),  # the answer is (B); đáp án đúng là B
    Rule("statement", ("yesno",), yesno.statement),  # so the answer is no
    Rule("statement", ("number",), number.statement),  # the answer is 34 apples
    Rule("verdicts", ("choice",), marked_option),  # A: wrong, B: correct
    Rule("first-label", ("choice",), choice.first_label),  # B; [B] because ...; D, garage.
    Rule("first-word", ("yesno",), yesno.first_word),  # Yes, because ...
    Rule("is-the-answer", ("choice",), choice.is_the_answer),  # option B is correct
    Rule("first-option", ("choice",), choice.first_option),  # desk drawer
    Rule("option-line", ("choice",), option_line),  # The diagnosis is:\n\nB. gout\n\nReasons: ...
    Rule("conclusion", ("choice",), choice.conclusion),  # ... is a rabbit reservoir (B).
    Rule("conclusion", ("yesno",), yesno.conclusion),  # So, no, she was not.
    Rule("conclusion", ("number",), number.conclusion),  # She has 34 apples.
    Rule("only-option", ("choice",), choice.only_option),  # print("desk drawer")
)
"""Tried from top to bottom; the first that applies decides."""

_WORD: Final = re.compile(r"\w")
_BY_KIND: Final = {
    kind: tuple((rule.name, rule.read) for rule in RULES if kind in rule.kinds)
    for kind in ("choice", "yesno", "number")
}


def said(parts: Parts) -> str:
    """What is read of a response: what it says outside its thoughts.

    Where it ended its thoughts and then said nothing, it is the thoughts: some templates leave the answer there.
    """
    if not parts.finished:
        return ""
    return parts.thoughts if parts.thoughts and not _WORD.search(parts.text) else parts.text


def read(kind: Kind, response: str, question: str, choices: Choices) -> tuple[str | None, str]:
    """(value, name of the rule that decided) of a response.

    The value is None if that rule found that the response commits to nothing. (None, "") if no rule applied.
    """
    return read_parts(kind, split_thoughts(response), question, choices)


def read_parts(kind: Kind, parts: Parts, question: str, choices: Choices) -> tuple[str | None, str]:
    """As `read`, for a response without its thoughts."""
    found = _read_text(kind, said(parts), question, choices)
    if not found[1] and parts.thoughts and parts.finished and len(parts.text.split()) < FEW_WORDS:
        return _read_text(kind, parts.thoughts, question, choices)
    return found


FEW_WORDS: Final = 3
"""A text with fewer than these carries no content: "Done.", "Final answer:"."""


def _read_text(kind: Kind, said: str, question: str, choices: Choices) -> tuple[str | None, str]:
    text = plain(said)
    if kind == "number":
        text = english_numbers(text, question)
    lower = lowered(text)
    start, end = own_span(text, lower, question, choices)
    reading = Reading(kind, text[start:end], question, choices)
    if lower is not None:
        vars(reading)["lower"] = lower[start:end]
    if text[end:].strip():  # it went on to another turn, so it had come to an end
        vars(reading)["cut"] = False
    return _read(reading)


def _read(reading: Reading) -> tuple[str | None, str]:
    for name, rule in _BY_KIND[reading.kind]:
        value = rule(reading)
        if value is not None:
            return (None if value and _takes_back(reading) else value or None), name
    return None, ""


def _takes_back(reading: Reading) -> bool:
    """Whether a text that breaks off was about to take back what it had said: "The answer is 12, wait, no, let me"."""
    text = reading.text
    if len(text) < _SHORT or text.rstrip()[-1:] in _STOPS:  # as most
        return False
    tail = text[-_DOUBT:].lower()
    for word in RETRACTING:
        if word in tail:
            return RETRACTED.search(tail) is not None and reading.cut
    return False


_STOPS: Final = frozenset(".!?)}*>`")
_SHORT: Final = 20
_DOUBT: Final = 160  # last characters
