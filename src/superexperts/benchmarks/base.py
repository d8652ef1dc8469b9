"""What a benchmark is, and helpers that read its rows. One file beside this one defines each benchmark.

Nothing heavy is imported here: the command line needs the names of the benchmarks before it loads any library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from superexperts.core.errors import DataError
from superexperts.core.prompt import prompt_of

__all__ = [
    "Benchmark",
    "FewShot",
    "HubData",
    "Item",
    "Row",
    "RowError",
    "Withheld",
    "choice_item",
    "gold_number",
    "prompt",
    "read_field",
    "read_text",
]

Row = Mapping[str, Any]
"""A row of a data set: column -> value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a benchmark."""

    id: str
    """The id that the row has, or `<benchmark>-<index>` if it has none."""
    body: str
    """The text between `Question: ` and `\\nAnswer:`, with the choices."""
    choices: tuple[tuple[str, str], ...]
    """(label, text) of each choice in order; empty for numbers and yes/no."""
    gold: str | None
    """The right choice's label, "yes" / "no", or a plain number; None if the publisher withholds it."""
    kind: Literal["choice", "number", "yesno"]
    """The form of the answer, which decides how `extract` reads a response."""
    subject: str | None = None
    """The subject that the benchmark files the item under, if it has subjects."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set on the Hugging Face Hub."""

    path: str
    """OWNER/NAME"""
    revision: str
    """The commit, so that the rows never change."""
    config: str | None = None
    """The data set's configuration, for data sets that have several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot:
    """How the protocol `loglikelihood` asks a benchmark: by a task of lm-evaluation-harness, after some examples."""

    shots: int
    """Examples before each question by default, as published few-shot numbers have them."""
    folder: str = ""
    """Folder of the harness's task, below `lm_eval/tasks`."""
    task: str = ""
    """Name of the harness's task; `{subject}` in it stands for the item's subject."""
    config: Mapping[str, Any] | None = None
    """The configuration of the task, for a benchmark that the harness does not have."""
    by_subject: bool = False
    """Whether the examples before an item come from the same subject only."""
    other_subject: tuple[str, str] | None = None
    """For subjects that the harness has no task for: the task to use instead, and its description, in which `{subject}`
    stands for the subject."""
    row: Callable[[Item, Row], Row] | None = None
    """The row in the columns that the harness's task reads, if they differ from those of the data set.

    Raises `RowError` for an item that the harness's task cannot ask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Withheld:
    """Rows without gold answers: the publisher scores answers that are submitted as a CSV file."""

    file: str
    """Stem of the local file."""
    columns: tuple[str, str] = ("id", "answer")
    """Header of the CSV file to submit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark: where its rows come from, how a row becomes an item, and how the result is shown."""

    name: str
    """Its name in settings and file names."""
    title: str
    """Its name in tables."""
    read: Callable[[Row, str], Item]
    """Row and default id -> item. Raises `RowError` for a row that cannot be used."""
    size: int
    """Number of items in the published set, for estimates."""
    original_name: str | None = None
    """What the original project's raw files call it after `raw_result_` and `baseline_`, if not by its name."""
    hub: HubData | None = None
    """None for a benchmark that is not on the Hub."""
    split: str = "test"
    """The split that is asked."""
    examples_split: str = "train"
    """The split that few-shot examples are drawn from."""
    file: str
    """Stem of the local file with the items, to which .jsonl or .jsonl.gz is added."""
    other_file: str | None = None
    """Stem of the local file in another published layout, read if the usual one is missing."""
    examples_file: str
    """Stem of the local file with the few-shot examples; a number may follow it that says how many rows it has."""
    source: str | None = None
    """Where to get the files of a benchmark that is not on the Hub."""
    withheld: Withheld | None = None
    """Further rows, without published gold answers."""
    few_shot: FewShot | None = None
    """None if the protocol `loglikelihood` cannot ask this benchmark."""
    acc_norm: bool = False
    """Whether lm-evaluation-harness also reports the accuracy by log-probability per character (acc_norm)."""
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Group -> its subjects, for averages over groups of subjects."""
    result_column: int | None = None
    """Place among the columns of result.csv. Benchmarks with a place are also those that are asked by default."""

    def item(self, row: Row, index: int) -> Item:
        """The item of the row with this index, which counts from 0. `DataError` names the row and the field."""
        try:
            return self.read(row, f"{self.name}-{index}")
        except RowError as error:
            raise DataError(f"{self.name}: row {index + 1}: {error}; repair the data file") from error


def prompt(item: Item) -> str:
    """The whole prompt; a response begins right after it."""
    return prompt_of(item.body)


class RowError(ValueError):
    """A row cannot be used; the message says why, and the caller adds which row it is."""


def read_field(row: Row, name: str, kind: type | tuple[type, ...]) -> Any:
    """The value of a column; `RowError` if it is missing or of another type."""
    value = row.get(name)
    if value is None:
        raise RowError(f"field {name!r} is missing")
    # In Python a bool is an int, but `true` is not an index.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RowError(f"field {name!r} is {str(value)[:40]!r}, of the wrong type")
    return value


def read_text(row: Row, name: str) -> str:
    """The text of a column without surrounding blanks; `RowError` if it is missing, empty or not a text."""
    text: str = read_field(row, name, str).strip()
    if not text:
        raise RowError(f"field {name!r} is empty")
    return text


def choice_item(
    name: str, question: str, choices: list[tuple[str, str]], gold: str | None, subject: str | None = None
) -> Item:
    """A multiple-choice item with the labels of the row; `RowError` if labels or gold answer do not fit together."""
    labels = [label for label, _ in choices]
    if len(set(labels)) < len(labels) or len(labels) < 2:
        raise RowError(f"choices are labelled {labels}: two or more different labels are needed")
    if gold is not None and gold not in labels:
        raise RowError(f"the answer is {gold!r}, which is none of the labels {labels}")
    body = "\n".join([question, *(f"{label}. {text}" for label, text in choices)])
    return Item(id=name, body=body, choices=tuple(choices), gold=gold, kind="choice", subject=subject)


def gold_number(item: Item) -> int:
    """Index of the right choice; 0 if the gold answer is withheld, because the harness needs a number."""
    return 0 if item.gold is None else [label for label, _ in item.choices].index(item.gold)
