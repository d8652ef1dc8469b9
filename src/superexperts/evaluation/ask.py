"""Puts a benchmark's items to a model through lm-evaluation-harness: which ones, in which process, and the answers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from superexperts.benchmarks import Benchmark, Item, choice_labels, load_benchmarks, prompt, with_examples
from superexperts.core.distributed import gathered, my_share
from superexperts.core.runs import MANIFEST, fingerprint, input_key, made_from, read_json
from superexperts.core.types import Answer
from superexperts.engines.harness import HfAsker, quiet
from superexperts.engines.journal import Given, Journal, numbered

__all__ = ["answers_key", "ask", "ask_one", "chosen_items", "finished_answers"]

NOT_OF_AN_ANSWER = ("tasks", "limit", "shuffle", "perplexity", "column", "tokens", "seq_len", "reference_windows")
"""Options that decide what else is asked, and that cannot change the answer to one item."""


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
    """Greedy answers to the first `limit` items of each benchmark, in the items' order.

    `model` is a transformers causal language model, wrapped by PEFT or not; the rest as for `load_benchmarks`.
    """
    benchmarks = load_benchmarks(tasks, data_dir, protocol=protocol, num_fewshot=num_fewshot)
    asker = HfAsker(model, tokenizer, batch_size, max_new_tokens)
    return {
        name: ask_one(
            asker,
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
    """Numbers of the items that are asked, ascending: the first `limit` of all `count`, or of all in a seeded order.

    With the same text in `shuffled_by` a larger sample holds a smaller one.
    """
    order = list(range(count))
    if shuffled_by is not None:
        random.Random(shuffled_by).shuffle(order)
    return sorted(order[:limit])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question:
    """An item as it is asked."""

    item: Item
    prompt: str
    num_fewshot: int
    requests: list[Any]
    """The harness's: one to generate, or one for each choice to compare."""
    lengths: tuple[int, ...]
    """Characters of each choice, as the harness counts them for acc_norm; empty where nothing is compared."""


def ask_one(
    asker: Any,
    name: str,
    benchmark: Benchmark,
    numbers: Sequence[int],
    *,
    variant: str,
    seed: int,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> list[Answer]:
    """Answers to the items of those numbers, ascending, in every process; each process asks its share."""
    set_seed(seed)
    with quiet():
        questions = _questions(name, benchmark, numbers, max_new_tokens)
        mine = my_share(questions)
        keeper = None if journal is None else numbered(journal, [question.item.id for question in mine])
        with asker.asking(f"{variant}: {name}", len(mine), keeper):
            if mine and mine[0].lengths:
                values = asker.choice_loglikelihoods([question.requests for question in mine])
            else:
                values = asker.generate_until([request for question in mine for request in question.requests])
    given: dict[str, Given] = {}
    for part in gathered({question.item.id: value for question, value in zip(mine, values, strict=True)}):
        given |= part
    return [_answer(question, given[question.item.id], name, variant, seed) for question in questions]


def _questions(name: str, benchmark: Benchmark, numbers: Sequence[int], max_new_tokens: int) -> list[_Question]:
    wanted, found = set(numbers), {}
    for part in benchmark.parts:
        task: Any = part.task
        positions = [position for position, number in enumerate(part.numbers) if number in wanted]
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


def answers_key(inputs: Mapping[str, Any], name: str) -> str:
    """What must be equal for the answers to a benchmark's items to be up to date, whatever else is asked.

    `inputs` are the inputs of the evaluation, as its manifest holds them.
    """
    options = {option: value for option, value in inputs["options"].items() if option not in NOT_OF_AN_ANSWER}
    more = {what: value for what, value in inputs.items() if what not in ("options", "data", "perplexity")}
    return input_key("evaluate", {"options": options, "data": inputs["data"][name], **more})


def finished_answers(folder: Path, keys: Mapping[str, str]) -> dict[str, dict[str, Given]]:
    """What a finished run's files hold for the benchmarks that it asked under these very keys: id -> what was given.

    Files that have changed since are left out.
    """
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_json(folder / MANIFEST, "manifest")
    inputs = made_from(manifest, "evaluate")
    if inputs is None:
        return {}
    asked = {name: answers_key(inputs, name) for name in inputs.get("data", {})}
    outputs = manifest.get("outputs", {})
    found: dict[str, dict[str, Given]] = {}
    for name, key in keys.items():
        file = folder / "answers" / f"{name}.jsonl"
        if asked.get(name) != key or not file.is_file() or fingerprint(file) != outputs.get(f"answers/{name}.jsonl"):
            continue
        answers = [Answer.from_json(json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line]
        found[name] = {answer.id: _given(answer) for answer in answers}
    return found


def _given(answer: Answer) -> Given:
    return answer.response if answer.loglikelihoods is None else [nats for _, nats, _ in answer.loglikelihoods]
