"""Whether an answer breaks off: at the limit of tokens, in the middle of a sentence, a step, a formula or a list.

A text that breaks off has not come to its conclusion. What it says on the way is working, and commits to nothing unless
it states an answer in so many words.
"""

from __future__ import annotations

import re

from superexperts.extraction.text import normalise, sentences

__all__ = ["breaks_off", "breaks_off_in", "open_markup"]

_LAST = 3000  # characters that are looked at

_LEADS_ON = frozenset(",，、:：;=+×÷·(–—\\{<&[/≈~")
_SMALL_WORDS = frozenset(
    re.split(
        " ",
        "and or of in to for from with by at on the a an plus minus per is are but about if because since as that "
        "which than into we he she they it you his her their its our this these those be was were has have had not "
        "then next finally now so thus therefore hence first second third also wait when where while let including "
        "using would và hoặc của là thì sau tiếp cuối vậy vì nên mà với trong để cho được các một những do khi nếu",
    )
)
"""A text that ends with one of these goes on."""
_BARE_STEP = re.compile(
    r"[\s>*#\-•]{0,8}(?:(?:step|bước|schritt|étape|paso|part|case|phần|第)\s?\d{0,3}\b[^\d=]{0,60}|[#>•*\-]+|\d{1,2}[.)]?)",
    re.IGNORECASE,
)
"""A last line that only announces what was to come: "**Step 2: Calculate", "-", "4."."""
_ITEM = re.compile(r"[\s>]{0,8}(?:\d{1,2}[.)]|[-*•]|\([a-z]\)|[a-z]\))\s")
_ENVIRONMENT = re.compile(r"\\(begin|end)\{")
_OPEN_CODE = re.compile(r"```[a-z]{1,12}\n(?:(?!```).)*\Z", re.DOTALL)
_MATH = re.compile(r"(?<!\\)\$")
_OPERATOR = re.compile(r"[\s:=(][*/$€£-]\Z")
_LONG_PHRASE = 100  # characters of one sentence without a stop


def breaks_off(text: str, question: str = "") -> bool:
    """Whether a text ends before it has come to an end. A single short phrase without a stop is complete."""
    tail = text[-_LAST:].rstrip()
    if not tail:
        return False
    line = tail.rpartition("\n")[2].strip()
    last = tail[-1]
    if last.isalnum() or last in _LEADS_ON:
        if last in _LEADS_ON or (" " in tail and _word(line) in _SMALL_WORDS):
            return True
    elif last in "*-#>•" and line.strip("*-#>• ") == "" and line not in ("---", "***", "```", "**"):
        return "\n" in tail  # a bullet without its item
    elif _OPERATOR.search(tail):
        return True
    if open_markup(tail, line):
        return True
    if "\n" in tail and (_BARE_STEP.fullmatch(line) and not _is_value(line, tail)):
        return True
    return (last.isalnum() or last in "%°") and _unfinished_sentence(tail, line, question)


def breaks_off_in(words: str, question: str, text: str) -> bool:
    """Whether the last words of a text break off within a word, or after one such as "of" that cannot be the last."""
    return _word(words) in _SMALL_WORDS or _is_fragment(words, question, text)


def _word(line: str) -> str:
    return line.rpartition(" ")[2].strip("*_\"'").lower()


def open_markup(tail: str, line: str) -> bool:
    """Whether a formula, an environment or a bracket in the last line is open."""
    if "\\" in tail:
        if tail.rfind("\\[") > tail.rfind("\\]") or tail.rfind("\\(") > tail.rfind("\\)"):
            return True
        sides = _ENVIRONMENT.findall(tail)
        if sides.count("begin") > sides.count("end"):
            return True
    if "```" in tail and _OPEN_CODE.search(tail):
        return True
    if "$$" in tail and tail.count("$$") % 2:
        return True
    if "\\" in line and "$" in line and len(_MATH.findall(line)) % 2:
        return True
    if line.count("**") % 2 and not line.endswith("**"):
        return True
    return "(" in line and line.count("(") > line.count(")") and ")" not in line[line.rfind("(") :]


def _is_value(line: str, tail: str) -> bool:
    """Whether a last line of digits is an answer, not the number of the next item of a list."""
    number = line.strip("*#>•- .)")
    if not number.isdigit():
        return False
    return not re.search(rf"(?:^|\n)[\s>*#]{{0,8}}{int(number) - 1}[.)]", tail)


def _unfinished_sentence(tail: str, line: str, question: str) -> bool:
    """Whether the last sentence, which has no stop, is one among others that have: then it is cut."""
    found = sentences(tail)
    if _is_fragment(found[-1], question, tail):
        return True
    stopped = [sentence[-1] in ".!?。！？" for sentence in found[:-1]]
    if not any(stopped):
        return len(found[-1]) > _LONG_PHRASE and "=" not in found[-1]
    own_line = found[-1] == line
    if not own_line:
        return True
    if _ITEM.match(line):
        return stopped[-1]  # items of a list end alike
    blank_before = tail[: -len(line)].endswith("\n\n") if tail.endswith(line) else False
    return len(line) > 40 and not blank_before


def _is_fragment(sentence: str, question: str, tail: str) -> bool:
    """Whether the last word is only the beginning of a word in the question or the answer: "appl" of "apples"."""
    word = sentence.rpartition(" ")[2].lower()
    if " " not in sentence or not word.isalpha():
        return False
    asked, text = question[-_LAST:], tail.rpartition(" ")[0]
    raw = f"{asked} {text} ".lower()
    if f" {word} " in raw or word not in raw:  # most
        return False
    said = f" {normalise(asked)}{normalise(text)}"
    beginning = " " + word.replace("y", "i")
    return beginning in said and f"{beginning} " not in said
