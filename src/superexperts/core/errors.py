"""What can go wrong, as a tree.

SuperExpertsError           anything that this package raises on purpose
├── UserError               the input is wrong; exit code 2
│   ├── OptionError         the value of a setting is out of range, or does not fit the other settings
│   ├── ModelError          the model does not exist, or has no experts
│   ├── ExpertsError        an expert does not exist, or an expert set cannot be read
│   ├── DataError           rows, corpora and benchmark files
│   ├── OutputError         a folder cannot be written
│   └── HubError            the Hub refuses the request, or cannot be reached
└── EffectError             the work was done and had no effect (an adapter that changes no logit); exit code 1

An error knows the *field* that it is about, such as `seq_len`, and never how that field was given. Each front end
spells fields its own way: `--seq-len` on the command line, `line 4: seq_len` for a study file, `seq_len` in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

__all__ = [
    "DataError",
    "EffectError",
    "ExpertsError",
    "Field",
    "HubError",
    "ModelError",
    "OptionError",
    "OutputError",
    "SuperExpertsError",
    "UserError",
]


class Field(str):
    """The name of a setting inside a message, which each front end spells its own way."""

    __slots__ = ()


class SuperExpertsError(Exception):
    """Anything that this package raises on purpose.

    The message is given in parts, so that settings can be mentioned in it:
    `DataError("no rows; raise ", Field("tokens"), field="corpus")`. `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, *parts: str, field: str | None = None) -> None:
        super().__init__(*parts)
        self.parts = parts
        self.field = field

    def message(self, spell: Callable[[str], str] = str) -> str:
        """The message without the field that it is about; `spell` turns the name of a setting into what users type."""
        return "".join(spell(str(part)) if isinstance(part, Field) else part for part in self.parts)

    def line(self, spell: Callable[[str], str] = str) -> str:
        """One line: the field, spelled by `spell`, and the message."""
        return f"{spell(self.field)}: {self.message(spell)}" if self.field else self.message(spell)

    def about(self, field: str | None) -> Self:
        """The same error about another field, for a caller that has another name for it."""
        return type(self)(*self.parts, field=field)

    def __str__(self) -> str:
        return self.line()


class UserError(SuperExpertsError):
    """The input is wrong; the message is one line that names the value and says what to do."""

    exit_code = 2


class OptionError(UserError):
    """The value of a setting is out of range, or does not fit the other settings."""


class ModelError(UserError):
    """The model does not exist, or has no experts that can be worked with."""


class ExpertsError(UserError):
    """An expert does not exist in the model, or an expert set cannot be read."""


class DataError(UserError):
    """A data file, a row of it, a corpus or a benchmark cannot be used."""


class OutputError(UserError):
    """A folder cannot be written, or holds something that would be lost."""


class HubError(UserError):
    """The Hub refuses what is pushed to it, or cannot be reached."""


class EffectError(SuperExpertsError):
    """The work was done and had no effect, such as an adapter that changes no logit."""
