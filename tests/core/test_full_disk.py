"""A disk without room is one line, whichever library met it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from superexperts.cli import main
from superexperts.core.full_disk import full_disk


def wrapped(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_in_every_form(number: int) -> None:
    reason = os.strerror(number)
    errors = [OSError(number, reason, "a/b.json"), SafetensorError(f"I/O error: {reason} (os error {number})")]
    for error in (*errors, *map(wrapped, errors)):
        found = full_disk(error)
        assert found is not None
        assert reason in found.line()
        assert found.line().endswith("make room and run the same command again, what was finished is kept")
    assert "cannot write a/b.json (" in str(full_disk(errors[0]))


def test_other_errors_are_not() -> None:
    assert full_disk(wrapped(OSError(errno.EACCES, "Permission denied", "x"))) is None
    assert full_disk(ValueError("no room for doubt")) is None


def test_a_command_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    monkeypatch.setattr("superexperts.pocket.write_checkpoint", full)
    assert main(["pocket", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("superexperts: --out: cannot write (No space left on device); make room")
