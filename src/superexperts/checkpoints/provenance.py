"""superexperts.json: what was changed in a checkpoint, and from which base."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from typing_extensions import TypedDict

from superexperts.checkpoints.reader import INDEX, Checkpoint
from superexperts.checkpoints.writer import RECORD, Change, side_files
from superexperts.core.errors import DataError
from superexperts.core.paths import require_inside
from superexperts.core.runs import read_json, write_json
from superexperts.core.validation import check_schema, validated

__all__ = ["Record", "base_files"]

SCHEMA = "superexperts/surgery/1"


class BaseFile(TypedDict, total=False):
    """Size and hash of a file of the base."""

    bytes: int
    sha256: str
    sha256_header: str
    """Of a shard, in place of `sha256`: hashing its tensors would take longer than the rest of the command. The bytes
    that were changed have their hashes in `Record.changes`."""


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
    revision: str | None = None
    files: Mapping[str, BaseFile]
    """All files of the base by name."""
    changes: tuple[Change, ...]

    def write(self, folder: Path) -> None:
        """Writes superexperts.json."""
        write_json(folder / RECORD, {"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads superexperts.json; `DataError` in one line if it is missing or is not such a record."""
        path = require_inside(folder, RECORD, "folder", "the checkpoint folder that `prune` wrote")
        value = read_json(path, "folder")
        try:
            check_schema(value, SCHEMA, "folder", "give a folder that `prune` wrote")
            return validated(cls, value, "folder", "prune again")
        except DataError as error:
            raise DataError(f"{path}: ", *error.parts, field="folder") from error


def base_files(base: Checkpoint, folder: Path) -> dict[str, BaseFile]:
    """Bytes and hashes of a checkpoint's files, as `Record.files` has them."""
    found: dict[str, BaseFile] = {}
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    for file in [*side_files(folder), *index]:
        with file.open("rb") as opened:
            sha = hashlib.file_digest(opened, "sha256").hexdigest()
        found[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": sha}
    for name in base.files:
        found[name] = {"bytes": base.size(name), "sha256_header": _sha(base.header(name))}
    return found


def name_of(model: str) -> str:
    """A model as a record names it: a folder by its full path, since a relative path depends on the working folder."""
    return str(Path(model).resolve()) if model != "pocket" and Path(model).is_dir() else model


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
