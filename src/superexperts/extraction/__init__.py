"""Reading what a free-text answer commits to; the table of rules is in `rules`."""

from .rules import RULES, Rule, read
from .text import number_value

__all__ = ["RULES", "Rule", "number_value", "read"]
