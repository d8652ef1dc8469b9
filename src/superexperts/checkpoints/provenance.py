"""superexperts.json: what was changed in a checkpoint, and from which base."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superexperts.checkpoints.reader import INDEX, Checkpoint
from superexperts.checkpoints.writer import RECORD, Change, side_files
from superexperts.core.errors import DataError
from superexperts.core.runs import read_json, write_json

__all__ = ["Record", "base_files"]

SCHEMA = "superexperts/surgery/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What was done to a checkpoint, so that it can be undone from the base."""

    command: str
    """`prune` or `export`."""
    mode: str
    experts: tuple[str, ...]
    """By name, such as L2E54."""
    model: str
    """The base: a folder's full path, a Hub name, or `pocket`."""
    revision: str | None
    files: Mapping[str, Mapping[str, Any]]
    """Of the base: bytes and SHA-256 of each file; of a shard the SHA-256 of its header, since a hash of its tensors
    would take longer than everything else. What of them was changed has its hashes in `changes`."""
    changes: tuple[Change, ...]

    def write(self, folder: Path) -> None:
        """Writes superexperts.json."""
        write_json(folder / RECORD, {"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads superexperts.json; `DataError` in one line for one that is not there or no such record."""
        path = folder / RECORD
        if not path.is_file():
            raise DataError(
                f"{folder} has no {RECORD}, so nothing says what was changed; give what prune wrote", field="folder"
            )
        value = read_json(path, "folder")
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise DataError(f"{path} is no file of schema {SCHEMA!r}; give what prune wrote", field="folder")
        try:
            record = cls(
                command=_text(value["command"]),
                mode=_text(value["mode"]),
                experts=tuple(map(_text, value["experts"])),
                model=_text(value["model"]),
                revision=None if value["revision"] is None else _text(value["revision"]),
                files={_text(name): _file(said) for name, said in value["files"].items()},
                changes=tuple(_change(row) for row in value["changes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: a field is missing or wrong ({error}); prune again", field="folder") from error
        return record


def base_files(base: Checkpoint, folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and hashes of a checkpoint's files, as `Record.files` has them."""
    found: dict[str, dict[str, Any]] = {}
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    for file in [*side_files(folder), *index]:
        with file.open("rb") as opened:
            sha = hashlib.file_digest(opened, "sha256").hexdigest()
        found[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": sha}
    for name in base.files:
        found[name] = {"bytes": base.size(name), "sha256_header": _sha(base.header(name))}
    return found


def name_of(model: str) -> str:
    """A model as a record names it: a folder by its full path, since a relative one means nothing elsewhere."""
    return str(Path(model).resolve()) if model != "pocket" and Path(model).is_dir() else model


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _file(said: Any) -> dict[str, Any]:
    number, (name, sha) = said["bytes"], next((key, said[key]) for key in ("sha256", "sha256_header") if key in said)
    if type(number) is not int:
        raise TypeError(f"{number!r:.40} is no number of bytes")
    return {"bytes": number, name: _text(sha)}


def _change(row: Any) -> Change:
    numbers: Sequence[Any] = (row["offset"], row["bytes"])
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError(f"{numbers!r:.40} are no offset and length")
    after = row["sha256_after"]
    return Change(
        key=_text(row["key"]),
        file=_text(row["file"]),
        offset=row["offset"],
        bytes=row["bytes"],
        sha256_before=_text(row["sha256_before"]),
        sha256_after=None if after is None else _text(after),
    )
