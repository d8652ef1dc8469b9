"""Checks of the files and folders that a setting names, with one wording for all commands."""

from __future__ import annotations

import difflib
from pathlib import Path

from superexperts.core.errors import DataError

__all__ = ["missing", "require_file", "require_folder", "require_inside"]


def require_folder(path: Path, field: str, what: str) -> Path:
    """`path`, if it is a folder; `DataError` about `field` otherwise. `what` is what to give instead."""
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{str(path)!r} is a file; give {what}", field=field)
    raise DataError(f"{missing(path)}; give {what}", field=field)


def require_file(path: Path, field: str, what: str) -> Path:
    """`path`, if it is a file; `DataError` about `field` otherwise. `what` is what to give instead."""
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder; give {what}", field=field)
    raise DataError(f"{missing(path)}; give {what}", field=field)


def require_inside(folder: Path, name: str, field: str, what: str) -> Path:
    """The file `name` in `folder`; `DataError` about `field` if one of them does not exist."""
    file = require_folder(folder, field, what) / name
    if not file.is_file():
        raise DataError(f"{str(folder)!r} has no {name}; give {what}", field=field)
    return file


def missing(path: Path) -> str:
    """`'runs/prund' does not exist`, with the closest name beside it if there is one."""
    try:
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    except OSError:
        near = []
    hint = f" (did you mean {str(path.with_name(near[0]))!r}?)" if near else ""
    return f"{str(path)!r} does not exist{hint}"
