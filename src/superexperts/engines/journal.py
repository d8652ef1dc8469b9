"""Answers as they come, kept batch by batch, so that a killed evaluation asks nothing twice.

A journal is a file of JSON lines. The first holds the key of what is asked; each other one holds a whole batch. A batch
is the smallest thing kept: the same batches make the same padding, so an interrupted run gives the same answers bit by
bit as one that was not. Several processes have a journal each; what any of them has kept counts for all.
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

Given = str | list[float]
"""What a model gave for an item: its response, or the log-probability of each choice."""


class Keeper(Protocol):
    """What takes a model's answers as they come."""

    @property
    def answers(self) -> Mapping[int, Given]:
        """Number of the request -> what was given, of what need not be asked."""

    def add(self, answers: Mapping[int, Given], *, sync: bool = True) -> None:
        """Keeps some answers."""


class Journal:
    """The answers given so far to one benchmark; a file with another key, or none, begins an empty one."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.answers: dict[str, Given] = {}
        """Id of the item -> what was given."""
        whole = self._read(key) if path.is_file() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.truncate(whole)  # half a line is what a kill left
            if not whole:
                self._append({"key": key})
        except OSError as error:
            raise OutputError(f"cannot write {path} ({error.strerror}); choose another folder", field="out") from error

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
                self.answers |= value["answers"]
            whole += len(line)
        return whole

    def add(self, answers: Mapping[str, Given], *, sync: bool = True) -> None:
        """Appends a batch and syncs it to disk; without `sync` it outlives the process, but not a power cut."""
        self._append({"answers": dict(answers)}, sync=sync)
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
    """The journal as a model sees it, which numbers its requests; `ids` are those of the items asked, in order."""
    return _Numbered(journal, ids)


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / (f".{name}.{number}.partial" if number else f".{name}.partial")


def open_journals(
    folder: Path, keys: Mapping[str, str], finished: Mapping[str, Mapping[str, Given]]
) -> dict[str, Journal]:
    """This process' journals of the benchmarks that `keys` has, with all that any process has kept under the same key.

    `finished` are answers of a run that came to its end, which are kept as well: they count where no journal is there.
    Other benchmarks' journals are removed.
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
    """What they kept stands in the answers' files now."""
    for path in folder.glob(".*.partial"):
        path.unlink()
