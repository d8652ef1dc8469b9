"""Asks a model the benchmarks' questions through lm-evaluation-harness, and keeps the answers as they are given.

Base and adapter are asked by the same call with the same prompts, greedily. Nothing is scored here: see `extract`.

Shape suffixes: B sequences, L tokens of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from superexperts.adapters.borrow import borrowed
from superexperts.adapters.effect import require_effect
from superexperts.adapters.lora import load_adapter
from superexperts.benchmarks import Benchmark, load_benchmarks, prompt
from superexperts.checkpoints.source import ModelSource, adapter_folder, resolve
from superexperts.core.config import EvaluateConfig, identity
from superexperts.core.console import is_main_process, note
from superexperts.core.distributed import from_main_process, gathered, my_share
from superexperts.core.errors import OptionError, OutputError
from superexperts.core.runs import (
    MANIFEST,
    completed,
    fingerprint,
    prepare_folder,
    read_json,
    versions,
    write_json,
    write_manifest,
    write_text,
)
from superexperts.core.types import chosen_experts
from superexperts.data.packing import corpus_sequences, digest_ids, reference_windows
from superexperts.engines.harness import HfAsker
from superexperts.engines.journal import Journal, open_journals, remove_journals
from superexperts.engines.local import open_engine
from superexperts.engines.server import request_url
from superexperts.evaluation.ask import answers_key, ask, ask_one, chosen_items, finished_answers
from superexperts.evaluation.perplexity import perplexity_of, sequence_losses
from superexperts.models.banks import check_experts, find_banks
from superexperts.models.hooks import silenced
from superexperts.models.loading import load_model, load_tokenizer

__all__ = ["ask", "run"]

PROBES, PROBE_TOKENS = 16, 256
"""Prompts on which an adapter's effect is measured before the evaluation, and the tokens kept of each."""
PERPLEXITY_SCHEMA = "superexperts/perplexity/1"


def run(config: EvaluateConfig, load: Callable[..., nn.Module] | None = None) -> dict[str, Any]:
    """The command: writes answers/<task>.jsonl, perplexity.json if asked for, and the manifest.

    The data are checked before the model is loaded. Nothing is done where the folder holds these very answers.
    What `load` (default: `load_model`) gives comes back as it was, adapter taken off.
    """
    with contextlib.ExitStack() as stack:

        def borrow(source: ModelSource) -> nn.Module:
            model = (load or load_model)(source, device=config.device, dtype=config.dtype)
            stack.enter_context(borrowed(model))
            return model

        return _run(config, borrow)


def _run(config: EvaluateConfig, load: Callable[[ModelSource], nn.Module]) -> dict[str, Any]:
    started = time.monotonic()
    out = config.out
    benchmarks = load_benchmarks(
        config.task_names,
        config.data_dir,
        protocol=config.protocol,
        num_fewshot=config.num_fewshot,
        split=config.split,
    )
    silent = chosen_experts(config.silence, config.model, "silence").experts if config.silence else ()
    source = None
    if config.engine != "api":  # a server knows its model by a name of its own
        source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    sequences_BL = _sequences(config, source)
    inputs = identity(
        config,
        model=_model_identity(config, source),
        adapter=fingerprint(_adapter(config.adapter)) if config.adapter else None,
        silence=silent,
        data={name: benchmark.sha for name, benchmark in benchmarks.items()},
        perplexity=None if sequences_BL is None else digest_ids(sequences_BL),
        harness=versions()["lm_eval"],  # the few-shot prompts are in its files
    )
    if from_main_process(completed(out, "evaluate", inputs)):
        note(f"evaluate: {out} is up to date, nothing to do")
        return _summary(config, read_json(out / "manifest.json", "manifest")["truncated"]) if is_main_process else {}
    if is_main_process:
        _own(out)
    model, effect = None, None
    if config.engine == "hf" and source is not None:
        tokenizer = load_tokenizer(source)
        model = load(source)
        if config.adapter:
            adapted = load_adapter(model, _adapter(config.adapter))
            probe = _probe(benchmarks, tokenizer)
            effect = dataclasses.asdict(require_effect(adapted, probe, _adapter(config.adapter), "adapter"))
            model = adapted
        if silent:
            check_experts(find_banks(model), silent, "silence")
    if model is None:
        asker = open_engine(config)
    else:
        asker = HfAsker(model, tokenizer, config.batch_size, config.max_new_tokens)
    keys = {name: answers_key(inputs, name) for name in benchmarks}
    journals = _begin(out, keys)
    outputs = []
    with silenced(model, silent) if model is not None and silent else contextlib.nullcontext():
        for name, benchmark in benchmarks.items():
            shuffled_by = f"{config.seed}:{name}" if config.shuffle else None
            answers = ask_one(
                asker,
                name,
                benchmark,
                chosen_items(len(benchmark.items), config.limit, shuffled_by),
                variant=config.variant,
                seed=config.seed,
                max_new_tokens=config.max_new_tokens,
                journal=journals[name],
            )
            outputs.append(f"answers/{name}.jsonl")
            lines = [json.dumps(answer.to_json(), ensure_ascii=False) + "\n" for answer in answers]
            if is_main_process:
                write_text(out / outputs[-1], "".join(lines))
        if sequences_BL is not None:
            assert model is not None
            _measure_perplexity(config, model, sequences_BL)
            outputs.append("perplexity.json")
    truncated = sum(gathered(asker.truncated))
    if not is_main_process:
        return {}
    if truncated:
        note(f"evaluate: {truncated} prompts are too long for the model and lost their beginning")
    seconds = time.monotonic() - started
    write_manifest(out, "evaluate", inputs, outputs, seconds, truncated=truncated, effect=effect)
    remove_journals(out / "answers")
    return _summary(config, truncated)


def _own(out: Path) -> None:
    """`OutputError` for answers that no evaluation wrote: its own have a manifest, or journals until they have one."""
    folder = out / "answers"
    ours = (out / MANIFEST).is_file() or any(folder.glob(".*.partial"))
    if not ours and (strange := next(folder.glob("*.jsonl"), None)) is not None:
        raise OutputError(
            f"{strange} was not written by `evaluate`, which would remove it; choose another folder", field="out"
        )


def _begin(out: Path, keys: Mapping[str, str]) -> dict[str, Journal]:
    """This process' journals, with all answers that need not be asked again; an earlier run's files are gone then."""
    finished = {}
    if is_main_process:
        prepare_folder(out)
        finished = finished_answers(out, keys)
    journals = open_journals(out / "answers", keys, finished)
    if is_main_process:
        if kept := sum(len(journal.answers) for journal in journals.values()):
            note(f"evaluate: {kept} answers of an earlier run are kept")
        gone = sorted(file.stem for file in (out / "answers").glob("*.jsonl") if file.stem not in finished)
        if gone:
            note(
                f"evaluate: {', '.join(gone)}: an earlier run's answers are removed, they are not to what is asked now"
            )
        for old in [out / MANIFEST, out / "perplexity.json", *(out / "answers").glob("*.jsonl")]:
            old.unlink(missing_ok=True)  # answers of two runs must never stand side by side
    return journals


def _measure_perplexity(config: EvaluateConfig, model: nn.Module, sequences_BL: Tensor) -> None:
    """Writes perplexity.json; each process takes its share of the sequences."""
    mine = my_share(range(len(sequences_BL)))
    losses: dict[int, float] = {}
    if mine:
        found = sequence_losses(model, sequences_BL[list(mine)], description=f"{config.variant}: perplexity")
        losses = dict(zip(mine, found.tolist(), strict=True))
    for part in gathered(losses):
        losses |= part
    measured = perplexity_of(torch.tensor([losses[i] for i in range(len(sequences_BL))], dtype=torch.float64))
    value = {
        "schema": PERPLEXITY_SCHEMA,
        "corpus": config.perplexity,
        "tokens": sequences_BL.numel(),
        "seq_len": sequences_BL.shape[1],
        "reference_windows": config.reference_windows,
        "perplexity": measured.value,
        "interval": measured.interval,
    }
    if is_main_process:
        write_json(config.out / "perplexity.json", value)


def _adapter(folder: Path) -> Path:
    if not folder.is_dir():
        raise OptionError(f"{str(folder)!r} is no folder; give the adapter folder that `train` wrote", field="adapter")
    return adapter_folder(folder)


def _probe(benchmarks: Mapping[str, Benchmark], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The first prompts of every benchmark in tokens, on which the adapter must have an effect before any is asked."""
    texts = [
        prompt(item)
        for benchmark in benchmarks.values()
        for item in benchmark.items[: max(1, PROBES // len(benchmarks))]
    ]
    return [torch.tensor(tokenizer(text, verbose=False).input_ids[-PROBE_TOKENS:]) for text in texts]


def _model_identity(config: EvaluateConfig, source: ModelSource | None) -> str | dict[str, str]:
    """The checkpoint's digest; of a server no more is known than its address and the name that it gives the model."""
    if source is None:
        assert config.base_url is not None
        return {"server": request_url(config.base_url), "name": config.model}
    return source.fingerprint


def _sequences(config: EvaluateConfig, source: ModelSource | None) -> Tensor | None:
    """Token ids [B, L] of the corpus whose perplexity is wanted, None where none is."""
    if config.perplexity is None or source is None:
        return None
    where: Any = (
        config.perplexity,
        config.data_dir,
        load_tokenizer(source),
    )
    if config.reference_windows:
        return reference_windows(*where, seq_len=config.seq_len, column=config.column)
    return corpus_sequences(*where, tokens=config.tokens, seq_len=config.seq_len, column=config.column)


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
