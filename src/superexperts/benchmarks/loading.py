"""Loads benchmarks from local files or the Hub, as lm-evaluation-harness tasks, and checks every row first."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task

from superexperts.benchmarks import BENCHMARKS
from superexperts.benchmarks.base import Benchmark, Item, Row, prompt
from superexperts.benchmarks.fewshot import few_shot_tasks
from superexperts.benchmarks.quiet import quiet
from superexperts.core.errors import DataError, Field
from superexperts.core.jsonl import read_rows, require_text
from superexperts.core.runs import digest, fingerprint
from superexperts.data.corpora import local_data
from superexperts.pocket import write_benchmarks

__all__ = ["LoadedBenchmark", "Part", "harness_task", "load_benchmarks"]


_UNREADABLE = (datasets.exceptions.DatasetsError, ValueError, OSError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A harness task, and which of the benchmark's items it asks, in its order."""

    task: Task
    numbers: Sequence[int]
    num_fewshot: int = 0
    """Examples before each question."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedBenchmark:
    """The checked items of a benchmark, and the harness's tasks that ask them: one, or one for each subject."""

    parts: tuple[Part, ...]
    items: tuple[Item, ...]
    protocol: str = "generative"
    examples: str | None = None
    """Digest of the rows that examples are drawn from."""

    @property
    def sha(self) -> str:
        """Digest of everything that is asked and of what counts as right."""
        shots = [part.num_fewshot for part in self.parts]
        return digest([self.protocol, shots, self.examples, *(list(vars(item).values()) for item in self.items)])


def load_benchmarks(
    names: Sequence[str],
    data_dir: Path | None = None,
    *,
    protocol: str = "generative",
    num_fewshot: int | None = None,
    split: str = "default",
) -> dict[str, LoadedBenchmark]:
    """Loads and checks every row of the named benchmarks, before anything is asked.

    `data_dir` is a folder of JSONL files, or `pocket` for the data of the pocket world. The default is the folder in
    the environment variable SUPEREXPERTS_DATA, and the Hub if that is not set. With the protocol `loglikelihood`,
    `num_fewshot` examples precede each question (None: the benchmark's default). `split="test"` asks the rows
    without published gold answers. `DataError` names the file, the row and the field.
    """
    folder = local_data(data_dir)
    with contextlib.ExitStack() as stack:
        if folder is not None and str(folder) == "pocket":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_benchmarks(folder)
        loaded = {}
        for name in names:
            benchmark = BENCHMARKS[name]
            found = _hub(name) if folder is None else _local(benchmark, folder, split)
            if split == "default":
                _require_gold(benchmark, found)
            if protocol == "loglikelihood":
                found = _few_shot(benchmark, found, folder, num_fewshot)
            loaded[name] = found
    return loaded


def _require_gold(benchmark: Benchmark, found: LoadedBenchmark) -> None:
    odd = next((item.id for item in found.items if item.gold is None), None)
    if odd is None:
        return
    hint: tuple[str, ...] = ("add it",)
    if benchmark.withheld is not None:
        hint = ("to ask rows without published answers, give ", Field("split"), " test")
    raise DataError(f"{benchmark.name}: {odd}: field 'answer' is missing; ", *hint)


def _few_shot(
    benchmark: Benchmark, loaded: LoadedBenchmark, folder: Path | None, num_fewshot: int | None
) -> LoadedBenchmark:
    """The same items, asked by the harness's few-shot tasks."""
    shots = num_fewshot
    if shots is None:
        shots = 0 if benchmark.few_shot is None else benchmark.few_shot.shots
    [part] = loaded.parts
    examples, where = None, None
    if shots > 0 and folder is not None:
        file = _file(benchmark.examples_file, folder, numbered=True)
        if file is None:
            raise DataError(
                f"{str(folder)!r} has no {benchmark.examples_file}.jsonl or .jsonl.gz, from which the {shots} examples "
                f"of {benchmark.name} are drawn; add it, or give ",
                Field("num_fewshot"),
                " 0",
                field="data_dir",
            )
        found = _local_cached(benchmark.name, file.resolve(), fingerprint(file))
        examples, where = found.parts[0].task.eval_docs, str(file)
    elif shots > 0:
        examples, where = part.task.dataset[benchmark.examples_split], f"the examples of {benchmark.name} on the Hub"
    if examples is not None:
        _items(benchmark, examples, str(where))  # raises if a row is wrong
    tasks = few_shot_tasks(benchmark, loaded.items, part.task.eval_docs, examples, shots)
    parts = tuple(Part(task=task, numbers=numbers, num_fewshot=fewest) for task, numbers, fewest in tasks)
    return LoadedBenchmark(
        parts=parts,
        items=loaded.items,
        protocol="loglikelihood",
        # Whole rows and not only items: GSM8K's rows also show how the answer is reached.
        examples=digest([sorted((field, str(value)) for field, value in row.items()) for row in examples or ()]),
    )


def _file(stem: str, folder: Path, *, numbered: bool = False) -> Path | None:
    """The file with that stem; None if there is none. `numbered` also accepts a number after the stem."""
    plain = [folder / f"{stem}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]
    parts = sorted(folder.glob(f"{stem}[0-9]*.jsonl*")) if numbered else []
    return next((file for file in [*plain, *parts] if file.is_file()), None)


def _local(benchmark: Benchmark, folder: Path, split: str) -> LoadedBenchmark:
    stem = benchmark.file
    if split == "test" and benchmark.withheld is not None:
        stem = benchmark.withheld.file
    file = _file(stem, folder) or _file(benchmark.other_file or stem, folder)
    if file is not None:
        return _local_cached(benchmark.name, file.resolve(), fingerprint(file))
    for other in sorted(folder.glob(f"{stem}.*")):
        require_text(other, "data_dir")
    hint = f"; get {benchmark.source}" if benchmark.source else ""
    raise DataError(
        f"{str(folder)!r} has no {stem}.jsonl or .jsonl.gz for {benchmark.name}; add it, or leave {benchmark.name} out "
        "of ",
        Field("tasks"),
        hint,
        field="data_dir",
    )


@functools.lru_cache(maxsize=16)  # a study asks every variant the same questions
def _local_cached(name: str, file: Path, sha: str) -> LoadedBenchmark:
    benchmark = BENCHMARKS[name]
    rows = [row for _, row in read_rows(file, "data_dir")]  # raises if a line is not a JSON object
    items = _items(benchmark, rows, str(file))
    try:
        # Not by the JSON reader of `datasets`: where one row of a column is a number, it parses all texts as JSON.
        dataset = datasets.Dataset.from_list(_one_type(rows))
        task = harness_task(name, {"custom_dataset": lambda **_: {benchmark.split: dataset}})
    except (DataError, *_UNREADABLE, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file} cannot be read as {name} ({reason}); repair the file", field="data_dir") from error
    if _items(benchmark, task.eval_docs, str(file)) != items:
        raise DataError(f"{file} has numbers and texts in one column; write all as texts", field="data_dir")
    return _whole(task, items)


def _one_type(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with numbers as texts in the columns that also hold texts, since a table has one type for a column."""
    kinds: dict[tuple[str, ...], set[type]] = collections.defaultdict(set)

    def walk(value: Any, place: tuple[str, ...], change: Callable[[Any, tuple[str, ...]], Any]) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, (*place, name), change) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, (*place, ""), change) for inner in value]
        return change(value, place)

    for row in rows:
        walk(row, (), lambda value, place: kinds[place].add(type(value)))

    def as_text(value: Any, place: tuple[str, ...]) -> Any:
        return str(value) if str in kinds[place] and isinstance(value, int | float) else value

    return [walk(row, (), as_text) for row in rows]


@functools.cache
def _hub(name: str) -> LoadedBenchmark:
    benchmark = BENCHMARKS[name]
    try:
        task = harness_task(name)
    except _UNREADABLE as error:
        raise DataError(
            f"{name} cannot be read from the Hub ({type(error).__name__}); check the network, or give files with ",
            Field("data_dir"),
            field="tasks",
        ) from error
    return _whole(task, _items(benchmark, task.eval_docs, f"{task.config.dataset_path} on the Hub"))


def _whole(task: Task, items: tuple[Item, ...]) -> LoadedBenchmark:
    return LoadedBenchmark(parts=(Part(task=task, numbers=range(len(items))),), items=items)


def harness_task(name: str, source: Mapping[str, Any] | None = None) -> Task:
    """The benchmark as a zero-shot task of lm-evaluation-harness, which `lm_eval.evaluate` can run.

    It generates greedily until the model goes on to another question, and has no metric, because `extract` reads the
    responses. `source` says where the rows come from, as the harness's settings `dataset_path` and `dataset_kwargs`;
    the default is the Hub, and a `DataError` for a benchmark that is not there.
    """
    benchmark = BENCHMARKS[name]
    config = {
        "task": name,
        **(source or _hub_source(benchmark)),
        "test_split": benchmark.split,
        "output_type": "generate_until",
        "doc_to_text": lambda row: prompt(benchmark.item(row, 0)),
        "doc_to_target": lambda row: benchmark.item(row, 0).gold or "",
        "process_results": _unscored,
        "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
        "num_fewshot": 0,
        "fewshot_config": {"samples": []},  # without it the harness lists all test rows as a source of examples
        # The end-of-sequence token always stops a response as well. `ask` sets `max_gen_toks` for each run.
        "generation_kwargs": {"until": ["\nQuestion:"], "do_sample": False},
    }
    with quiet():
        return ConfigurableTask(config=config)


def _hub_source(benchmark: Benchmark) -> dict[str, Any]:
    hub = benchmark.hub
    if hub is None:
        raise DataError(
            f"{benchmark.name} is not on the Hub; get {benchmark.source or 'its rows'}, put them into a folder as "
            f"{benchmark.file}.jsonl, and name the folder with ",
            Field("data_dir"),
            field="tasks",
        )
    return {"dataset_path": hub.path, "dataset_name": hub.config, "dataset_kwargs": {"revision": hub.revision}}


def _unscored(row: Row, responses: list[str]) -> dict[str, float]:
    """`extract` reads the raw responses, and counts what it cannot read."""
    return {"bypass": 0.0}


def _items(benchmark: Benchmark, rows: Iterable[Row], where: str) -> tuple[Item, ...]:
    name = benchmark.name
    try:
        items = tuple(benchmark.item(row, index) for index, row in enumerate(rows))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not items:
        raise DataError(f"{where}: {name} has no rows; give a file with at least one")
    twice = [item_id for item_id, count in collections.Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{where}: {name} has two rows with the id {twice[0]!r}; give every row a different id")
    return items
