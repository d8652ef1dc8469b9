"""The harness's own few-shot tasks over a benchmark's rows, for the protocol `loglikelihood`.

Prompts, examples and choices are the harness's; only where the rows come from is ours, so that the Hub and local files
go the same way. Which examples stand before an item does not depend on what else is asked: they are those that the
harness draws for it when it asks the whole benchmark.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from superexperts.benchmarks.items import Item, Row, read_item
from superexperts.benchmarks.quiet import quiet
from superexperts.core.errors import DataError, Field

__all__ = ["DEFAULT_SHOTS", "choice_labels", "few_shot_tasks", "with_examples"]

DEFAULT_SHOTS = {
    "mmlu": 5,
    "gsm8k": 5,
    "arc_easy": 0,
    "arc_challenge": 25,
    "openbookqa": 0,
    "boolq": 0,
    "medqa": 0,
    "vmlu": 5,
}
"""Examples before a question, as published few-shot numbers have them; the harness's own number where there is none."""

BY_SUBJECT = ("mmlu", "vmlu")
"""Benchmarks that show an item examples of its own subject."""

FEWSHOT_SEED = 1234
"""The seed with which the harness draws examples unless told otherwise."""

HARNESS = {
    "gsm8k": ("gsm8k", "gsm8k"),
    "arc_easy": ("arc", "arc_easy"),
    "arc_challenge": ("arc", "arc_challenge"),
    "openbookqa": ("openbookqa", "openbookqa"),
    "boolq": ("super_glue/boolq", "boolq"),
    "medqa": ("medqa", "medqa_4options"),
}
"""Folder below the harness's tasks, and the task's name there. MMLU has a task for each subject; VMLU has none."""


def choice_labels(item: Item) -> tuple[str, ...]:
    """The labels of what the harness scores, in its order: the row's own, or no and yes."""
    return tuple(label for label, _ in item.choices) or ("no", "yes")


def few_shot_tasks(
    name: str, items: Sequence[Item], rows: datasets.Dataset, examples: datasets.Dataset | None, shots: int
) -> list[tuple[Task, tuple[int, ...], int]]:
    """(harness task, numbers of its items, examples) for all of a benchmark's items; one for each of its subjects.

    `examples` are rows that the `shots` examples are drawn from, of the item's own subject; None without any. A subject
    with fewer rows shows all that it has: some of VMLU's have three or four. `DataError` where none has enough, or
    where a row does not fit the harness's task.
    """
    asked = _harness_rows(name, items, rows)
    if name in BY_SUBJECT and (odd := next((item.id for item in items if item.subject is None), None)) is not None:
        raise DataError(
            f"{name}: {odd} has no subject, whose examples it needs; add it, or give ", Field("protocol"), " generative"
        )
    if name not in BY_SUBJECT:
        shown = asked.select([]) if examples is None else _harness_rows(name, _read(name, examples), examples)
        return [(_task(name, "", asked, shown, shots), tuple(range(len(items))), shots)]
    shown_items = [] if examples is None else _read(name, examples)
    shown = asked.select([]) if examples is None else _harness_rows(name, shown_items, examples)
    numbers, found = _by_subject(items), _by_subject(shown_items)
    most = max((len(mine) for mine in found.values()), default=0)
    if shots > most:
        raise DataError(f"{shots} is more than {name} has of any subject, {most}; give fewer", field="num_fewshot")
    lacking = next((subject for subject in numbers if subject not in found), None) if shots else None
    if lacking is not None:
        raise DataError(f"{name} has no examples of subject {lacking!r}; add some, or give 0", field="num_fewshot")
    return [
        (
            _task(name, subject, asked.select(mine), shown.select(found.get(subject, ())), fewest),
            tuple(mine),
            fewest,
        )
        for subject, mine in numbers.items()
        for fewest in [min(shots, len(found.get(subject, ())))]
    ]


def _by_subject(items: Sequence[Item]) -> dict[str, list[int]]:
    """subject -> numbers of its items, in order of appearance."""
    numbers: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        numbers.setdefault(str(item.subject), []).append(number)
    return numbers


def _read(name: str, rows: datasets.Dataset) -> list[Item]:
    return [read_item(name, row, index) for index, row in enumerate(rows)]


def _harness_rows(name: str, items: Sequence[Item], rows: datasets.Dataset) -> datasets.Dataset:
    """The rows in the columns that the harness's task reads, which differ from the data set's for three benchmarks."""
    if name in ROWS:
        return datasets.Dataset.from_list([ROWS[name](item, row) for item, row in zip(items, rows, strict=True)])
    if name == "mmlu":
        odd = next((item for item in items if len(item.choices) != 4), None)
        if odd is not None:
            raise DataError(f"mmlu: {odd.id} has {len(odd.choices)} choices; the harness's task needs 4")
    return rows


def _boolq_row(item: Item, row: Row) -> Row:
    # SuperGLUE's columns, which the harness reads. Its passages begin with a title, those of google/boolq do not.
    return {"question": row["question"].rstrip("?"), "passage": row["passage"], "label": int(row["answer"])}


def _medqa_row(item: Item, row: Row) -> Row:
    labels = [label for label, _ in item.choices]
    if labels != ["A", "B", "C", "D"]:
        raise DataError(f"medqa: {item.id} has the choices {','.join(labels)}; the harness's task needs A,B,C,D")
    endings = {f"ending{i}": text for i, (_, text) in enumerate(item.choices)}
    return {"sent1": row["question"], **endings, "label": _gold(item)}


def _vmlu_row(item: Item, row: Row) -> Row:
    return {"body": item.body, "labels": [label for label, _ in item.choices], "answer": _gold(item)}


def _gold(item: Item) -> int:
    """The right choice's number; the first where the gold answer is not published, since the harness wants one."""
    return 0 if item.gold is None else [label for label, _ in item.choices].index(item.gold)


ROWS: Mapping[str, Callable[[Item, Row], Row]] = {"boolq": _boolq_row, "medqa": _medqa_row, "vmlu": _vmlu_row}


def _task(name: str, subject: str, asked: datasets.Dataset, shown: datasets.Dataset, shots: int) -> Task:
    splits = {"test": asked, "validation": asked, "train": shown, "dev": shown}
    settings: dict[str, Any] = {"custom_dataset": lambda **_: splits, "num_fewshot": shots}
    if name == "mmlu":
        folder, entry = "mmlu/default", f"mmlu_{subject}"
        if entry not in _manager(folder).all_tasks:  # another world's subject, asked as the harness asks its own
            entry, words = "mmlu_abstract_algebra", subject.replace("_", " ")
            settings["description"] = f"The following are multiple choice questions (with answers) about {words}.\n\n"
    else:
        folder, entry = HARNESS.get(name, ("", "vmlu_loglikelihood"))
    with quiet():
        task = _manager(folder).load({"group": "superexperts", "task": [{"task": entry, **settings}]})["tasks"][entry]
    # One more where the harness leaves the asked row out of what it has drawn.
    needed = shots + (_excluded(task) if shots else 0)
    if len(shown) < needed:
        raise DataError(
            f"{shots} examples are drawn from {needed} rows, {name} has {len(shown)}; give fewer", field="num_fewshot"
        )
    return task


@functools.cache
def _manager(folder: str) -> TaskManager:
    path = Path(lm_eval.tasks.__file__).parent / folder if folder else Path(__file__).parent
    return TaskManager(include_path=path, include_defaults=False)


def _excluded(task: Any) -> bool:
    """Whether the harness keeps the asked row out of its examples: where both could come from the same split."""
    return bool(task.fewshot_cfg.split == task.config.test_split)


class _Drawn(ContextSampler):  # type: ignore[misc]  # the harness is untyped
    """Gives the examples that were drawn for the next item."""

    def __init__(self, examples: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(list(examples))

    def sample(self, n: int, *_: Any, **__: Any) -> Sequence[Mapping[str, Any]]:
        assert n == len(self.df)
        return list(self.df)


def with_examples(task: Any, positions: Sequence[int], shots: int) -> list[tuple[Any, str]]:
    """(row, context) of some rows of a task, `positions` ascending, with the examples of a run over all its rows."""
    rows = task.eval_docs
    if shots == 0:
        return [(rows[i], _context(task, rows[i], 0)) for i in positions]
    sampler = task.sampler.set_rnd(FEWSHOT_SEED)
    wanted, found = set(positions), []
    try:
        for i in range(positions[-1] + 1):
            row = rows[i] if i in wanted or _excluded(task) else None
            drawn = sampler.sample(shots, eval_doc=row if _excluded(task) else None)
            if i in wanted:
                task.sampler = _Drawn(drawn)
                found.append((row, _context(task, row, shots)))
    finally:
        task.sampler = sampler
    return found


def _context(task: Any, row: Any, shots: int) -> str:
    context: str = task.fewshot_context(doc=row, num_fewshot=shots, gen_prefix=task.doc_to_prefix(row))
    return context
