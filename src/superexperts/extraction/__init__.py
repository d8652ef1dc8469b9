"""Reading what a free-text answer commits to; the table of rules is in `rules`."""

from .expression import exact_value, expression_value
from .quantity import find_numbers, number_value
from .rules import RULES, Rule, read
from .text import normalise, plain

__all__ = [
    "RULES",
    "Rule",
    "exact_value",
    "expression_value",
    "find_numbers",
    "normalise",
    "number_value",
    "plain",
    "read",
]
