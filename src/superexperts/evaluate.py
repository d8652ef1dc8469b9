"""Asks a model the benchmarks' questions through lm-evaluation-harness, and keeps the answers as they are given.

Base and adapter are asked by the same call with the same prompts, greedily. Nothing is scored here: see `extract`.

Shape suffixes: B sequences, L tokens of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from . import moe
from .artifacts import Answer
from .check_adapter import gate
from .config import EvaluateConfig, identity
from .console import note
from .corpora import corpus_sequences, digest_ids
from .engines import HfAsker, open_engine, quiet, request_url
from .errors import OptionError
from .journal import Journal
from .lora import adapter_folder, load_adapter
from .model import checkpoint_folder, chosen_experts, load_model, load_tokenizer
from .perplexity import perplexity_of, sequence_losses
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
from .shared import borrowed
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
    asker = HfAsker(model, tokenizer, batch_size, max_new_tokens)
    return {
        name: _ask_one(asker, name, benchmark, limit=limit, variant=variant, seed=seed, max_new_tokens=max_new_tokens)
        for name, benchmark in benchmarks.items()
    }


def _ask_one(
    asker: Any,
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
    with quiet(), asker.asking(f"{variant}: {name}", total, journal):
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
                subject=item.subject,
            )
        )
    return answers


def run(config: EvaluateConfig, load: Callable[[EvaluateConfig], nn.Module] | None = None) -> dict[str, Any]:
    """The command: writes answers/<task>.jsonl, perplexity.json if asked for, and the manifest.

    The data are checked before the model is loaded. Nothing is done where the folder holds these very answers.
    What `load` (default: `load_model`) gives comes back as it was, adapter taken off.
    """
    with contextlib.ExitStack() as stack:

        def borrow(config: EvaluateConfig) -> nn.Module:
            model = (load or load_model)(config)
            stack.enter_context(borrowed(model))
            return model

        return _run(config, borrow)


def _run(config: EvaluateConfig, load: Callable[[EvaluateConfig], nn.Module]) -> dict[str, Any]:
    started = time.monotonic()
    out = config.out
    benchmarks = load_benchmarks(config.task_names, config.data_dir)
    silent = chosen_experts(config.silence, config.model, "--silence").experts if config.silence else ()
    sequences_BL = _sequences(config)
    inputs = identity(
        config,
        model=_model_identity(config),
        adapter=fingerprint(_adapter(config.adapter)) if config.adapter else None,
        silence=silent,
        data={name: benchmark.sha for name, benchmark in benchmarks.items()},
        perplexity=None if sequences_BL is None else digest_ids(sequences_BL),
    )
    if completed(out, "evaluate", inputs):
        note(f"evaluate: {out} is up to date, nothing to do")
        return _summary(config, read_json(out / "manifest.json", "manifest")["truncated"])
    model, effect = None, None
    if config.engine == "hf":
        tokenizer = load_tokenizer(config)
        model = load(config)
        if config.adapter:
            adapted = load_adapter(model, _adapter(config.adapter))
            probe = _probe(benchmarks, tokenizer)
            effect = dataclasses.asdict(gate(adapted, probe, _adapter(config.adapter), "--adapter"))
            model = adapted
        if silent:
            moe.check_experts(moe.find_banks(model), silent, "--silence")
    asker = open_engine(config) if model is None else _hf_asker(config, model)
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
    with moe.silenced(model, silent) if model is not None and silent else contextlib.nullcontext():
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
            assert model is not None
            losses_B = sequence_losses(model, sequences_BL, description=f"{config.variant}: perplexity")
            measured = perplexity_of(losses_B)
            value = {
                "schema": PERPLEXITY_SCHEMA,
                "corpus": config.perplexity,
                "tokens": sequences_BL.numel(),
                "seq_len": sequences_BL.shape[1],
                "perplexity": measured.value,
                "interval": measured.interval,
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


def _model_identity(config: EvaluateConfig) -> str | dict[str, str]:
    """The checkpoint's digest; of a server no more is known than its address and the name that it gives the model."""
    if config.engine == "api":
        assert config.base_url is not None
        return {"server": request_url(config.base_url), "name": config.model}
    return fingerprint(checkpoint_folder(config.model, config.revision))


def _hf_asker(config: EvaluateConfig, model: nn.Module) -> HfAsker:
    return HfAsker(model, load_tokenizer(config), config.batch_size, config.max_new_tokens)


def _sequences(config: EvaluateConfig) -> Tensor | None:
    """Token ids [B, L] of the corpus whose perplexity is wanted, None where none is."""
    if config.perplexity is None:
        return None
    return corpus_sequences(
        config.perplexity, config.data_dir, load_tokenizer(config), tokens=config.tokens, seq_len=config.seq_len
    )


def _summary(config: EvaluateConfig, truncated: int) -> dict[str, Any]:
    """How many answers there are to each benchmark, the perplexity if it was measured, and the cut prompts."""
    counts = {}
    for name in config.task_names:
        with (config.out / "answers" / f"{name}.jsonl").open(encoding="utf-8") as stream:
            counts[name] = sum(1 for _ in stream)
    found = read_json(config.out / "perplexity.json", "perplexity") if config.perplexity else None
    return {
        "out": str(config.out),
        "variant": config.variant,
        "tasks": counts,
        "perplexity": found["perplexity"] if found else None,
        "perplexity_interval": found["interval"] if found else None,
        "truncated": truncated,
    }
