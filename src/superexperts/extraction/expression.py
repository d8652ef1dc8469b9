"""The value of an expression that stands where an answer is marked: LaTeX, or arithmetic that nobody carried out.

math-verify parses it, with its LaTeX grammar only (its other one evaluates text as Python). It is loaded where an
expression stands, takes milliseconds, and gets no text that could keep it busy: a short one, of numbers and a few
commands, with small powers. So no timer is needed, which it would set with signals.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any

__all__ = ["LONGEST", "expression_value"]

LONGEST = 160
"""Characters of an expression."""
_DEEPEST = 6  # brackets in one another
_LARGEST_POWER = 100  # all exponents multiplied
_DIGITS = 15  # of a value that is no fraction

# What a plain number does not hold: a command that computes, a power, a product or a sum. A difference may be a range.
_SIGN = re.compile(r"\\(?:[dtc]?frac|sqrt|cdot|times|div|pi)|\^|\d\s*[*×·÷+]\s*[\d(\\$]|\d\sx\s\d|\)\s*[*×·÷+/]")
_SIGNS = ("\\", "^", "*", "×", "·", "÷", "+", " x ")
_PLAIN_NUMBER = re.compile(
    r"-?(?:\d+\s?)?(?:\\[dt]?frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:/\d+)?)"
    r"|-?\d[\d.]*\s?(?:\\times|\\cdot)\s*10\s?\^\s?\{?-?\d{1,2}\}?"
)
"""What `find_numbers` reads as one number."""
_WRAPPING = re.compile(
    r"\\(?:left|right|displaystyle|[,!;:() ])|\\[\[\]]|~|\$|(?<=\d)\{,\}(?=\d{3})|\\(?:text|mathrm|mbox|textbf)\{[^{}]{0,40}\}"
    r"|\^(?:\\circ|\{\\circ\})|\\?%|\s*\.\s*$"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TIMES = re.compile(r"(?<=\d)\sx\s(?=\d)")
_SAME = str.maketrans({"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "−": "-", "–": "-", "*": r"\cdot "})
_ALLOWED = re.compile(r"(?:\d{1,15}(?:\.\d{1,15})?|\.\d{1,15}|\\(?:[dtc]?frac|sqrt|cdot|times|div|pi)(?![a-z])|[-+/^(){}\[\]\s])+")
_EXPONENT = re.compile(r"\^\s?(?:\{\s?-?(\d{1,3})\s?\}|\(\s?-?(\d{1,3})\s?\)|(\d)|\{\s?-?(?:\\[dt]?frac\{\d\}\{\d\}|\d/\d)\s?\})")
_TOWER = re.compile(r"\^\s?(?:\d|[{(][^{}()]*[})])\s*\^")
_LOCK = threading.Lock()  # the parser keeps what it learns of its grammar in one place


def expression_value(text: str) -> str | None:
    """The value of a text that is one expression of numbers: whole, a fraction, or a decimal where it is neither.

    None where it is one plain number, or has no one real value. Of an equation the last side is the expression.
    """
    if not any(sign in text for sign in _SIGNS):  # most
        return None
    latex = text.rpartition("=")[2]
    if len(latex) > 2 * LONGEST or not _SIGN.search(latex):
        return None
    latex = _bare(latex)
    if _PLAIN_NUMBER.fullmatch(latex) or not _harmless(latex):
        return None
    return _value(latex)


def _bare(text: str) -> str:
    """The text without what only sets it, units and marks of thousands."""
    return _THOUSANDS.sub("", _TIMES.sub("×", _WRAPPING.sub(" ", text))).translate(_SAME).strip()


def _harmless(latex: str) -> bool:
    """Whether a text is a short expression of numbers whose value is not large."""
    if not 0 < len(latex) <= LONGEST or not _ALLOWED.fullmatch(latex) or not re.search(r"\d", latex):
        return False
    depth = deepest = 0
    for character in latex:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
        if depth < 0:
            return False
    powers = [int(next(filter(None, found.groups()), 1)) for found in _EXPONENT.finditer(latex)]
    small = len(powers) == latex.count("^") and math.prod(max(power, 1) for power in powers) <= _LARGEST_POWER
    return depth == 0 and deepest <= _DEEPEST and small and not _TOWER.search(latex)


@functools.cache
def _parser() -> Any:
    """math-verify's function from LaTeX to sympy expressions."""
    from math_verify import LatexExtractionConfig, parse

    # It warns that nothing stops it; `_harmless` does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig()]
    return functools.partial(parse, extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)


def _value(latex: str) -> str | None:
    with _LOCK:
        try:
            parsed = _parser()(f"${latex}$")
            value = parsed[0].doit() if parsed else None
            if value is None or value.is_real is not True or value.is_finite is not True:
                return None
            return _written(value, latex)
        except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
            return None  # a table, a set, an equation, or what sympy has no value for


def _written(value: Any, latex: str) -> str | None:
    if "." in latex and value.is_rational is not True:  # a decimal became a float: it is short, and meant exactly
        value = Decimal(str(value.evalf(_DIGITS))).normalize()
        text = format(value, "f")
    elif value.is_Rational:
        exact = Fraction(int(value.p), int(value.q))
        text = str(exact)
    else:
        text = format(Decimal(str(value.evalf(_DIGITS))), "f")
    return text if len(text) <= 400 else None
