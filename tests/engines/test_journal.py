"""The journal of answers: whole batches, another key begins anew, and half a line is dropped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from superexperts.core.errors import OutputError
from superexperts.engines.journal import Journal


def test_it_comes_back_as_it_was_left(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a" / "j", "key")
    journal.add({"c": "three\n\u2028\r", "a": "\ud800"})
    journal.add({"b": "", "d": [-0.1, -1e-300]})
    again = Journal(tmp_path / "a" / "j", "key")
    assert again.answers == journal.answers == {"c": "three\n\u2028\r", "a": "\ud800", "b": "", "d": [-0.1, -1e-300]}


def test_another_key_begins_anew(tmp_path: Path) -> None:
    Journal(tmp_path / "j", "key").add({"0": "a"})
    assert Journal(tmp_path / "j", "other").answers == {}
    assert Journal(tmp_path / "j", "key").answers == {}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_half_a_line_is_dropped_and_written_again(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path / "j", "key")
    journal.add({"0": "kept"})
    journal.add({"1": "the second batch, cut"})
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:-cut])
    again = Journal(tmp_path / "j", "key")
    assert again.answers == {"0": "kept"}
    again.add({"1": "the second batch, cut"})
    assert (tmp_path / "j").read_bytes() == whole


def test_batches_are_synced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was written before the sync is handed to it; an answer that need not be is only written."""
    synced: list[int] = []
    monkeypatch.setattr("superexperts.engines.journal.os.fsync", lambda number: synced.append(os.fstat(number).st_size))
    journal = Journal(tmp_path / "j", "key")
    for number in range(2):
        journal.add({str(number): "an answer"})
        assert synced[-1] == (tmp_path / "j").stat().st_size
    assert len(synced) == 3
    journal.add({"2": "an answer"}, sync=False)
    assert len(synced) == 3
    assert (tmp_path / "j").read_bytes().endswith(b'{"answers": {"2": "an answer"}}\n')


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out: cannot write"):
        Journal(tmp_path / "file" / "j", "key")
