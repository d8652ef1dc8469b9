"""Asks a model the items of benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from superexperts.benchmarks.base import Item, prompt
from superexperts.benchmarks.fewshot import choice_labels, with_examples
from superexperts.benchmarks.loading import LoadedBenchmark, load_benchmarks
from superexperts.core.distributed import gathered, my_share
from superexperts.core.types import Answer
from superexperts.engines.harness import TransformersModel, quiet
from superexperts.engines.journal import Given, Journal, numbered

__all__ = ["ask", "ask_one", "chosen_items"]


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    data_dir: Path | None = None,
    limit: int | None = None,
    variant: str = "base",
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 512,
    protocol: str = "generative",
    num_fewshot: int | None = None,
) -> dict[str, list[Answer]]:
    """Greedy answers to the first `limit` items of each benchmark, in the order of the items.

    `model` is a transformers causal language model, with or without a PEFT adapter. The other arguments are those of
    `load_benchmarks`, which raises `DataError`.
    """
    benchmarks = load_benchmarks(tasks, data_dir, protocol=protocol, num_fewshot=num_fewshot)
    answering = TransformersModel(model, tokenizer, batch_size, max_new_tokens)
    return {
        name: ask_one(
            answering,
            name,
            benchmark,
            chosen_items(len(benchmark.items), limit),
            variant=variant,
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        for name, benchmark in benchmarks.items()
    }


def chosen_items(count: int, limit: int | None, shuffled_by: str | None = None) -> list[int]:
    """Numbers of the items to ask, ascending: the first `limit` of `count`, or a sample with the seed `shuffled_by`.

    With the same seed, a larger sample contains a smaller one.
    """
    order = list(range(count))
    if shuffled_by is not None:
        random.Random(shuffled_by).shuffle(order)
    return sorted(order[:limit])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question:
    """An item with its prompt."""

    item: Item
    prompt: str
    num_fewshot: int
    requests: list[Any]
    """The harness's requests: one that generates, or one for each choice."""
    lengths: tuple[int, ...]
    """Characters of each choice, as the harness counts them for acc_norm; empty if the model generates."""


def ask_one(
    model: Any,
    name: str,
    benchmark: LoadedBenchmark,
    numbers: Sequence[int],
    *,
    variant: str,
    seed: int,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> list[Answer]:
    """Answers of `model`, a `HarnessModel`, to the items with these numbers, ascending.

    Each process asks its share, and every process returns all answers.
    """
    set_seed(seed)
    with quiet():
        questions = _questions(name, benchmark, numbers, max_new_tokens)
        mine = my_share(questions)
        keeper = None if journal is None else numbered(journal, [question.item.id for question in mine])
        with model.answering(f"{variant}: {name}", len(mine), keeper):
            if mine and mine[0].lengths:
                values = model.choice_loglikelihoods([question.requests for question in mine])
            else:
                values = model.generate_until([request for question in mine for request in question.requests])
    given: dict[str, Given] = {}
    for part in gathered({question.item.id: value for question, value in zip(mine, values, strict=True)}):
        given |= part
    return [_answer(question, given[question.item.id], name, variant, seed) for question in questions]


def _questions(name: str, benchmark: LoadedBenchmark, numbers: Sequence[int], max_new_tokens: int) -> list[_Question]:
    chosen, found = set(numbers), {}
    for part in benchmark.parts:
        task: Any = part.task
        positions = [position for position, number in enumerate(part.numbers) if number in chosen]
        if not positions:
            continue
        generates = task.OUTPUT_TYPE == "generate_until"
        if generates:
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
        contexts = with_examples(task, positions, part.num_fewshot)
        for position, (row, context) in zip(positions, contexts, strict=True):
            item = benchmark.items[part.numbers[position]]
            made = task.construct_requests(doc=row, ctx=context, metadata=(name, part.numbers[position], 1))
            assert benchmark.protocol != "generative" or context == prompt(item), "the harness asks something else"
            found[part.numbers[position]] = _Question(
                item=item,
                prompt=context,
                num_fewshot=part.num_fewshot,
                requests=[made] if generates else made,
                lengths=() if generates else tuple(len(choice) for choice in task.doc_to_choice(row)),
            )
    return [found[number] for number in numbers]


def _answer(question: _Question, given: Given, task: str, variant: str, seed: int) -> Answer:
    item, compared = question.item, None
    if isinstance(given, str):
        response = given
    else:
        labels = choice_labels(item)
        compared = tuple(zip(labels, given, question.lengths, strict=True))
        response = labels[int(np.argmax(given))]
    return Answer(
        id=item.id,
        prompt=question.prompt,
        response=response,
        gold=item.gold,
        choices=item.choices,
        kind=item.kind,
        task=task,
        variant=variant,
        seed=seed,
        subject=item.subject,
        num_fewshot=question.num_fewshot,
        loglikelihoods=compared,
    )
