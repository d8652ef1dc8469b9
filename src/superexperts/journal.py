"""Answers as they come, kept batch by batch, so that a killed evaluation asks nothing twice.

A journal is a file of JSON lines. The first holds the key of what is asked; each other one holds a whole batch. A batch
is the smallest thing kept: the same batches make the same padding, so an interrupted run gives the same answers bit by
bit as one that was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .errors import OutputError

__all__ = ["Journal", "Keeper"]


class Keeper(Protocol):
    """What takes a model's answers as they come."""

    @property
    def answers(self) -> Mapping[int, str]:
        """Number of the request -> response, of what need not be asked."""

    def add(self, answers: Mapping[int, str], truncated: int, *, sync: bool = True) -> None:
        """Keeps some answers, and how many of their prompts lost their beginning."""


class Journal:
    """The answers given so far to one benchmark; a file with another key, or none, begins an empty one."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.answers: dict[int, str] = {}
        """Number of the request -> response."""
        self.truncated = 0
        """Prompts of those batches that lost their beginning."""
        whole = self._read(key) if path.is_file() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.truncate(whole)  # half a line is what a kill left
            if not whole:
                self._append({"key": key})
        except OSError as error:
            raise OutputError(f"--out: cannot write {path} ({error.strerror}); choose another folder") from error

    def _read(self, key: str) -> int:
        """Takes the whole lines; returns how many bytes they have, 0 where the key is another one."""
        whole = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or (number == 0 and value != {"key": key}):
                break
            if number:
                self._take(value)
            whole += len(line)
        return whole

    def _take(self, batch: Mapping[str, Any]) -> None:
        self.answers |= {int(request): response for request, response in batch["answers"].items()}
        self.truncated += batch["truncated"]

    def add(self, answers: Mapping[int, str], truncated: int, *, sync: bool = True) -> None:
        """Appends a batch and syncs it to disk; without `sync` it outlives the process, but not a power cut."""
        batch = {"answers": {str(request): response for request, response in answers.items()}, "truncated": truncated}
        self._append(batch, sync=sync)
        self._take(batch)

    def _append(self, value: Any, *, sync: bool = True) -> None:
        with self.path.open("ab") as stream:
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
