"""Turns command-line arguments into the settings of a command; anything wrong becomes an `OptionError`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro import _errors as refusals  # the only way to learn what was wrong without parsing the box that tyro prints

from superexperts.core.errors import Field, OptionError
from superexperts.core.settings import plain_number

__all__ = ["joined", "read_arguments", "speller"]

EXPERTS = re.compile(r"(L\d+(E\d+|shared)(=[\d.]+)?[,;]?)+", re.IGNORECASE)
"""Experts, with their ranks or alphas; several in a row are one value, since nothing else that a command takes looks
like them."""

Settings = TypeVar("Settings")

NUMBERS = {int: "a whole number; give one like 4096 or 4k", float: "a number; give one like 0.5"}


def speller(kind: type) -> Callable[[str], str]:
    """How the command line spells the settings of a command: `seq_len` as `--seq-len`, a positional as its metavar.

    A name that is not a setting of the command is returned unchanged.
    """
    names = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        # Only positionals are declared with a metavar.
        metavars = [mark.metavar for mark in getattr(hint, "__metadata__", ()) if getattr(mark, "metavar", None)]
        option = name.replace("_", "-")
        names[name] = metavars[0] if metavars else f"--{option}"
        names[f"no_{name}"] = f"--no-{option}"  # how a switch that is on by default is turned off
    return lambda name: names.get(name, name)


def read_arguments(
    kind: type[Settings], prog: str, arguments: Sequence[str], default: Settings | None = None
) -> Settings:
    """The settings that `arguments` give; `OptionError` names the first argument that is wrong.

    `default` holds the values of options that are not given; `--help` prints the help and raises `SystemExit`.
    """

    def refuse(event: refusals.ParseErrorEvent) -> None:
        raise _refusal(event, kind, prog, arguments)

    for name in get_type_hints(kind):
        if {speller(kind)(name), speller(kind)(f"no_{name}")} <= {*arguments}:
            raise OptionError("excludes ", Field(f"no_{name}"), "; give one of the two", field=name)
    arguments = _plain_numbers(kind, joined(arguments, lambda word: EXPERTS.fullmatch(word) is not None))
    with refusals.on_parse_error(refuse):
        _without_none(kind)
        plain = (tyro.conf.DisallowNone,)  # an option whose default is None is left out; the word None is a value
        if default is None:
            return tyro.cli(kind, prog=prog, args=list(arguments), config=plain)
        return tyro.cli(kind, prog=prog, args=list(arguments), default=default, config=plain)


def _without_none(kind: Any) -> None:
    """Keeps "(default: None)" and a switch's "(default: False)" out of the help of a command."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        done = not isinstance(kind.__annotations__.get(name, ""), str)  # by an earlier call
        if not done and any(defaults.get(name, ...) is nothing for nothing in (None, False)):
            kind.__annotations__[name] = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]


def joined(words: Sequence[str], is_item: Callable[[str], bool]) -> list[str]:
    """The words, with a comma between items that follow each other: `--tasks mmlu gsm8k` -> `--tasks mmlu,gsm8k`."""
    found: list[str] = []
    before = False
    for word in words:
        if (now := is_item(word)) and before:
            found[-1] = f"{found[-1].rstrip(',')},{word}"
        else:
            found.append(word)
        before = now
    return found


def _plain_numbers(kind: type, words: Sequence[str]) -> list[str]:
    """The words, with `10k` and `1M` written out where an option takes a whole number."""
    spell = speller(kind)
    whole = {spell(name) for name, hint in get_type_hints(kind).items() if int in (hint, *get_args(hint))}
    found = list(words)
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in whole and equals:
            found[i] = f"{option}={plain_number(value)}"
        elif word in whole and i + 1 < len(words):
            found[i + 1] = plain_number(words[i + 1])
    return found


def _refusal(event: refusals.ParseErrorEvent, kind: type, prog: str, arguments: Sequence[str]) -> OptionError:
    see = f"see {prog} --help"
    if isinstance(event, refusals.UnrecognizedArgs):
        return OptionError(_unknown(event.tokens, kind) + see)
    if isinstance(event, refusals.MissingArgs) and event.unrecognized_tokens:
        return OptionError(_unknown([str(token) for token in event.unrecognized_tokens], kind) + see)
    if isinstance(event, refusals.MissingArgs):
        names = ", ".join(speller(kind)(missing.arg.field.intern_name) for missing in event.missing_arguments)
        return OptionError(f"{names}: missing; {see}")
    if isinstance(event, refusals.InvalidChoice):
        field = event.argument.field.intern_name
        # As declared: tyro gives the choices of an option that may be left out in any order, and None among them.
        kind_of_field = get_type_hints(kind)[field]
        literals = [hint for hint in (kind_of_field, *get_args(kind_of_field)) if get_origin(hint) is Literal]
        choices = [str(choice) for literal in literals for choice in get_args(literal)] or event.choices
        return OptionError(f"{event.value!r} is unknown; choose from {', '.join(choices)}", field=field)
    if isinstance(event, refusals.BadValue):
        return OptionError(f"needs a value; {see}", field=event.argument.field.intern_name)
    if isinstance(event, refusals.InstantiationFailure) and event.argument is not None:
        hint = get_type_hints(kind).get(event.argument.field.intern_name)
        types = [each for each in (hint, *get_args(hint)) if each is not NoneType]
        expected = next((NUMBERS[hint] for hint in types if hint in NUMBERS), None)
        if expected is not None:
            value = _value_of(event.argument.display_name(), arguments)
            return OptionError(f"{value!r} is not {expected}", field=event.argument.field.intern_name)
    message = getattr(event, "message", type(event).__name__)
    return OptionError(f"{' '.join(message.split())}; {see}")


def _unknown(tokens: Sequence[str], kind: type) -> str:
    spell = speller(kind)
    # `--r` is close to any short word, and seldom what was meant.
    known = [name for name in map(spell, get_type_hints(kind)) if len(name) > len("--r")]
    options = [token for token in tokens if token.startswith("-")]
    if not options:
        option = "give it with --experts, " if EXPERTS.fullmatch(tokens[0]) and "--experts" in known else ""
        return f"{tokens[0]!r} is one argument too many; {option}"
    near = difflib.get_close_matches(options[0].partition("=")[0], known, n=1)
    return f"there is no option {options[0]}; " + (f"did you mean {near[0]}? " if near else "")


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value given for an option; the last one if it was given several times."""
    given = [arguments[i + 1] for i, word in enumerate(arguments[:-1]) if word == flag]
    given += [word.partition("=")[2] for word in arguments if word.startswith(f"{flag}=")]
    return given[-1] if given else None
