"""Reading what a free-text answer commits to; the table of rules is in `rules`."""

from superexperts.extraction.expression import exact_value, expression_value
from superexperts.extraction.numbers import find_numbers, number_value
from superexperts.extraction.rules import RULES, Rule, read, read_parts, said
from superexperts.extraction.text import normalise, plain

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
    "read_parts",
    "said",
]
