"""The benchmarks as lm-evaluation-harness tasks, their rows from the Hub or from local files, checked up front."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from superexperts.benchmarks.fewshot import DEFAULT_SHOTS, few_shot_tasks
from superexperts.benchmarks.items import Item, read_item
from superexperts.benchmarks.quiet import quiet
from superexperts.core.errors import DataError, Field
from superexperts.core.jsonl import read_rows
from superexperts.core.runs import digest, fingerprint
from superexperts.data.corpora import local_data
from superexperts.pocket import write_benchmarks

__all__ = ["FILE_STEMS", "Benchmark", "Part", "load_benchmarks"]

FILE_STEMS = {
    "mmlu": "mmlu_all_test",
    "gsm8k": "gsm8k_main_test",
    "arc_easy": "arc_easy_test",
    "arc_challenge": "arc_challenge_test",
    "openbookqa": "openbookqa_test",
    "boolq": "boolq_validation",
    "medqa": "medqa_gbaker_test",
    "vmlu": "vmlu_valid",
}
"""Name, without .jsonl or .jsonl.gz, of each benchmark's file below --data-dir."""

SPLITS = {"boolq": "validation", "vmlu": "valid"}
"""Split that is asked, where it is not `test`, as the task files have it."""

EXAMPLE_STEMS = {
    "mmlu": "mmlu_all_dev",
    "gsm8k": "gsm8k_main_train",
    "arc_easy": "arc_easy_train",
    "arc_challenge": "arc_challenge_train",
    "openbookqa": "openbookqa_train",
    "boolq": "boolq_train",
    "medqa": "medqa_gbaker_train",
    "vmlu": "vmlu_dev",
}
"""The same of the files that few-shot examples come from; a number behind the name says that it has so many rows only.
"""

OTHER_STEMS = {"medqa": "medqa_lavita_test"}
"""The same of files in another published shape, read where the usual one is not there."""

TEST_STEMS = {"vmlu": "vmlu_test"}
"""The same of the files whose gold answers the publisher keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A harness task and which of the benchmark's items its rows are, in its order."""

    task: Task
    numbers: Sequence[int]
    num_fewshot: int = 0
    """Examples before each question."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Checked items, and the harness's tasks that ask them: one, or one for each subject."""

    parts: tuple[Part, ...]
    items: tuple[Item, ...]
    protocol: str = "generative"
    examples: str | None = None
    """Digest of the rows that examples are drawn from."""

    @property
    def sha(self) -> str:
        """Digest of everything that is asked and of what counts as right."""
        shots = [part.num_fewshot for part in self.parts]
        return digest([self.protocol, shots, self.examples, *map(_values, self.items)])


def _values(item: Item) -> list[Any]:
    return list(vars(item).values())


def load_benchmarks(
    names: Sequence[str],
    data_dir: Path | None = None,
    *,
    protocol: str = "generative",
    num_fewshot: int | None = None,
    split: str = "default",
) -> dict[str, Benchmark]:
    """Loads and checks every row of the named benchmarks, before anything is asked.

    `data_dir` is a folder of JSONL files (default: the environment's SUPEREXPERTS_DATA; without either, the Hub), or
    `pocket` for the pocket world's. With the protocol `loglikelihood`, `num_fewshot` examples stand before each
    question (None: as many as DEFAULT_SHOTS has). `split="test"` asks VMLU's test rows, whose gold answers are not
    published. `DataError` names the file, the row and the field.
    """
    folder = local_data(data_dir)
    with contextlib.ExitStack() as stack:
        if folder is not None and str(folder) == "pocket":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_benchmarks(folder)
        loaded = {}
        for name in names:
            benchmark = _graded(name, _local(name, folder, split) if folder is not None else _hub(name), split)
            if protocol == "loglikelihood":
                shots = DEFAULT_SHOTS[name] if num_fewshot is None else num_fewshot
                benchmark = _few_shot(name, benchmark, folder, shots)
            loaded[name] = benchmark
    return loaded


def _graded(name: str, benchmark: Benchmark, split: str) -> Benchmark:
    if split == "default" and any(item.gold is None for item in benchmark.items):
        odd = next(item.id for item in benchmark.items if item.gold is None)
        raise DataError(
            f"{name}: {odd}: field 'answer' is missing; VMLU's test rows have none: ask them with ",
            Field("split"),
            " test",
        )
    return benchmark


def _few_shot(name: str, benchmark: Benchmark, folder: Path | None, shots: int) -> Benchmark:
    """The same items, asked by the harness's own few-shot tasks."""
    [part] = benchmark.parts
    examples, where = None, None
    if shots > 0 and folder is not None:
        file = _file(name, EXAMPLE_STEMS[name], folder, numbered=True)
        if file is None:
            raise DataError(
                (
                    f"{folder} has no {EXAMPLE_STEMS[name]}.jsonl or .jsonl.gz, from which {name}'s {shots} examples "
                    "are drawn; add it, or give "
                ),
                Field("num_fewshot"),
                " 0",
                field="data_dir",
            )
        found = _local_cached(name, file.resolve(), fingerprint(file))
        examples, where = found.parts[0].task.eval_docs, str(file)
    elif shots > 0:
        examples, where = part.task.dataset["dev" if name == "mmlu" else "train"], f"{name}'s examples on the Hub"
    if examples is not None:
        _items(name, examples, str(where))  # says what is wrong with a row
    tasks = few_shot_tasks(name, benchmark.items, part.task.eval_docs, examples, shots)
    parts = tuple(Part(task=task, numbers=numbers, num_fewshot=fewest) for task, numbers, fewest in tasks)
    return Benchmark(
        parts=parts,
        items=benchmark.items,
        protocol="loglikelihood",
        # Whole rows: GSM8K's show how the answer is reached.
        examples=digest([sorted((field, str(value)) for field, value in row.items()) for row in examples or ()]),
    )


def _file(name: str, stem: str, folder: Path, *, numbered: bool = False) -> Path | None:
    """The benchmark's file of that stem; None where there is none."""
    plain = [folder / f"{stem}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]
    parts = sorted(folder.glob(f"{stem}[0-9]*.jsonl*")) if numbered else []
    return next((file for file in [*plain, *parts] if file.is_file()), None)


def _local(name: str, folder: Path, split: str) -> Benchmark:
    stem = TEST_STEMS.get(name, FILE_STEMS[name]) if split == "test" else FILE_STEMS[name]
    file = _file(name, stem, folder) or _file(name, OTHER_STEMS.get(name, stem), folder)
    if file is not None:
        return _local_cached(name, file.resolve(), fingerprint(file))
    hint = "; fetch VMLU MQA v1.5 from github.com/ZaloAI-Jaist/VMLU" if name == "vmlu" else ""
    raise DataError(
        f"{folder} has no {stem}.jsonl or .jsonl.gz for {name}; add it, or leave {name} out of ",
        Field("tasks"),
        f"{hint}",
        field="data_dir",
    )


@functools.lru_cache(maxsize=16)  # a study asks every variant the same questions
def _local_cached(name: str, file: Path, sha: str) -> Benchmark:
    # A cache of its own, in memory: Arrow files of a temporary folder's rows must not pile up in the user's cache.
    with tempfile.TemporaryDirectory() as cache:
        source = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {SPLITS.get(name, "test"): str(file)},
                "cache_dir": cache,
                "keep_in_memory": True,
            },
        }
        try:
            task = _task(name, source)
        # StopIteration is what datasets raises for an empty file.
        except (datasets.exceptions.DatasetsError, ValueError, TypeError, LookupError, OSError, StopIteration) as error:
            rows = [row for _, row in read_rows(file, f"--data-dir: {name}")]  # says which line is no JSON object
            _items(name, rows, str(file))
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{file} cannot be read as {name} ({reason}); repair the file", field="data_dir") from error
    return _whole(task, _items(name, task.eval_docs, str(file)))


@functools.cache
def _hub(name: str) -> Benchmark:
    if name == "vmlu":
        raise DataError(
            (
                "vmlu is not on the Hub; get VMLU MQA v1.5 from github.com/ZaloAI-Jaist/VMLU, put its "
                "valid.jsonl into a folder as vmlu_valid.jsonl, and name the folder with "
            ),
            Field("data_dir"),
            field="tasks",
        )
    try:
        task = _task(name, {})
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            (
                f"{name} cannot be read from the Hub ({type(error).__name__}); check the network, or give local "
                "files with "
            ),
            Field("data_dir"),
            field="tasks",
        ) from error
    return _whole(task, _items(name, task.eval_docs, f"{task.config.dataset_path} on the Hub"))


def _whole(task: Task, items: tuple[Item, ...]) -> Benchmark:
    return Benchmark(parts=(Part(task=task, numbers=range(len(items))),), items=items)


def _task(name: str, source: Mapping[str, Any]) -> Task:
    with quiet():  # "Generating test split" twice a second is no progress
        # Inside a group, a task's entry overrides fields of the task file; alone it would replace the file.
        return _manager().load({"group": "superexperts", "task": [{"task": name, **source}]})["tasks"][name]


@functools.cache
def _manager() -> TaskManager:
    return TaskManager(include_path=Path(__file__).parent, include_defaults=False)


def _items(name: str, rows: Iterable[Mapping[str, Any]], where: str) -> tuple[Item, ...]:
    try:
        items = tuple(read_item(name, row, index) for index, row in enumerate(rows))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not items:
        raise DataError(f"{where}: {name} has no rows; give a file with at least one")
    twice = [item_id for item_id, count in collections.Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{where}: {name} has two rows with the id {twice[0]!r}; give every row its own")
    return items
