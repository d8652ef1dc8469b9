"""Classes and constants that docstrings and comments name, such as `models.experts.Weights`, exist."""

import ast
import re
from pathlib import Path

import superexperts

PACKAGE = Path(superexperts.__file__).parent
NAME = re.compile(r"(?<!`)`(?:[a-z_0-9]+\.)*([a-z_0-9]+)\.([A-Z]\w*)(?:\(\))?`")


def names_of(file: Path) -> set[str]:
    """Everything that a module defines or imports, its submodules included."""
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    words = {str(word) for node in tree for word in vars(node).values() if isinstance(word, str)}
    return words | ({path.stem for path in file.parent.iterdir()} if file.name == "__init__.py" else set())


def missing(text: str, modules: dict[str, set[str]]) -> list[str]:
    """The classes and constants in a text with the name of a module in front that this module does not have."""
    return [found[0] for found in NAME.finditer(text) if found[1] in modules and found[2] not in modules[found[1]]]


def test_names_in_text_exist() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    modules: dict[str, set[str]] = {}
    for file in files:
        modules.setdefault(file.parent.name if file.name == "__init__.py" else file.stem, set()).update(names_of(file))
    wrong = {str(file): found for file in files if (found := missing(file.read_text(encoding="utf-8"), modules))}
    assert wrong == {}
    assert missing("as in `experts.NoSuchName`, or `experts.Weights`", modules) == ["`experts.NoSuchName`"]
