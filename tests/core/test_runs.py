"""Whole files or none, and a stage is done only if its inputs and outputs are what its manifest says."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from superexperts.core import runs
from superexperts.core.errors import DataError, OutputError
from superexperts.core.stages import STAGE_VERSIONS

SOURCES = Path(runs.__file__).parents[1]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.write_text(tmp_path / "a.txt", "old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="disk full"):
        runs.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_json_refuses_nan_and_keeps_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(tmp_path / "a.json", float("nan"))
    assert not (tmp_path / "a.json").exists()
    runs.write_json(tmp_path / "a.json", {"b": "Việt \ud800"})
    assert runs.read_json(tmp_path / "a.json", "x") == {"b": "Việt \ud800"}


def test_read_json_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="experts: cannot read"):
        runs.read_json(tmp_path / "a.json", "--experts")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="experts: .* is not valid JSON"):
        runs.read_json(tmp_path / "a.json", "--experts")


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(FileNotFoundError), runs.new_folder(target, "prune") as folder:
        (folder / "half").write_text("x" + (folder / "nothing").read_text())
    assert list(tmp_path.iterdir()) == []
    with runs.new_folder(target, "prune") as folder:
        (folder / "whole").write_text("1")
        runs.write_manifest(folder, "prune", {}, ["whole"], 0)
        assert not target.exists()
    assert (target / "whole").read_text() == "1"
    with runs.new_folder(target, "prune") as folder:
        (folder / "whole").write_text("2")
    assert (target / "whole").read_text() == "2"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_new_folder_never_replaces_what_it_did_not_make(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by `prune`"), runs.new_folder(target, "prune"):
        pass
    runs.write_manifest(target, "profile", {}, [], 0)
    with pytest.raises(OutputError, match="was not made by `prune`"), runs.new_folder(target, "prune"):
        pass
    assert (target / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out: cannot write to"):
        runs.prepare_folder(tmp_path / below)


def test_completed_needs_the_same_inputs_and_untouched_outputs(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    assert not runs.completed(tmp_path, "profile", {"x": 1})
    runs.write_manifest(tmp_path, "profile", {"x": 1}, ["a"], 1.0)
    assert runs.completed(tmp_path, "profile", {"x": 1})
    assert not runs.completed(tmp_path, "profile", {"x": 2})
    assert not runs.completed(tmp_path, "prune", {"x": 1})
    (tmp_path / "a").write_text("2")
    assert not runs.completed(tmp_path, "profile", {"x": 1})
    (tmp_path / "a").unlink()
    assert not runs.completed(tmp_path, "profile", {"x": 1})


OLD_MANIFEST = """{
 "schema": "superexperts/manifest/1",
 "command": "prune",
 "key": "1edae7549e2ce706e776cf8463a9745dc0c6fe4d0af252eb3ab9a69a1e75c406",
 "inputs": {"options": {"fold": "False", "revision": "None"}, "model": "175cc5df", "experts": [[1, 3], [2, "shared"]]},
 "outputs": {"a": "%s"},
 "versions": {"python": "3.11.7", "superexperts": "0.1.0"},
 "git_commit": "df60f4adb3b0a8313ea58515e47fbdfff1c76014",
 "finished": "2026-11-29T02:56:42Z",
 "seconds": 199.2
}
"""
"""What superexperts 0.1.0 wrote: no version, and a key that also depended on all source files."""
OLD_INPUTS = {
    "options": {"revision": "None", "fold": "False"},
    "model": "175cc5df",
    "experts": ((1, 3), (2, "shared")),
}


def test_a_manifest_without_a_version_is_complete_until_the_version_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "manifest.json").write_text(OLD_MANIFEST % runs.fingerprint(tmp_path / "a"))
    assert runs.completed(tmp_path, "prune", OLD_INPUTS)
    assert not runs.completed(tmp_path, "prune", {**OLD_INPUTS, "model": "another"})
    assert not runs.completed(tmp_path, "restore", OLD_INPUTS)
    monkeypatch.setitem(STAGE_VERSIONS, "prune", 2)
    assert not runs.completed(tmp_path, "prune", OLD_INPUTS)


def test_a_raised_version_makes_the_results_of_that_stage_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("profile", "train"):
        (tmp_path / stage).mkdir()
        runs.write_manifest(tmp_path / stage, stage, {"x": 1}, [], 0)
    keys = [runs.input_key(stage, {"x": 1}) for stage in ("profile", "train")]
    monkeypatch.setitem(STAGE_VERSIONS, "profile", STAGE_VERSIONS["profile"] + 1)
    assert not runs.completed(tmp_path / "profile", "profile", {"x": 1})
    assert runs.completed(tmp_path / "train", "train", {"x": 1})
    assert runs.input_key("profile", {"x": 1}) != keys[0]
    assert runs.input_key("train", {"x": 1}) == keys[1]
    runs.write_manifest(tmp_path / "profile", "profile", {"x": 1}, [], 0)
    assert runs.completed(tmp_path / "profile", "profile", {"x": 1})


def test_a_comment_in_any_source_file_leaves_every_stage_up_to_date(tmp_path: Path) -> None:
    """A copy of the package with a comment added to each of its files finds the results of this one complete."""
    for stage in STAGE_VERSIONS:
        (tmp_path / stage).mkdir()
        runs.write_manifest(tmp_path / stage, stage, {"x": 1}, [], 0)
    copy = tmp_path / "changed" / "superexperts"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file in [*copy.rglob("*.py"), *copy.rglob("*.yaml")]:
        file.write_text(file.read_text(encoding="utf-8") + "\n# a comment\n", encoding="utf-8")
    code = """
import sys
from pathlib import Path
from superexperts.core import runs, stages
assert "# a comment" in Path(runs.__file__).read_text()
print([runs.completed(Path(sys.argv[1]) / stage, stage, {"x": 1}) for stage in stages.STAGE_VERSIONS])
print([runs.input_key(stage, {"x": 1}) for stage in stages.STAGE_VERSIONS])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    keys = [runs.input_key(stage, {"x": 1}) for stage in STAGE_VERSIONS]
    assert done.stdout == f"{[True] * len(STAGE_VERSIONS)}\n{keys}\n"


def test_every_stage_that_writes_a_manifest_has_a_version() -> None:
    calls = [
        node
        for file in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "write_manifest"
    ]
    names = [call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)]
    assert len(names) == len(calls) >= 12
    assert set(names) == set(STAGE_VERSIONS)
    with pytest.raises(KeyError, match="'nope' has no version; add it to STAGE_VERSIONS"):
        runs.input_key("nope", {})


def test_fingerprint_sees_contents_names_and_the_ends_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = runs.fingerprint(tmp_path / "d")
    runs.write_manifest(tmp_path / "d", "prune", {}, [], 0)
    assert runs.fingerprint(tmp_path / "d") == first
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    assert runs.fingerprint(tmp_path / "d") != first
    monkeypatch.setattr(runs, "WHOLE_FILE_HASH", 8)
    big = tmp_path / "big"
    big.write_bytes(b"x" * 3 * 2**20)
    before = runs.fingerprint(big)
    big.write_bytes(b"x" * (3 * 2**20 - 1) + b"y")
    assert runs.fingerprint(big) != before


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    runs.write_json(target, list(range(100_000)))
    code = f"""
from pathlib import Path
from superexperts.core.runs import write_json
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
        assert runs.read_json(target, "x") == list(range(100_000))


@contextlib.contextmanager
def child(code: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs `code`, with `hang` to say that it is there and to wait; alive while the block runs."""
    head = "import os, shutil, sys\nfrom pathlib import Path\nfrom superexperts.core import runs\n"
    head += "def hang(*_, **__):\n    print('there', flush=True)\n    sys.stdin.readline()\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


WRITE = """
out, when = Path(sys.argv[1]), sys.argv[2]
with runs.new_folder(out, "prune") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "whole").write_text("killed")
    runs.write_manifest(folder, "prune", {}, ["deep"], 0)
    if when == "writing":
        hang()
    elif when == "between":  # the two renames
        replace = Path.replace
        Path.replace = lambda one, other: hang() if one.name.endswith(".new") else replace(one, other)
    elif when == "after":
        shutil.rmtree = hang
"""


def make(out: Path, text: str) -> None:
    with runs.new_folder(out, "prune") as folder:
        (folder / "whole").write_text(text)
        runs.write_manifest(folder, "prune", {}, ["whole"], 0)


def test_a_later_run_clears_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = [".out.checkpoints", ".out.settings", ".outer.abcd1234.new", ".out.abcd1234.news", "out.abcd1234.new"]
    for name in others:
        (tmp_path / name).mkdir()
    make(out, "old")
    with child(WRITE, out, "writing") as neighbour:
        with child(WRITE, out, "writing"):
            pass
        assert len(list(tmp_path.glob(".out.*.new"))) == 2
        assert (out / "whole").read_text() == "old"
        make(out, "new")
        # The living one's folder is still there, whole, and takes its place when it is done.
        (left,) = tmp_path.glob(".out.*.new")
        assert (left / "deep" / "whole").read_text() == "killed"
        neighbour.communicate(b"\n", timeout=60)
        assert neighbour.returncode == 0
    assert (out / "deep" / "whole").read_text() == "killed"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *others])


@pytest.mark.parametrize("later", ["completed", "new_folder"])
def test_a_kill_between_the_renames_loses_nothing(later: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    with child(WRITE, out, "between"):
        assert not out.exists()
        # Nothing is taken from the living.
        assert not runs.completed(out, "prune", {})
        assert not out.exists()
    (moved,) = tmp_path.glob(".out.*.old")
    assert (moved / "whole").read_text() == "old"
    if later == "completed":
        assert runs.completed(out, "prune", {})
    else:
        with pytest.raises(KeyError), runs.new_folder(out, "prune"):
            raise KeyError
    assert (out / "whole").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_that_a_kill_left_goes_although_nothing_is_left_to_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    with child(WRITE, out, "after"):
        assert len(list(tmp_path.iterdir())) == 2
    assert runs.completed(out, "prune", {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "deep" / "whole").read_text() == "killed"


def test_a_failing_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make(out, "old")
    replace = Path.replace

    def full(one: Path, other: Path) -> Path:
        if one.suffix == ".new":
            raise OSError("disk full")
        return replace(one, other)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        make(out, "new")
    assert (out / "whole").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for text in ("old", "new"):
        make(tmp_path / "out", text)
        assert (tmp_path / "disk" / "real" / "whole").read_text() == text
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "manifest.json", "out", "real", "whole"]


def test_a_later_write_clears_the_file_of_a_killed_one(tmp_path: Path) -> None:
    code = "os.fsync = hang\nruns.write_text(Path(sys.argv[1]), sys.argv[2])"
    target = tmp_path / "a.json"
    (tmp_path / ".b.json.abcd1234.tmp").write_text("another file's")
    with child(code, target, "alive") as neighbour:
        with child(code, target, "killed"):
            pass
        assert len(list(tmp_path.glob(".a.json.*.tmp"))) == 2
        runs.write_text(target, "new")
        assert len(list(tmp_path.glob(".a.json.*.tmp"))) == 1
        assert target.read_text() == "new"
        neighbour.communicate(b"\n", timeout=60)
    assert target.read_text() == "alive"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.abcd1234.tmp", "a.json"]
