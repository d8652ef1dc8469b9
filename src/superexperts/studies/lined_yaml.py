"""A YAML file with the line of every value, so that all errors of the file can be reported at once with lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import yaml

from superexperts.core.errors import OptionError
from superexperts.core.yaml_errors import yaml_error

__all__ = ["LinedYaml", "Place", "together"]

Place = tuple[str | int, ...]
"""Keys and list indices on the way to a value."""


class LinedYaml:
    """The `value` of a YAML text, and in `lines` the line of each place in it. `OptionError` if it is not YAML.

    `name` is the name of the file in errors.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.errors: list[tuple[int, str]] = []
        self.lines: dict[Place, int] = {(): 1}
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            self.value: Any = None if node is None else self._value(loader, node, ())
        except yaml.YAMLError as error:
            line, what = yaml_error(error, text)
            self.error((), f"not valid YAML: {what}; correct the file", line)
            self.stop()
        except RecursionError:
            self.error((), "an alias contains itself; write the values out")
            self.stop()

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, path: Place) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node, deep=True)
        loader.flatten_mapping(node)  # resolves merge keys (`<<: *alias`), which SafeLoader does on constructing
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            here = (*path, key if isinstance(key, str) else str(key))
            if not isinstance(key, str):
                self.error(here, f"{key!r} is not a text; put it in quotes", key_node.start_mark.line + 1)
            elif key in found:
                self.error(here, f"{key!r} is given twice; keep one", key_node.start_mark.line + 1)
            else:
                self.lines[here] = key_node.start_mark.line + 1
                found[key] = self._value(loader, value_node, here)
        return found

    def error(self, path: Place, text: str, line: int | None = None) -> None:
        """Add an error at a place, or at the nearest place around it that the file has."""
        while path not in self.lines:
            path = path[:-1]
        found = (line or self.lines[path], text)
        if found not in self.errors:  # two commands that share an option report the same
            self.errors.append(found)

    def stop(self) -> NoReturn:
        """Raise all errors as one, in the order of their lines."""
        raise OptionError(together(self.name, [f"line {line}: {text}" for line, text in sorted(self.errors)]))


def together(name: str, errors: Sequence[str]) -> str:
    """The errors of a file as one text: a single one in one line, several in one line each."""
    if len(errors) == 1:
        return f"{name}: {errors[0]}"
    return f"{name}: {len(errors)} errors; nothing was run\n" + "\n".join(f"  {error}" for error in errors)
