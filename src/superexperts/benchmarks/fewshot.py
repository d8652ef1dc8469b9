"""The few-shot tasks of lm-evaluation-harness over a benchmark's rows, for the protocol `loglikelihood`.

Prompts, examples and choices are the harness's. Only the rows come from us, so that the Hub and local files work the
same way. The examples in front of an item do not depend on which other items are asked: they are the ones that the
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
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from superexperts.benchmarks.base import Benchmark, FewShot, Item, RowError
from superexperts.benchmarks.quiet import quiet
from superexperts.core.errors import DataError, Field

__all__ = ["choice_labels", "few_shot_tasks", "with_examples"]

FEWSHOT_SEED = 1234
"""The harness's default seed for drawing examples."""


def choice_labels(item: Item) -> tuple[str, ...]:
    """The labels of the choices that the harness scores, in its order; no and yes for a yes-or-no question."""
    return tuple(label for label, _ in item.choices) or ("no", "yes")


def few_shot_tasks(
    benchmark: Benchmark, items: Sequence[Item], rows: datasets.Dataset, examples: datasets.Dataset | None, shots: int
) -> list[tuple[Task, tuple[int, ...], int]]:
    """(harness task, numbers of its items, examples) for all items of a benchmark: one task, or one for each subject.

    The `shots` examples are drawn from the rows `examples`, for a benchmark by subject from those of the item's
    subject; None if there are none. A subject with fewer rows shows all that it has: some of VMLU's have three or four.
    `DataError` if no subject has enough rows, or if a row does not fit the harness's task.
    """
    spec, name = benchmark.few_shot, benchmark.name
    if spec is None:
        raise DataError(
            f"{name} has no few-shot task; leave it out, or give ", Field("protocol"), " generative", field="tasks"
        )
    asked = _harness_rows(benchmark, spec, items, rows)
    if spec.by_subject and (odd := next((item.id for item in items if item.subject is None), None)) is not None:
        raise DataError(
            f"{name}: {odd} has no subject, so its examples cannot be chosen; add it, or give ",
            Field("protocol"),
            " generative",
        )
    shown_items = [] if examples is None else [benchmark.item(row, index) for index, row in enumerate(examples)]
    shown = asked.select([]) if examples is None else _harness_rows(benchmark, spec, shown_items, examples)
    if not spec.by_subject:
        return [(_task(name, spec, "", asked, shown, shots), tuple(range(len(items))), shots)]
    numbers, found = _by_subject(items), _by_subject(shown_items)
    most = max((len(mine) for mine in found.values()), default=0)
    if shots > most:
        raise DataError(f"{shots} is more than {name} has of any subject, {most}; give fewer", field="num_fewshot")
    lacking = next((subject for subject in numbers if subject not in found), None) if shots else None
    if lacking is not None:
        raise DataError(f"{name} has no examples of subject {lacking!r}; add some, or give 0", field="num_fewshot")
    tasks = []
    for subject, mine in numbers.items():
        fewest = min(shots, len(found.get(subject, ())))
        examples_of_subject = shown.select(found.get(subject, ()))
        task = _task(name, spec, subject, asked.select(mine), examples_of_subject, fewest)
        tasks.append((task, tuple(mine), fewest))
    return tasks


def _by_subject(items: Sequence[Item]) -> dict[str, list[int]]:
    """subject -> numbers of its items, in order of appearance."""
    numbers: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        numbers.setdefault(str(item.subject), []).append(number)
    return numbers


def _harness_rows(
    benchmark: Benchmark, spec: FewShot, items: Sequence[Item], rows: datasets.Dataset
) -> datasets.Dataset:
    """The rows in the columns that the harness's task reads."""
    if spec.row is None:
        return rows
    try:
        return datasets.Dataset.from_list([dict(spec.row(item, row)) for item, row in zip(items, rows, strict=True)])
    except RowError as error:
        raise DataError(f"{benchmark.name}: {error}") from error


def _task(name: str, spec: FewShot, subject: str, asked: datasets.Dataset, shown: datasets.Dataset, shots: int) -> Task:
    splits = {"test": asked, "validation": asked, "train": shown, "dev": shown}
    settings: dict[str, Any] = {"custom_dataset": lambda **_: splits, "num_fewshot": shots}
    with quiet():
        if spec.config is not None:
            task = ConfigurableTask(config={**spec.config, **settings})
        else:
            manager, entry = _manager(spec.folder), spec.task.format(subject=subject)
            if spec.other_subject is not None and entry not in manager.all_tasks:
                entry, description = spec.other_subject
                settings["description"] = description.format(subject=subject.replace("_", " "))
            # In a group, the settings of a task override fields of its file; alone they would replace the file.
            task = manager.load({"group": "superexperts", "task": [{"task": entry, **settings}]})["tasks"][entry]
    # The harness draws one row more if it has to leave out the row that it asks.
    needed = shots + (_excluded(task) if shots else 0)
    if len(shown) < needed:
        raise DataError(
            f"{shots} examples are drawn from {needed} rows, {name} has {len(shown)}; give fewer", field="num_fewshot"
        )
    return task


@functools.cache
def _manager(folder: str) -> TaskManager:
    return TaskManager(include_path=Path(lm_eval.tasks.__file__).parent / folder, include_defaults=False)


def _excluded(task: Any) -> bool:
    """Whether the harness leaves the asked row out of the examples, because both can come from the same split."""
    return bool(task.fewshot_cfg.split == task.config.test_split)


class _Drawn(ContextSampler):  # type: ignore[misc]  # the harness is untyped
    """Returns given examples instead of drawing some."""

    def __init__(self, examples: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(list(examples))

    def sample(self, n: int, *_: Any, **__: Any) -> Sequence[Mapping[str, Any]]:
        assert n == len(self.df)
        return list(self.df)


def with_examples(
    task: Any,
    positions: Sequence[int],
    shots: int,
    template: Callable[..., str] | None = None,
    system_prompt: str | None = None,
) -> list[tuple[Any, str]]:
    """(row, context) of some rows of a task, with the examples that a run over all its rows would show them.

    `positions` are the numbers of the rows, ascending. With a `template`, which makes text of messages, examples and
    question are the turns of a chat.
    """
    rows = task.eval_docs
    how: dict[str, Any] = {}
    if template is not None:
        how = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": template}
        how["system_instruction"] = system_prompt
    if shots == 0:
        return [(rows[i], _context(task, rows[i], 0, how)) for i in positions]
    sampler = task.sampler.set_rnd(FEWSHOT_SEED)
    chosen, found = set(positions), []
    try:
        # Each draw moves the generator on, so we draw for the rows in between as well.
        for i in range(positions[-1] + 1):
            row = rows[i] if i in chosen or _excluded(task) else None
            drawn = sampler.sample(shots, eval_doc=row if _excluded(task) else None)
            if i in chosen:
                task.sampler = _Drawn(drawn)
                found.append((row, _context(task, row, shots, how)))
    finally:
        task.sampler = sampler
    return found


def _context(task: Any, row: Any, shots: int, how: Mapping[str, Any]) -> str:
    context: str = task.fewshot_context(doc=row, num_fewshot=shots, gen_prefix=task.doc_to_prefix(row), **how)
    return context
