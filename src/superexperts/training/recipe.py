"""Recipes: YAML files that hold the settings of a training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from superexperts.core.errors import DataError, OptionError
from superexperts.core.settings import typed
from superexperts.core.yaml_errors import yaml_error

__all__ = ["read_recipe", "recipe_text"]


def recipe_text(settings: Mapping[str, Any], comment: str) -> str:
    """The settings as YAML below a line of comment; paths are written as text."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return f"# {comment}\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def read_recipe(file: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a recipe holds, each as the type that `kinds` gives for its name.

    `DataError` for a file that cannot be read; `OptionError` for one that is not a mapping in YAML, that holds a name
    missing from `kinds`, or a value of another type.
    """
    text = ""
    try:
        text = file.read_text(encoding="utf-8")
        value = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read {file} ({why}); check the path", field="recipe") from error
    except yaml.YAMLError as error:
        line, what = yaml_error(error, text)
        where = f"line {line}: " if line else ""
        raise OptionError(f"{file}: {where}not valid YAML: {what}; correct the file", field="recipe") from error
    if not isinstance(value, Mapping):
        raise OptionError(f"{file} is not a mapping of settings; write lines like `r: 16`", field="recipe")
    settings: dict[str, Any] = {}
    for name, setting in value.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, n=1)
            what_to_do = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise OptionError(f"{file}: {name!r} is not a setting of a recipe; {what_to_do}", field="recipe")
        try:
            settings[name] = typed(setting, kinds[name])
        except ValueError as error:
            raise OptionError(f"{file}: {name}: {error}", field="recipe") from error
    return settings
