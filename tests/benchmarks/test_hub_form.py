"""Benchmarks from the Hub: pinned commits, and the same items as from local files. The Hub itself is not asked."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from superexperts.benchmarks import loading
from superexperts.benchmarks.fewshot import with_examples
from superexperts.benchmarks.loading import load_benchmarks
from superexperts.core.errors import DataError

HUB = {
    "mmlu": ("cais/mmlu", "all", {"test": "mmlu_all_test", "dev": "mmlu_all_dev"}),
    "gsm8k": ("openai/gsm8k", "main", {"test": "gsm8k_main_test", "train": "gsm8k_main_train500"}),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", {"test": "arc_easy_test", "train": "arc_easy_train500"}),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", {"test": "arc_challenge_test", "train": "arc_easy_train500"}),
    "boolq": ("google/boolq", None, {"validation": "boolq_validation", "train": "boolq_train500"}),
    "medqa": ("GBaker/MedQA-USMLE-4-options", None, {"test": "medqa_gbaker_test", "train": "medqa_gbaker_test"}),
}


@pytest.fixture
def hub(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """Stands in for the Hub with real rows; gives what it was asked for."""

    def serve(task: str) -> list[dict[str, Any]]:
        path, name, splits = HUB[task]
        calls: list[dict[str, Any]] = []

        def load_dataset(**asked: Any) -> datasets.DatasetDict:
            calls.append(asked)
            assert (asked["path"], asked["name"]) == (path, name)
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(_rows(shared_data, s)) for split, s in splits.items()}
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.delenv("SUPEREXPERTS_DATA", raising=False)
        loading._hub.cache_clear()
        return calls

    yield serve
    loading._hub.cache_clear()


def _rows(folder: Path, stem: str) -> list[dict[str, Any]]:
    file = next(folder.glob(f"{stem}.jsonl*"))
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.parametrize("task", HUB)
def test_the_same_items_from_the_hub_at_a_pinned_commit(
    task: str, hub: Callable[[str], list[dict[str, Any]]], shared_data: Path
) -> None:
    local = load_benchmarks([task], shared_data)[task]
    calls = hub(task)
    found = load_benchmarks([task])[task]
    assert found.items == local.items
    assert found.sha == local.sha
    [call] = calls
    assert re.fullmatch(r"[0-9a-f]{40}", call["revision"])


@pytest.mark.parametrize("task", ["mmlu", "gsm8k", "boolq"])
def test_examples_come_from_the_hubs_own_split(
    task: str, hub: Callable[[str], list[dict[str, Any]]], shared_data: Path
) -> None:
    settings: dict[str, Any] = {"protocol": "loglikelihood", "num_fewshot": 2}
    local = load_benchmarks([task], shared_data, **settings)[task]
    calls = hub(task)
    found = load_benchmarks([task], **settings)[task]
    assert len(calls) == 1
    assert found.sha == local.sha
    for mine, other in zip(found.parts[:2], local.parts[:2], strict=True):
        contexts = [[text for _, text in with_examples(part.task, [0, 1, 5], 2)] for part in (mine, other)]
        assert contexts[0] == contexts[1]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("SUPEREXPERTS_DATA", raising=False)
    loading._hub.cache_clear()
    with pytest.raises(DataError, match=r"boolq cannot be read from the Hub \(ConnectionError\); .*data_dir") as caught:
        load_benchmarks(["boolq"])
    assert "\n" not in str(caught.value)
