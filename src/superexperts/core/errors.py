"""What can go wrong, as a tree.

SuperExpertsError           anything this package raises on purpose
├── UserError               the input is wrong: one line naming what, its value and the mend; exit code 2
│   ├── OptionError         an option's value
│   ├── ModelError          no such model, or a model without experts
│   ├── ExpertsError        an expert that does not exist, an expert set that cannot be read
│   ├── DataError           rows, corpora, benchmark files
│   ├── OutputError         a folder that cannot be written
│   └── HubError            the Hub refuses, or cannot be reached
└── EffectError             the work was done and had no effect (an adapter that changes no logit); exit code 1
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "EffectError",
    "ExpertsError",
    "HubError",
    "ModelError",
    "OptionError",
    "OutputError",
    "SuperExpertsError",
    "UserError",
]


class SuperExpertsError(Exception):
    """Anything this package raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(SuperExpertsError, ValueError):
    """The input is wrong; the message is one line that names what, its value and the mend."""

    exit_code = 2


class OptionError(UserError):
    """An option's value is out of range or does not fit the others."""


class ModelError(UserError):
    """There is no such model, or it has no experts that can be worked with."""


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
