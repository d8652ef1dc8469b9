"""Keeps the answers batch by batch as they arrive, so that a killed evaluation asks nothing twice.

A journal is a file of JSON lines. The first line holds the key of what is asked; each other line holds one batch. Only
whole batches are kept: the same batches have the same padding, so a run that was interrupted gives bit for bit the
answers of one that was not. Each process has a journal, and all processes use what any of them has kept.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from superexperts.core.console import is_main_process
from superexperts.core.distributed import from_main_process, process_number
from superexperts.core.errors import OutputError

__all__ = ["Given", "Journal", "Keeper", "numbered", "open_journals", "remove_journals"]

Given = str | list[float] | dict[str, str]
"""A model's answer to an item: its response, the log-probability of each choice, or the fields of a reply that are
known beside the response."""


class Keeper(Protocol):
    """Takes a model's answers as they arrive."""

    @property
    def answers(self) -> Mapping[int, Given]:
        """Number of the request -> answer, for the requests that are already answered."""

    def add(self, answers: Mapping[int, Given], *, sync: bool = True) -> None:
        """Keeps more answers."""


class Journal:
    """The answers so far to one benchmark; empty if there is no file yet, or one with another key."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.answers: dict[str, Given] = {}
        """Id of the item -> answer."""
        whole = self._read(key) if path.is_file() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.truncate(whole)  # a kill may leave half a line
            if not whole:
                self._append({"key": key})
        except OSError as error:
            raise OutputError(f"cannot write {path} ({error.strerror}); choose another folder", field="out") from error

    def _read(self, key: str) -> int:
        """Reads the whole lines; returns their length in bytes, or 0 if the file has another key."""
        whole = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            try:
                value = json.loads(line)
            except ValueError:
                break
            # Everything from the first damaged line on is dropped: lines are appended in order, so only the tail can
            # be cut.
            if not line.endswith(b"\n") or (number == 0 and value != {"key": key}):
                break
            if number:
                self.answers |= value["answers"]
            whole += len(line)
        return whole

    def add(self, answers: Mapping[str, Given], *, sync: bool = True) -> None:
        """Appends a batch and syncs it to disk; without `sync` it survives a kill but not a power cut.

        `OutputError` if it cannot be written; all earlier batches stay.
        """
        try:
            self._append({"answers": dict(answers)}, sync=sync)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path} ({error.strerror}); make room and evaluate again, which goes on after the "
                f"{len(self.answers)} answers that are kept",
                field="out",
            ) from error
        self.answers |= answers

    def _append(self, value: Any, *, sync: bool = True) -> None:
        with self.path.open("ab") as stream:
            stream.write(json.dumps(value).encode() + b"\n")
            stream.flush()
            if sync:
                os.fsync(stream.fileno())


@dataclasses.dataclass(frozen=True)
class _Numbered:
    journal: Journal
    ids: Sequence[str]

    @property
    def answers(self) -> dict[int, Given]:
        given = self.journal.answers
        return {number: given[name] for number, name in enumerate(self.ids) if name in given}

    def add(self, answers: Mapping[int, Given], *, sync: bool = True) -> None:
        self.journal.add({self.ids[number]: value for number, value in answers.items()}, sync=sync)


def numbered(journal: Journal, ids: Sequence[str]) -> Keeper:
    """The journal for a model, which numbers its requests; `ids` are the ids of the items asked, in order."""
    return _Numbered(journal, ids)


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / (f".{name}.{number}.partial" if number else f".{name}.partial")


def open_journals(
    folder: Path, keys: Mapping[str, str], finished: Mapping[str, Mapping[str, Given]]
) -> dict[str, Journal]:
    """The journals of this process, one per benchmark in `keys`, with all that any process has kept under that key.

    `finished` holds answers of a finished run, which are used if there is no journal. Journals of other benchmarks are
    removed.
    """
    journals: dict[str, Journal] = {}
    if is_main_process:
        mine = {name: _file(folder, name, 0) for name in keys}
        for name, key in keys.items():
            journals[name] = Journal(mine[name], key)
            others = [Journal(path, key).answers for path in sorted(folder.glob(f".{name}.*.partial"))]
            kept = {item: value for given in others for item, value in given.items()}
            if not kept and not journals[name].answers:
                kept = dict(finished.get(name, {}))
            if new := {item: value for item, value in kept.items() if item not in journals[name].answers}:
                journals[name].add(new)
        for stale in set(folder.glob(".*.partial")) - set(mine.values()):
            stale.unlink()
    kept_by_all = from_main_process({name: journal.answers for name, journal in journals.items()})
    if not is_main_process:
        journals = {name: Journal(_file(folder, name, process_number()), key) for name, key in keys.items()}
        for name, journal in journals.items():
            journal.answers |= kept_by_all[name]
    return journals


def remove_journals(folder: Path) -> None:
    """Removes all journals, once the answers are in their files."""
    for path in folder.glob(".*.partial"):
        path.unlink()
