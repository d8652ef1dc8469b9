"""Asks a model the items of benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from superexperts.benchmarks.base import Item, prompt
from superexperts.benchmarks.fewshot import choice_labels, with_examples
from superexperts.benchmarks.loading import LoadedBenchmark, load_benchmarks
from superexperts.core.console import note
from superexperts.core.distributed import gathered, my_share
from superexperts.core.types import Answer
from superexperts.data.chat import PLAIN_STYLE, ChatStyle
from superexperts.engines.harness import TransformersModel, quiet
from superexperts.engines.journal import Given, Journal, numbered
from superexperts.engines.replies import Reply, Request
from superexperts.evaluation.prompts import PLAIN, Prompts, how_to_ask

__all__ = ["ask", "ask_one", "chosen_items", "first_prompts", "whole_prompt"]

NAMED = 3
"""Items that a message names."""


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    data_dir: Path | None = None,
    limit: int | None = None,
    limit_first: bool = False,
    variant: str = "base",
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 512,
    protocol: str = "generative",
    num_fewshot: int | None = None,
    chat_template: str = "auto",
    style: ChatStyle = PLAIN_STYLE,
) -> dict[str, list[Answer]]:
    """Greedy answers to `limit` items of each benchmark (see `chosen_items`), in the order of the items.

    `model` is a transformers causal language model, with or without a PEFT adapter. The other arguments are those of
    `load_benchmarks`, which raises `DataError`, and of `how_to_ask`.
    """
    prompts = how_to_ask(chat_template, style, tokenizer=tokenizer)
    benchmarks = load_benchmarks(tasks, data_dir, protocol=protocol, num_fewshot=num_fewshot)
    answering = TransformersModel(model, tokenizer, batch_size, max_new_tokens)
    return {
        name: ask_one(
            answering,
            name,
            benchmark,
            chosen_items(name, benchmark.items, limit, seed=seed, first=limit_first),
            variant=variant,
            seed=seed,
            max_new_tokens=max_new_tokens,
            prompts=prompts,
        )
        for name, benchmark in benchmarks.items()
    }


def chosen_items(
    name: str, items: Sequence[Item], limit: int | None, *, seed: int = 0, first: bool = False
) -> list[int]:
    """Numbers of the items to ask, ascending: all, the first `limit`, or by default a sample of `limit`.

    The sample depends on the seed, the benchmark's name and the items alone, so that every variant and engine is asked
    the same. Each subject has its share of it up to rounding (Sainte-Lague's method). With the same seed, a larger
    sample contains a smaller one.
    """
    order = list(range(len(items)))
    if limit is not None and not first:
        random.Random(f"{seed}:{name}").shuffle(order)
        size, rank = collections.Counter(item.subject for item in items), collections.Counter[str | None]()
        place = {}
        for number in order:
            subject = items[number].subject
            place[number] = (rank[subject] + 0.5) / size[subject]
            rank[subject] += 1
        order.sort(key=place.__getitem__)
    return sorted(order[:limit])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question:
    """An item with its prompt."""

    item: Item
    prompt: str
    num_fewshot: int
    requests: list[Any]
    """One request that generates, or one of the harness's for each choice."""
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
    prompts: Prompts = PLAIN,
    journal: Journal | None = None,
) -> list[Answer]:
    """Answers of `model`, a `HarnessModel`, to the items with these numbers, ascending.

    Each process asks its share, and every process returns all answers.
    """
    set_seed(seed)
    with quiet():
        if prompts.chat:
            model.add_bos_token = False  # the template writes it
        questions = _questions(name, benchmark, numbers, max_new_tokens, prompts)
        mine = my_share(questions)
        keeper = None if journal is None else numbered(journal, [question.item.id for question in mine])
        with model.answering(f"{variant}: {name}", len(mine), keeper):
            if mine and mine[0].lengths:
                values = model.choice_loglikelihoods([question.requests for question in mine])
            else:
                replies = model.replies([request for question in mine for request in question.requests])
                values = [reply.to_given() for reply in replies]
    if refused := getattr(model, "refused", None):
        _note_refused(name, {mine[number].item.id: said for number, said in refused.items()})
    given: dict[str, Given] = {}
    for part in gathered({question.item.id: value for question, value in zip(mine, values, strict=True)}):
        given |= part
    return [_answer(question, given[question.item.id], name, variant, seed) for question in questions]


def whole_prompt(name: str, benchmark: LoadedBenchmark, number: int, prompts: Prompts) -> str:
    """All that is sent to ask the item of a benchmark with this number: a text, or messages as JSON."""
    with quiet():
        [question] = _questions(name, benchmark, [number], 1, prompts)
    sent = question.requests[0]
    sent = sent.prompt if isinstance(sent, Request) else sent.args[0]
    return sent if isinstance(sent, str) else json.dumps(sent, ensure_ascii=False, indent=1)


def first_prompts(benchmark: LoadedBenchmark, prompts: Prompts, count: int) -> list[str]:
    """The zero-shot prompts of the first items, as text, on which the effect of an adapter is measured."""
    return [str(prompts.request(prompt(item), 1, ()).prompt) for item in benchmark.items[:count]]


def _questions(
    name: str, benchmark: LoadedBenchmark, numbers: Sequence[int], max_new_tokens: int, prompts: Prompts
) -> list[_Question]:
    chosen, found = set(numbers), {}
    for part in benchmark.parts:
        task: Any = part.task
        positions = [position for position, number in enumerate(part.numbers) if number in chosen]
        if not positions:
            continue
        generates = task.OUTPUT_TYPE == "generate_until"
        contexts = with_examples(task, positions, part.num_fewshot)
        asked = contexts
        if prompts.chat and benchmark.protocol != "generative":
            asked = with_examples(task, positions, part.num_fewshot, prompts.template, prompts.style.system_prompt)
        for position, (row, context), (_, whole) in zip(positions, contexts, asked, strict=True):
            item = benchmark.items[part.numbers[position]]
            assert benchmark.protocol != "generative" or context == prompt(item), "the harness asks something else"
            if generates:
                stop = tuple(task.config.generation_kwargs.get("until", ()))
                if benchmark.protocol == "generative":
                    made = [prompts.request(whole, max_new_tokens, stop)]
                else:
                    made = [
                        Request(
                            prompt=whole + prompts.style.prefill,
                            prefill=prompts.style.prefill,
                            max_new_tokens=max_new_tokens,
                            stop=stop,
                        )
                    ]
            else:
                made = task.construct_requests(
                    doc=row,
                    ctx=whole + prompts.style.prefill,
                    apply_chat_template=prompts.chat,
                    metadata=(name, part.numbers[position], 1),
                )
            found[part.numbers[position]] = _Question(
                item=item,
                prompt=context,
                num_fewshot=part.num_fewshot,
                requests=made,
                lengths=() if generates else tuple(len(choice) for choice in task.doc_to_choice(row)),
            )
    return [found[number] for number in numbers]


def _answer(question: _Question, given: Given, task: str, variant: str, seed: int) -> Answer:
    item, compared = question.item, None
    if isinstance(given, list):
        labels = choice_labels(item)
        compared = tuple(zip(labels, given, question.lengths, strict=True))
        reply = Reply(response=labels[int(np.argmax(given))])
    else:
        reply = Reply.from_given(given)
    return Answer(
        id=item.id,
        prompt=question.prompt,
        response=reply.response,
        gold=item.gold,
        choices=item.choices,
        kind=item.kind,
        task=task,
        variant=variant,
        seed=seed,
        subject=item.subject,
        num_fewshot=question.num_fewshot,
        loglikelihoods=compared,
        thoughts=reply.thoughts,
        text=reply.text,
        finish_reason=reply.finish_reason,
    )


def _note_refused(name: str, refused: Mapping[str, str]) -> None:
    """Names the first items that a server refused, and what it said."""
    first = [f"{item}: {said}" for item, said in itertools.islice(refused.items(), NAMED)]
    more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    note(f"evaluate: {name}: the server refused {len(refused)} prompts: {'; '.join(first)}{more}")
