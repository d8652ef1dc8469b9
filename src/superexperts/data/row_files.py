"""Files of rows: JSON, JSONL, CSV and Parquet, gzipped or not, and folders of such files in the Hub's layout.

Values keep the types that they have in the file. JSON is not read with `datasets`, which gives a column one type: one
number in a column of texts would change the texts.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from superexperts.core.errors import DataError

__all__ = ["data_files", "raw_rows"]

ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
NOT_ROWS = ("dataset_infos", "dataset_dict", "dataset_info", "state")
"""Stems of JSON files that describe a data set and hold no rows."""


def data_files(path: Path, field: str) -> list[Path]:
    """`[path]` for a file; for a folder its files of rows, sorted, or only those of the split train if it has one.

    `DataError` if there is no such file, or if a folder has none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(
            f"{path} is not a file; give JSON, JSONL, CSV or Parquet, or a folder of such files", field=field
        )
    inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    found = [
        file
        for file in inside
        if _ending(file) in ENDINGS and file.name.split(".")[0] not in NOT_ROWS and file.parts[0][:1] != "."
    ]
    train = [file for file in found if any("train" in part.lower() for part in file.parts)]
    kinds = {_ending(file) for file in train or found}
    if not found:
        raise DataError(f"{path} has no file of rows; give JSON, JSONL, CSV or Parquet", field=field)
    if len(kinds) > 1:
        raise DataError(f"{path} has files of rows as {' and '.join(sorted(kinds))}; give one of them", field=field)
    return [path / file for file in sorted(train or found)]


def raw_rows(file: Path, field: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each row; the number is the line in JSONL. `DataError` for a file that is damaged."""
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
        if _ending(file) == ".parquet":
            yield from _parquet(data, file, field)
            return
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror or error}); check the path", field=field) from error
    except (UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); save it as UTF-8", field=field) from error
    if _ending(file) in (".csv", ".tsv"):
        yield from _table(text, file, field)
    elif text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except json.JSONDecodeError as error:
            raise DataError(f"{file} is not valid JSON ({error}); repair it", field=field) from error
    else:
        yield from _lines(text, file, field)


def _ending(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _lines(text: str, file: Path, field: str) -> Iterator[tuple[int, Any]]:
    # Not str.splitlines: it also splits at characters such as U+2028, which JSON texts may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file} row {number} is not valid JSON ({error}); repair it", field=field) from error


def _table(text: str, file: Path, field: str) -> Iterator[tuple[int, Any]]:
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if _ending(file) == ".tsv" else ",")
    try:
        for number, row in enumerate(table, start=1):
            if None in row or None in row.values():
                columns = len(table.fieldnames or ())
                raise DataError(
                    f"{file} row {number} does not have the {columns} columns of the header; put texts with commas in "
                    "quotes",
                    field=field,
                )
            yield number, row
    except csv.Error as error:
        raise DataError(f"{file} is not readable as CSV ({error}); repair it", field=field) from error


def _parquet(data: bytes, file: Path, field: str) -> Iterator[tuple[int, Any]]:
    import pyarrow  # slow to import, and most files are not Parquet
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not readable as Parquet ({error}); repair it", field=field) from error
    yield from enumerate(rows, start=1)
