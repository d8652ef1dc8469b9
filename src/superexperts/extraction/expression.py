"""The value of an expression that is given as the answer: LaTeX, or arithmetic without a result.

math-verify parses it, with its LaTeX grammar only (its other one evaluates text as Python). It is loaded where an
expression stands, takes milliseconds, and gets no text that could keep it busy: a short one, of numbers and a few
commands, with small powers. So no timer is needed, which it would set with signals.
"""

from __future__ import annotations

import decimal
import functools
import logging
import math
import operator
import re
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any

from superexperts.extraction.numbers import find_numbers, number_value

__all__ = ["LONGEST", "exact_value", "expression_value"]

LONGEST = 100
"""Characters of an expression."""
_DEEPEST = 6  # brackets in one another
_LARGEST_POWER = 100  # all exponents multiplied
_PI = Decimal("3.14159265358979323846264338328")
_DIGITS = 15  # of a value that is not a fraction

# What a plain number does not hold: a command that computes, a power, a product or a sum. A difference may be a range.
_SIGN = re.compile(r"\\(?:[dtc]?frac|sqrt|cdot|times|div|pi)|\^|\d\s*[*×·÷+]\s*[\d(\\$]|\d\sx\s\d|\)\s*[*×·÷+/]")
_SIGNS = ("\\", "^", "*", "×", "·", "÷", "+", " x ")
_PLAIN_NUMBER = re.compile(
    r"-?(?:\d+\s?)?(?:\\[dt]?frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:/\d+)?)"
    r"|-?\d[\d.]*\s?(?:\\times|\\cdot)\s*10\s?\^\s?\{?-?\d{1,2}\}?"
)
"""What `find_numbers` reads as one number."""
_WRAPPING = re.compile(
    r"\\(?:left|right|displaystyle|[,!;:() ])|\\[\[\]]|~|\$|(?<=\d)\{,\}(?=\d{3})"
    r"|\\(?:text|mathrm|mbox|textbf)\{[^{}]{0,40}\}(?:\^\d|\^\{\d\})?|\^(?:\\circ|\{\\circ\})|\\?%|\s*\.\s*$"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TIMES = re.compile(r"(?<=\d)\sx\s(?=\d)")
_SAME = str.maketrans({"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "−": "-", "–": "-", "*": r"\cdot "})
_ALLOWED = re.compile(
    r"(?:\d{1,15}(?:\.\d{1,15})?|\.\d{1,15}|\\(?:[dtc]?frac|sqrt|cdot|times|div|pi)(?![a-z])|[-+/^(){}\[\]\s])+"
)
_EXPONENT = re.compile(
    r"\^\s?(?:\{\s?-?(\d{1,3})\s?\}|\(\s?-?(\d{1,3})\s?\)|(\d)|\{\s?-?(?:\\[dt]?frac\{\d\}\{\d\}|\d/\d)\s?\})"
)
_TOWER = re.compile(r"\^\s?(?:\d|[{(][^{}()]*[})])\s*\^")
_LOCK = threading.Lock()  # the parser keeps what it learns of its grammar in one place


def expression_value(text: str) -> str | None:
    """The value of a text that is one expression of numbers: whole, a fraction, or a decimal where it is neither.

    None where it is one plain number, or has no one real value. Of an equation the last side is the expression.
    """
    for sign in _SIGNS:
        if sign in text:
            break
    else:  # as in most
        return None
    latex = text.rpartition("=")[2]
    if len(latex) > 2 * LONGEST or not _SIGN.search(latex):
        return None
    latex = _bare(latex)
    if _PLAIN_NUMBER.fullmatch(latex) or not _harmless(latex):
        return None
    return _value(latex)


def exact_value(text: str) -> Fraction | int | None:
    """The value of a text that is one number, in figures or LaTeX, or an expression; None for anything else."""
    plain = number_value(text)
    if plain is not None or not any(map(str.isdigit, text)):
        return plain
    bare = text.strip(" $")
    found = list(find_numbers(bare)) if _PLAIN_NUMBER.fullmatch(bare) else []
    return number_value(found[0][2] if len(found) == 1 else expression_value(text) or "")


def _bare(text: str) -> str:
    """The text without what only sets it, units and marks of thousands."""
    return _THOUSANDS.sub("", _TIMES.sub("×", _WRAPPING.sub(" ", text))).translate(_SAME).strip()


def _harmless(latex: str) -> bool:
    """Whether a text is a short expression of numbers with a value that is not large."""
    if not 0 < len(latex) <= LONGEST or not _ALLOWED.fullmatch(latex) or not re.search(r"\d|\\pi", latex):
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
    with _LOCK, decimal.localcontext(decimal.Context(prec=30)) as context:
        try:
            parsed = _parser()(f"${latex}$")
            value = _evaluated(parsed[0]) if parsed else None
            if value is None:
                return None
            if isinstance(value, Decimal):
                context.prec = _DIGITS
                text = format(+value, "f")
            else:
                text = _short(value) if "." in latex else str(value)
        except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
            return None  # a table, a set, an equation, or what has no value
    return text if len(text) <= 400 else None


def _short(value: Fraction) -> str:
    """A decimal where that is exact, else the fraction."""
    exact = Decimal(value.numerator) / value.denominator
    return format(exact, "f") if Fraction(exact) == value else str(value)


def _evaluated(node: Any) -> Fraction | Decimal:
    """The value of a tree that sympy has not evaluated, exact where no root or pi is in it.

    sympy's own evaluation looks for simple forms first, which took minutes for some expressions of 100 characters.
    """
    if node.is_Rational:
        return Fraction(int(node.p), int(node.q))
    if node.is_Float:
        return Fraction(str(node))
    if node.is_Pow:
        return _power(_evaluated(node.base), _evaluated(node.exp))
    if node.is_Add or node.is_Mul:
        values = [_evaluated(part) for part in node.args]
        if any(isinstance(value, Decimal) for value in values):
            values = [_decimal(value) for value in values]
        return functools.reduce(operator.add if node.is_Add else operator.mul, values)
    if str(node) == "pi":
        return _PI
    raise TypeError(f"{node} is not arithmetic")


def _decimal(value: Fraction | Decimal) -> Decimal:
    return value if isinstance(value, Decimal) else Decimal(value.numerator) / value.denominator


def _power(base: Fraction | Decimal, power: Fraction | Decimal) -> Fraction | Decimal:
    if not isinstance(power, Fraction) or max(abs(power.numerator), power.denominator) > _LARGEST_POWER:
        raise ValueError("no small power")
    if power.denominator == 1:
        return base**power.numerator
    if base < 0:
        raise ValueError("no real root")
    root = _decimal(base) ** (1 / Decimal(power.denominator))
    if isinstance(base, Fraction):
        exact = Fraction(
            _nearest(base.numerator, power.denominator), _nearest(base.denominator, power.denominator) or 1
        )
        if exact**power.denominator == base:
            return exact**power.numerator
    return root**power.numerator


def _nearest(value: int, degree: int) -> int:
    """The whole number next to a root, if the number is no longer than the digits that are computed with."""
    return int((Decimal(value) ** (1 / Decimal(degree))).to_integral_value())
