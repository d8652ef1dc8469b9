"""Whole files or none, and a stage is done only if its inputs and outputs are what its manifest says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from superexperts import rundir
from superexperts.errors import DataError, OutputError


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir.write_text(tmp_path / "a.txt", "old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="disk full"):
        rundir.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_json_refuses_nan_and_keeps_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        rundir.write_json(tmp_path / "a.json", float("nan"))
    assert not (tmp_path / "a.json").exists()
    rundir.write_json(tmp_path / "a.json", {"b": "Việt \ud800"})
    assert rundir.read_json(tmp_path / "a.json", "x") == {"b": "Việt \ud800"}


def test_read_json_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--experts: cannot read"):
        rundir.read_json(tmp_path / "a.json", "--experts")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="--experts: .* is not valid JSON"):
        rundir.read_json(tmp_path / "a.json", "--experts")


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(FileNotFoundError), rundir.new_folder(target, "prune") as folder:
        (folder / "half").write_text("x" + (folder / "nothing").read_text())
    assert list(tmp_path.iterdir()) == []
    with rundir.new_folder(target, "prune") as folder:
        (folder / "whole").write_text("1")
        rundir.write_manifest(folder, "prune", {}, ["whole"], 0)
        assert not target.exists()
    assert (target / "whole").read_text() == "1"
    with rundir.new_folder(target, "prune") as folder:
        (folder / "whole").write_text("2")
    assert (target / "whole").read_text() == "2"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_new_folder_never_replaces_what_it_did_not_make(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by `prune`"), rundir.new_folder(target, "prune"):
        pass
    rundir.write_manifest(target, "profile", {}, [], 0)
    with pytest.raises(OutputError, match="was not made by `prune`"), rundir.new_folder(target, "prune"):
        pass
    assert (target / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--out: cannot write to"):
        rundir.prepare_folder(tmp_path / below)


def test_completed_needs_the_same_inputs_and_untouched_outputs(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    assert not rundir.completed(tmp_path, "profile", {"x": 1})
    rundir.write_manifest(tmp_path, "profile", {"x": 1}, ["a"], 1.0)
    assert rundir.completed(tmp_path, "profile", {"x": 1})
    assert not rundir.completed(tmp_path, "profile", {"x": 2})
    assert not rundir.completed(tmp_path, "prune", {"x": 1})
    (tmp_path / "a").write_text("2")
    assert not rundir.completed(tmp_path, "profile", {"x": 1})
    (tmp_path / "a").unlink()
    assert not rundir.completed(tmp_path, "profile", {"x": 1})


def test_fingerprint_sees_contents_names_and_the_ends_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = rundir.fingerprint(tmp_path / "d")
    rundir.write_manifest(tmp_path / "d", "x", {}, [], 0)
    assert rundir.fingerprint(tmp_path / "d") == first
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    assert rundir.fingerprint(tmp_path / "d") != first
    monkeypatch.setattr(rundir, "WHOLE_FILE_HASH", 8)
    big = tmp_path / "big"
    big.write_bytes(b"x" * 3 * 2**20)
    before = rundir.fingerprint(big)
    big.write_bytes(b"x" * (3 * 2**20 - 1) + b"y")
    assert rundir.fingerprint(big) != before


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    rundir.write_json(target, list(range(100_000)))
    code = f"""
from pathlib import Path
from superexperts.rundir import write_json
print("go", flush=True)
while True:
    write_json(Path({str(target)!r}), list(range(100_000)))
"""
    for wait in (0.05, 0.11, 0.17):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"go\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        assert rundir.read_json(target, "x") == list(range(100_000))
