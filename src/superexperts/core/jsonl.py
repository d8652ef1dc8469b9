"""Reads JSONL files, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from superexperts.core.errors import DataError

__all__ = ["read_rows"]


def read_rows(file: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSONL file that may be gzipped; blank lines are skipped.

    `DataError` about `field` for a line that is not a JSON object, and for a damaged file.
    """
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{file} row {number} is not a JSON object; write one object a line", field=field)
                yield number, row
        except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(f"{file} is not readable as JSONL ({error}); repair the file", field=field) from error


def _open(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")
