"""The six benchmarks as lm-evaluation-harness tasks, their rows from the Hub or from local files, checked up front."""

from __future__ import annotations

import collections
import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from ..corpora import local_data, read_rows
from ..errors import DataError
from ..pocket import write_benchmarks
from ..rundir import digest, fingerprint
from .items import Item, read_item

__all__ = ["FILE_STEMS", "Benchmark", "load_benchmarks"]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A harness task with its items, one for each of its rows."""

    task: Task
    items: tuple[Item, ...]

    @property
    def sha(self) -> str:
        """Digest of everything that is asked and of what counts as right."""
        return digest([dataclasses.astuple(item) for item in self.items])


def load_benchmarks(names: Sequence[str], data_dir: Path | None = None) -> dict[str, Benchmark]:
    """Loads and checks every row of the named benchmarks, before anything is asked.

    `data_dir` is a folder of JSONL files (default: the environment's SUPEREXPERTS_DATA; without either, the Hub), or
    `pocket` for the pocket world's. `DataError` names the file, the row and the field.
    """
    folder = local_data(data_dir)
    if folder is not None and str(folder) == "pocket":
        with tempfile.TemporaryDirectory() as temporary:
            write_benchmarks(Path(temporary))
            return {name: _local(name, Path(temporary)) for name in names}
    if folder is not None:
        return {name: _local(name, folder) for name in names}
    return {name: _hub(name) for name in names}


def _local(name: str, folder: Path) -> Benchmark:
    for suffix in (".jsonl", ".jsonl.gz"):
        file = folder / f"{FILE_STEMS[name]}{suffix}"
        if file.is_file():
            return _local_cached(name, file.resolve(), fingerprint(file))
    hint = "; fetch VMLU MQA v1.5 from github.com/ZaloAI-Jaist/VMLU" if name == "vmlu" else ""
    raise DataError(
        f"--data-dir: {folder} has no {FILE_STEMS[name]}.jsonl or .jsonl.gz for {name}; add it, or leave {name} out "
        f"of --tasks{hint}"
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
            raise DataError(f"--data-dir: {file} cannot be read as {name} ({reason}); repair the file") from error
    return Benchmark(task=task, items=_items(name, task.eval_docs, str(file)))


@functools.cache
def _hub(name: str) -> Benchmark:
    if name == "vmlu":
        raise DataError(
            "--tasks: vmlu is not on the Hub; get VMLU MQA v1.5 from github.com/ZaloAI-Jaist/VMLU, put its valid.jsonl "
            "into a folder as vmlu_valid.jsonl, and name the folder with --data-dir"
        )
    try:
        task = _task(name, {})
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"--tasks: {name} cannot be read from the Hub ({type(error).__name__}); check the network, or give local "
            "files with --data-dir"
        ) from error
    return Benchmark(task=task, items=_items(name, task.eval_docs, f"{task.config.dataset_path} on the Hub"))


def _task(name: str, source: Mapping[str, Any]) -> Task:
    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # "Generating test split" twice a second is no progress
    try:
        # Inside a group, a task's entry overrides fields of the task file; alone it would replace the file.
        return _manager().load({"group": "superexperts", "task": [{"task": name, **source}]})["tasks"][name]
    finally:
        if progress:
            datasets.enable_progress_bars()


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
