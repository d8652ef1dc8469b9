"""What is wrong with a text that is not valid YAML, in one line."""

from __future__ import annotations

import yaml
from yaml.reader import ReaderError

__all__ = ["yaml_error"]


def yaml_error(error: yaml.YAMLError, text: str) -> tuple[int | None, str]:
    """The line where YAML stopped reading `text`, if known, and what is wrong there in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "it cannot be read"
        return (mark.line + 1 if mark else None), problem
    if isinstance(error, ReaderError):
        return text.count("\n", 0, error.position) + 1, f"the character {chr(error.character)!r} is not allowed"
    return None, " ".join(str(error).split())
