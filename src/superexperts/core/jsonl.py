"""Reads JSONL files, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from superexperts.core.errors import DataError

__all__ = ["OTHERS", "is_gzipped", "other_format", "read_rows", "require_text"]

OTHERS = {".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".arrow": "Arrow", ".xlsx": "Excel", ".zip": "ZIP"}
"""File suffix -> name of a format that is not read here, for messages that say how to convert it."""
READERS = {"CSV": "read_csv({0!r})", "TSV": "read_csv({0!r}, sep='\\t')", "Parquet": "read_parquet({0!r})"}
"""Format -> the pandas call that reads it; `{0!r}` is the path."""
MAGIC = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"PK\x03\x04": "ZIP"}
"""First bytes of a file -> name of its format."""


def read_rows(file: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSONL file that may be gzipped; blank lines are skipped.

    `DataError` about `field` for a line that is not a JSON object, for a damaged file, and for a file of another kind.
    """
    require_text(file, field)
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                if number == 1 and line.lstrip().startswith("["):
                    raise DataError(f"{file} is a JSON array, not JSONL; write one object a line", field=field)
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{file} row {number} is not a JSON object; write one object a line", field=field)
                yield number, row
        except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(f"{file} is not readable as JSONL ({error}); repair the file", field=field) from error


def require_text(file: Path, field: str) -> None:
    """`DataError` about `field` for a table in another format, such as CSV; it says how to convert it."""
    kind = other_format(file)
    if kind is None:
        return
    advice = "convert it to JSONL, one object a line"
    if kind in READERS:
        target = str(file.with_suffix(".jsonl"))
        command = READERS[kind].format(str(file)) + f".to_json({target!r}, orient='records', lines=True)"
        advice = f"convert it with pandas: {command}"
    raise DataError(f"{str(file)!r} is {kind}, not JSONL; {advice}", field=field)


def other_format(file: Path) -> str | None:
    """The name of the format that a file's ending or first bytes show, if it is not JSON."""
    if file.suffix.lower() in OTHERS:
        return OTHERS[file.suffix.lower()]
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        head = stream.read(8)
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def is_gzipped(file: Path) -> bool:
    """Whether the file begins with gzip's magic number, or its name ends in .gz."""
    with file.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b" or file.suffix == ".gz"


def _open(file: Path) -> TextIO:
    # utf-8-sig drops the byte order mark that Windows editors and Excel write, which is not JSON.
    if is_gzipped(file):
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")
