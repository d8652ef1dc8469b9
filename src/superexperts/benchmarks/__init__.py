"""The registry of benchmarks. To add one: write a file like `gsm8k.py`, and add its line here."""

from __future__ import annotations

import importlib

from superexperts.benchmarks.base import Benchmark

__all__ = ["BENCHMARKS", "default_benchmarks", "result_columns", "title_of"]

_FILES = (
    "mmlu.MMLU",
    "gsm8k.GSM8K",
    "arc.ARC_EASY",
    "boolq.BOOLQ",
    "medqa.MEDQA",
    "vmlu.VMLU",
    "arc.ARC_CHALLENGE",
    "openbookqa.OPENBOOKQA",
)
"""File and name of each benchmark, in the order in which they are listed and asked."""


def _load(place: str) -> Benchmark:
    file, name = place.split(".")
    benchmark: Benchmark = getattr(importlib.import_module(f"superexperts.benchmarks.{file}"), name)
    return benchmark


BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in map(_load, _FILES)}
"""Name -> benchmark."""


def default_benchmarks() -> tuple[str, ...]:
    """Names of the benchmarks that are asked by default, in the order in which they are asked."""
    return tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.result_column is not None)


def result_columns() -> tuple[str, ...]:
    """Names of the benchmarks in result.csv, in the order of its columns."""
    return tuple(sorted(default_benchmarks(), key=lambda name: BENCHMARKS[name].result_column or 0))


def title_of(name: str) -> str:
    """The benchmark's name in tables; the name itself if it is not in the registry."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def default_shots() -> str:
    """How many examples the few-shot protocol shows by default, such as `5 for mmlu, gsm8k and vmlu, else 0`."""
    shots: dict[int, list[str]] = {}
    for name, benchmark in BENCHMARKS.items():
        if benchmark.few_shot is not None and benchmark.few_shot.shots:
            shots.setdefault(benchmark.few_shot.shots, []).append(name)
    parts = [
        f"{number} for {' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"
        for number, names in shots.items()
    ]
    return f"{', '.join(parts)}, else 0"
