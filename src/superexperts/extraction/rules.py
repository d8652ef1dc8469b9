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
from superexperts.extraction.numbers import find_numbers
from superexperts.extraction.statements import LAST_STATEMENTS, NONE, TAIL, Choices, Kind, Reading, first_part
from superexperts.extraction.text import own_span, plain

__all__ = ["RULES", "Rule", "read"]


# ---- answers in a tag, a box or after ####, of every kind ----------------------------------------------------------


def _read_marked(reading: Reading, inside: str) -> str | None:
    """Reads the text inside a tag or box, which counts as a statement without "the answer is" in front."""
    inner = Reading(reading.kind, inside, reading.question, reading.choices)
    attempts: tuple[Callable[[], str | None], ...]
    if reading.kind == "number":
        attempts = (
            lambda: number.statement(inner),
            lambda: number.stated(inner, first_part(inside)),
            lambda: number.conclusion(inner),
        )
    elif reading.kind == "yesno":
        attempts = (
            lambda: yesno.first_word(inner),
            lambda: yesno.statement(inner),
            lambda: yesno.conclusion(inner),
        )
    else:
        attempts = (
            lambda: choice.statement(inner),
            lambda: choice.choice_in(inner, inside),
            lambda: choice.conclusion(inner),
        )
    return next((value for attempt in attempts if (value := attempt()) is not None), None)


def _tag(reading: Reading) -> str | None:
    """The last `<answer> B </answer>`; a missing end tag is fine."""
    if "<" not in reading.text:
        return None
    start = reading.text.rfind("<answer>")
    if start < 0:
        return None
    inside = reading.text[start + len("<answer>") :]
    end = inside.find("</answer>")
    inside = inside[: end if end >= 0 else len(inside)]
    if not inside.strip():
        return None
    value = _read_marked(reading, inside)
    return NONE if value is None else value


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


def _hashes(reading: Reading) -> str | None:
    """The text right after `####`, as in the solutions of GSM8K: `#### 34`. A heading of four marks has words there."""
    if "#" not in reading.text or "####" not in reading.text:
        return None
    for found in itertools.islice(_FOUR.finditer(reading.text), LAST_STATEMENTS):
        line = reading.text[found.end() : found.end() + TAIL].split("\n", 1)[0]
        if reading.kind == "number":
            first = next(find_numbers(line), None)
            value = first[2] if first and not re.search(r"\w", line[: first[0]]) else None
            value = expression_value(line) or value
        else:
            value = (
                yesno.yes_no_in(reading, line) if reading.kind == "yesno" else choice.label_at(reading, line.strip(), 0)
            )
        if value is not None:
            return value
    return None


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: its name as it appears in `how`, the kinds of answer that it reads, and the function that reads them."""

    name: str
    kinds: tuple[Kind, ...]
    read: Callable[[Reading], str | None]


RULES: Final = (
    Rule("answer-tag", ("choice", "yesno", "number"), _tag),  # <answer> B </answer>
    Rule("boxed", ("choice", "yesno", "number"), _boxed),  # \boxed{34}
    Rule("hashes", ("choice", "yesno", "number"), _hashes),  # #### 34
    Rule("statement", ("choice",), choice.statement),  # the answer is (B); đáp án đúng là B
    Rule("statement", ("yesno",), yesno.statement),  # so the answer is no
    Rule("statement", ("number",), number.statement),  # the answer is 34 apples
    Rule("first-label", ("choice",), choice.first_label),  # B; [B] because ...; D, garage.
    Rule("first-word", ("yesno",), yesno.first_word),  # Yes, because ...
    Rule("is-the-answer", ("choice",), choice.is_the_answer),  # option B is correct
    Rule("first-option", ("choice",), choice.first_option),  # desk drawer
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
    return parts.text if _WORD.search(parts.text) else parts.thoughts or parts.text


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
            return value or None, name
    return None, ""
