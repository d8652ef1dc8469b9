"""superexperts.json as earlier versions wrote it is still read, and is written the same."""

from __future__ import annotations

import json
from pathlib import Path

from superexperts.checkpoints.provenance import Record
from superexperts.checkpoints.writer import RECORD, Change

CHANGE = {
    "key": "model.layers.1.mlp.experts.3.down_proj.weight",
    "file": "model.safetensors",
    "offset": 4096,
    "bytes": 8192,
    "sha256_before": "aa",
    "sha256_after": None,
}
WRITTEN = {
    "schema": "superexperts/surgery/1",
    "command": "prune",
    "mode": "remove",
    "experts": ["L1E3"],
    "model": "pocket",
    "revision": None,
    "files": {
        "config.json": {"bytes": 812, "sha256": "bb"},
        "model.safetensors": {"bytes": 12288, "sha256_header": "cc"},
    },
    "changes": [CHANGE],
}


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps(WRITTEN))
    record = Record.read(tmp_path)
    assert record.experts == ("L1E3",)
    assert record.files == WRITTEN["files"]
    assert record.changes == (Change(**CHANGE),)  # type: ignore[arg-type]
    (tmp_path / "again").mkdir()
    record.write(tmp_path / "again")
    assert json.loads((tmp_path / "again" / RECORD).read_text()) == WRITTEN


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({**WRITTEN, "tool": "new", "changes": [{**CHANGE, "unit": "bytes"}]}))
    assert Record.read(tmp_path).changes[0].offset == 4096
