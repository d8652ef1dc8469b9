"""Asks a model the benchmarks' questions through lm-evaluation-harness, and keeps the answers as they are given.

Base and adapter are asked by the same call with the same prompts, greedily. Nothing is scored here: see `extract`.

Shape suffixes: B prompts in a batch, L tokens of the longest one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lm_eval
import lm_eval.api.task
import torch
from lm_eval.models.huggingface import HFLM
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from . import moe
from .artifacts import Answer
from .check_adapter import gate
from .config import EvaluateConfig, identity
from .console import note, stderr
from .corpora import digest_ids, documents, local_data, pack
from .errors import OptionError
from .journal import Journal
from .lora import adapter_folder, load_adapter
from .model import checkpoint_folder, chosen_experts, load_model, load_tokenizer
from .perplexity import perplexity
from .rundir import (
    MANIFEST,
    completed,
    fingerprint,
    input_key,
    prepare_folder,
    read_json,
    write_json,
    write_manifest,
    write_text,
)
from .tasks import Benchmark, load_benchmarks, prompt

__all__ = ["ask", "run"]

PROBES, PROBE_TOKENS = 16, 256
"""Prompts on which an adapter's effect is measured before the evaluation, and the tokens kept of each."""
PERPLEXITY_SCHEMA = "superexperts/perplexity/1"


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
) -> dict[str, list[Answer]]:
    """Greedy answers to the first `limit` items of each benchmark, in the items' order.

    `model` is a transformers causal language model, wrapped by PEFT or not; `data_dir` as for `load_benchmarks`.
    """
    benchmarks = load_benchmarks(tasks, data_dir)
    asker = _Asker(model, tokenizer, batch_size, max_new_tokens)
    return {
        name: _ask_one(asker, name, benchmark, limit=limit, variant=variant, seed=seed, max_new_tokens=max_new_tokens)
        for name, benchmark in benchmarks.items()
    }


def _ask_one(
    asker: _Asker,
    name: str,
    benchmark: Benchmark,
    *,
    limit: int | None,
    variant: str,
    seed: int,
    max_new_tokens: int,
    journal: Journal | None = None,
) -> list[Answer]:
    set_seed(seed)
    task = benchmark.task
    task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    total = min(limit or len(benchmark.items), len(benchmark.items))
    with _quiet(), asker.asking(f"{variant}: {name}", total, journal):
        results = lm_eval.evaluate(
            lm=asker, task_dict={"tasks": {name: task}}, limit=limit, log_samples=True, bootstrap_iters=0
        )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    answers = []
    for sample in samples:
        item = benchmark.items[sample["doc_id"]]
        assert sample["arguments"][0][0] == prompt(item), "the harness asked something else"
        answers.append(
            Answer(
                id=item.id,
                prompt=prompt(item),
                response=sample["resps"][0][0],
                gold=item.gold,
                choices=item.choices,
                kind=item.kind,
                task=name,
                variant=variant,
                seed=seed,
            )
        )
    return answers


class _Asker(HFLM):  # type: ignore[misc]  # the harness is untyped
    """The harness's own model class, with three changes: a prompt that is cut keeps its BOS, one progress bar, and
    a journal of the answers given."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_new_tokens: int
    ) -> None:
        with _quiet():
            super().__init__(pretrained=cast(Any, model), tokenizer=cast(Any, tokenizer), batch_size=batch_size)
        self.truncated = 0
        """Prompts whose beginning was cut because the model's context has no room for them."""
        self._bar: tuple[Progress, TaskID] | None = None
        self._journal: Journal | None = None
        if max_new_tokens >= self.max_length:
            raise OptionError(
                f"--max-new-tokens: {max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{self.max_length} tokens; give less"
            )

    @contextlib.contextmanager
    def asking(self, description: str, total: int, journal: Journal | None) -> Iterator[None]:
        """Within the block answers go to the journal and are counted: by a bar, or without a terminal by one line."""
        started = time.monotonic()
        with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            self._bar, self._journal = (progress, progress.add_task(description, total=total)), journal
            try:
                yield
            finally:
                self._bar = self._journal = None
        if not stderr.is_terminal:
            note(f"{description}: {total} answers in {time.monotonic() - started:.1f} s")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As the harness does it, longest prompts first, but batch by batch, so that each can be kept."""
        given: dict[int, str] = {} if self._journal is None else dict(self._journal.answers)
        order = sorted(range(len(requests)), key=lambda i: (-len(self.tok_encode(requests[i].args[0])), i))
        if self._bar is not None:
            self._bar[0].advance(self._bar[1], len(given))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if all(i in given for i in batch):
                continue
            truncated = self.truncated
            responses = super().generate_until([requests[i] for i in batch], disable_tqdm=True)
            given |= dict(zip(batch, responses, strict=True))
            if self._journal is not None:
                self._journal.add({i: given[i] for i in batch}, self.truncated - truncated)
        return [given[i] for i in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **more: Any) -> Tensor:
        with torch.inference_mode():
            output = super()._model_generate(context, max_length, stop, **more)
        if self._bar is not None:
            progress, bar = self._bar
            progress.advance(bar, len(context))
        return cast(Tensor, output)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask [B, L]. What is too long loses its beginning, but keeps the sinks' BOS."""
        ids_BL, mask_BL = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is None or ids_BL.shape[1] <= left_truncate_len:
            return ids_BL, mask_BL
        cut_B = mask_BL.sum(1) > left_truncate_len
        first_B = ids_BL.gather(1, mask_BL.argmax(1, keepdim=True))[:, 0]
        ids_BL, mask_BL = ids_BL[:, -left_truncate_len:], mask_BL[:, -left_truncate_len:]
        keep_B = cut_B & (first_B == (-1 if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id))
        ids_BL[keep_B, 0] = first_B[keep_B]
        self.truncated += int(cut_B.sum())
        return ids_BL, mask_BL


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block the harness says only what is wrong: not that a model is a model, nor how a loop gets on."""
    # transformers warns of each prompt that is longer than the context; `truncated` counts them.
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    bar = lm_eval.api.task.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        lm_eval.api.task.tqdm = lambda rows, **_: rows  # building 100 prompts is over before its bar is drawn
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """The command: writes answers/<task>.jsonl, perplexity.json if asked for, and the manifest.

    The data are checked before the model is loaded. Nothing is done where the folder holds these very answers.
    """
    started = time.monotonic()
    out = config.out
    benchmarks = load_benchmarks(config.task_names, config.data_dir)
    silent = chosen_experts(config.silence, config.model, "--silence").experts if config.silence else ()
    tokenizer = load_tokenizer(config)
    sequences_BL = _sequences(config, tokenizer)
    inputs = identity(
        config,
        model=fingerprint(checkpoint_folder(config.model, config.revision)),
        adapter=fingerprint(_adapter(config.adapter)) if config.adapter else None,
        silence=silent,
        data={name: benchmark.sha for name, benchmark in benchmarks.items()},
        perplexity=None if sequences_BL is None else digest_ids(sequences_BL),
    )
    if completed(out, "evaluate", inputs):
        note(f"evaluate: {out} is up to date, nothing to do")
        return _summary(config, read_json(out / "manifest.json", "manifest")["truncated"])
    model = load_model(config)
    effect = None
    if config.adapter:
        adapted = load_adapter(model, _adapter(config.adapter))
        effect = dataclasses.asdict(gate(adapted, _probe(benchmarks, tokenizer), _adapter(config.adapter), "--adapter"))
        model = adapted
    if silent:
        moe.check_experts(moe.find_banks(model), silent, "--silence")
    asker = _Asker(model, tokenizer, config.batch_size, config.max_new_tokens)
    prepare_folder(out)
    for old in [out / MANIFEST, out / "perplexity.json", *(out / "answers").glob("*.jsonl")]:
        old.unlink(missing_ok=True)  # answers of two runs must never stand side by side
    journals = {
        name: Journal(out / "answers" / f".{name}.partial", input_key("evaluate", inputs)) for name in benchmarks
    }
    for stale in set((out / "answers").glob(".*.partial")) - {journal.path for journal in journals.values()}:
        stale.unlink()
    asker.truncated = sum(journal.truncated for journal in journals.values())
    if kept := sum(len(journal.answers) for journal in journals.values()):
        note(f"evaluate: {kept} answers of an interrupted run are kept")
    outputs = []
    with moe.silenced(model, silent) if silent else contextlib.nullcontext():
        for name, benchmark in benchmarks.items():
            answers = _ask_one(
                asker,
                name,
                benchmark,
                limit=config.limit,
                variant=config.variant,
                seed=config.seed,
                max_new_tokens=config.max_new_tokens,
                journal=journals[name],
            )
            outputs.append(f"answers/{name}.jsonl")
            lines = [json.dumps(answer.to_json(), ensure_ascii=False) + "\n" for answer in answers]
            write_text(out / outputs[-1], "".join(lines))
        if sequences_BL is not None:
            measured = perplexity(model, sequences_BL, description=f"{config.variant}: perplexity")
            value = {
                "schema": PERPLEXITY_SCHEMA,
                "corpus": config.perplexity,
                "tokens": sequences_BL.numel(),
                "seq_len": sequences_BL.shape[1],
                "perplexity": measured,
            }
            write_json(out / "perplexity.json", value)
            outputs.append("perplexity.json")
    if asker.truncated:
        note(f"evaluate: {asker.truncated} prompts are too long for the model and lost their beginning")
    write_manifest(
        out, "evaluate", inputs, outputs, time.monotonic() - started, truncated=asker.truncated, effect=effect
    )
    for journal in journals.values():
        journal.path.unlink()
    return _summary(config, asker.truncated)


def _adapter(folder: Path) -> Path:
    if not folder.is_dir():
        raise OptionError(f"--adapter: {str(folder)!r} is no folder; give the adapter folder that `train` wrote")
    return adapter_folder(folder)


def _probe(benchmarks: Mapping[str, Benchmark], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The first prompts of every benchmark in tokens, on which the adapter must have an effect before any is asked."""
    texts = [
        prompt(item)
        for benchmark in benchmarks.values()
        for item in benchmark.items[: max(1, PROBES // len(benchmarks))]
    ]
    return [torch.tensor(tokenizer(text, verbose=False).input_ids[-PROBE_TOKENS:]) for text in texts]


def _sequences(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Token ids [B, L] of the corpus whose perplexity is wanted, None where none is."""
    if config.perplexity is None:
        return None
    data_dir = local_data(config.data_dir)
    texts = documents(config.perplexity, data_dir=None if str(data_dir) == "pocket" else data_dir)
    return pack(texts, tokenizer, corpus=config.perplexity, tokens=config.tokens, seq_len=config.seq_len)


def _summary(config: EvaluateConfig, truncated: int) -> dict[str, Any]:
    """How many answers there are to each benchmark, the perplexity if it was measured, and the cut prompts."""
    counts = {}
    for name in config.task_names:
        with (config.out / "answers" / f"{name}.jsonl").open(encoding="utf-8") as stream:
            counts[name] = sum(1 for _ in stream)
    found = read_json(config.out / "perplexity.json", "perplexity")["perplexity"] if config.perplexity else None
    return {
        "out": str(config.out),
        "variant": config.variant,
        "tasks": counts,
        "perplexity": found,
        "truncated": truncated,
    }
