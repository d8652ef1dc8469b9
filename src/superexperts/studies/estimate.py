"""What a study would run, and about how long it takes and how much memory it needs: `study --dry-run`.

Times come from the study's log if a cell of that stage has already run; otherwise from the model's size and two speeds
of this machine, which take a second to measure. They are rough, and too high if answers end early.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from superexperts.benchmarks import BENCHMARKS
from superexperts.benchmarks.loading import load_benchmarks
from superexperts.data.corpora import local_data
from superexperts.models.banks import find_banks
from superexperts.models.loading import pick_device, structure_of
from superexperts.studies.cell_list import Cell, cells
from superexperts.studies.check import settings_of_plan
from superexperts.studies.plan import Plan
from superexperts.studies.progress import cell_states
from superexperts.training.rows import read_rows

__all__ = ["Size", "estimate", "size_of"]

PROMPT_TOKENS = 256
CHARACTERS_PER_TOKEN = 4
USED = 0.3
"""Share of the speed of a large matrix product that a Mixture-of-Experts model reaches with its small products."""
PER_LAYER, PER_EXPERT = 60, 10
"""Operations of a decoder layer's forward pass, and those of each expert in it: in a small model or batch, starting
them takes longer than computing them."""
TRAINING_SECONDS = 5.0
"""Seconds that a training takes besides its steps: loading the model, counting tokens, checking the effect.
Trainings of the pocket model on two cores took 12.4 s for 64 steps of one row and 9.2 s for 8 steps of 16 rows; the
estimates were 8.9 s and 7.0 s."""


class Size:
    """A model's size, computed from its configuration alone."""

    def __init__(self, settings: Any) -> None:
        model = structure_of(settings)
        text = settings.get_text_config().to_dict()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        banks = find_banks(model)
        routed = sum(parameter.numel() for bank in banks for parameter in bank.module.parameters())
        chosen = min(1.0, (text.get("num_experts_per_tok") or text.get("top_k_experts") or 1) / banks[0].num_experts)
        embedding = text["vocab_size"] * text["hidden_size"]
        self.active = self.parameters - embedding - round(routed * (1 - chosen))
        """Parameters that take part in the computation of one token."""
        self.layers: int = text["num_hidden_layers"]
        self.operations = self.layers * (PER_LAYER + PER_EXPERT * banks[0].num_experts)
        """Operations of a forward pass in which every expert has a token."""
        self.hidden: int = text["hidden_size"]
        self.vocabulary: int = text["vocab_size"]
        heads = text["num_attention_heads"]
        head = text.get("head_dim") or self.hidden // heads
        # With latent attention, transformers caches keys and values of every head, not the compressed latent.
        latent = text.get("kv_lora_rank") is not None
        width = heads * (text["qk_nope_head_dim"] + text["qk_rope_head_dim"] + text["v_head_dim"]) if latent else 0
        self.cache = self.layers * (width or 2 * (text.get("num_key_value_heads") or heads) * head)
        """Elements of the cache of keys and values for each token."""


def size_of(plan: Plan) -> Size:
    """The size of the study's model; of a Hub model only config.json is fetched."""
    return Size(settings_of_plan(plan))


def estimate(plan: Plan, out: Path, device_name: str) -> dict[str, Any]:
    """For each cell its state, seconds, GiB, and the source of the time; the total time and the largest memory."""
    device = pick_device(device_name)
    itemsize = 4 if device.type == "cpu" else 2
    size = size_of(plan)
    flops, bytes_per_second, seconds_per_operation = _speeds(device, itemsize)
    items, rows = _items(plan), _training_rows(plan)
    pass_seconds = size.operations * seconds_per_operation
    todo = cells(plan)
    states = cell_states(out, todo)
    known: dict[str, float] = {}
    for cell, state in zip(todo, states, strict=True):
        if state["state"] == "done":
            known[cell.stage] = max(known.get(cell.stage, 0.0), state["seconds"])
    table = []
    for cell, state in zip(todo, states, strict=True):
        seconds, gib = _guess(cell, plan, size, itemsize, flops * USED, bytes_per_second, pass_seconds, items, rows)
        if cell.stage in known:
            seconds = known[cell.stage]
        left = 0.0 if state["state"] == "done" else seconds
        basis = "measured" if cell.stage in known else "estimated"
        table.append({"cell": cell.name, "state": state["state"], "seconds": left, "gib": gib, "basis": basis})
    return {
        "cells": table,
        "seconds": sum(row["seconds"] for row in table),
        "gib": max(row["gib"] for row in table),
        "device": str(device),
        "parameters": size.parameters,
        "active_parameters": size.active,
        "teraflops": flops / 1e12,
        "gigabytes_per_second": bytes_per_second / 1e9,
    }


def _guess(
    cell: Cell,
    plan: Plan,
    size: Size,
    itemsize: int,
    flops: float,
    bandwidth: float,
    pass_seconds: float,
    items: Mapping[str, int],
    rows: tuple[int, int],
) -> tuple[float, float]:
    """(seconds, GiB) of a cell; `pass_seconds` is what starting the operations of a forward pass takes, and `rows` are
    the number of training rows and of their tokens."""
    weights = size.parameters * itemsize
    if cell.stage == "profile":
        tokens = plan.tokens * len(plan.corpus)
        batch = plan.profile.get("batch_size", 8) * plan.seq_len * size.hidden * 8 * itemsize
        held = weights / size.layers * 2 if plan.profile.get("stream") else weights
        return 2 * size.active * plan.depth * tokens / flops, (held + batch) / 2**30
    if cell.stage == "evaluate":
        batch = plan.evaluation.get("batch_size", 64)
        # A decoding step reads every weight once, and costs two operations per active parameter and sequence.
        step = max(weights / bandwidth, 2 * size.active * batch / flops)
        batches = sum(math.ceil(count / batch) for count in items.values())
        prompts = sum(items.values()) * PROMPT_TOKENS * 2 * size.active / flops
        cache = batch * (PROMPT_TOKENS + plan.max_new_tokens) * size.cache * itemsize
        return prompts + batches * plan.max_new_tokens * step, (weights + cache) / 2**30
    if cell.stage == "train":
        options = plan.training_of(next(run for run in plan.runs if run.name == cell.run))
        # A backward pass costs twice the forward pass; gradient checkpointing runs the forward pass once more.
        again = 4 if options.get("gradient_checkpointing") else 3
        rows_seen, tokens = (number * options.get("epochs", 2) for number in rows)
        steps = rows_seen / options.get("batch_size", 16)
        in_batch = options.get("batch_size", 16) * min(options.get("max_length", 1024), 2 * PROMPT_TOKENS)
        kept = (2 if again == 4 else 24) * size.hidden * size.layers * itemsize + size.vocabulary * 8
        seconds = again * (2 * size.active * tokens / flops + steps * pass_seconds) + TRAINING_SECONDS
        return seconds, (weights + in_batch * kept) / 2**30
    return (2 * weights / 1e9 if cell.stage == "checkpoint" else 0.1), 0.0


def _items(plan: Plan) -> dict[str, int]:
    """Number of items of each benchmark that the study uses; nothing is downloaded for it."""
    data_dir = local_data(Path(plan.data_dir) if plan.data_dir else None)
    # Nothing may be fetched to count the items of data sets on the Hub.
    counts = {name: BENCHMARKS[name].size for name in plan.tasks}
    if data_dir is not None:
        counts = {name: len(benchmark.items) for name, benchmark in load_benchmarks(plan.tasks, data_dir).items()}
    return {name: min(plan.limit or counts[name], counts[name]) for name in plan.tasks}


def _training_rows(plan: Plan) -> tuple[int, int]:
    """The number of training rows, and a rough number of tokens in them."""
    if plan.train_data is None or not any(run.kind == "lora" for run in plan.runs):
        return 1_000, 100_000
    rows = read_rows(Path(plan.train_data), "train_data")
    characters = sum(len(row.question) + len(row.response) for row in rows)
    return len(rows), characters // CHARACTERS_PER_TOKEN


def _speeds(device: torch.device, itemsize: int) -> tuple[float, float, float]:
    """(FLOP/s of a large matrix product, bytes/s of reading memory, seconds to start a small operation) of a device."""
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    n = 1024 if device.type == "cpu" else 8192
    a_NN = torch.ones(n, n, dtype=dtype, device=device)
    big_N = torch.ones(2**25 if device.type == "cpu" else 2**30, dtype=dtype, device=device)
    small_N = torch.ones(4096, dtype=dtype, device=device)
    product = _fastest(lambda: a_NN @ a_NN, device)
    reading = _fastest(lambda: big_N.sum(), device)
    starting = _fastest(lambda: [small_N * 2 for _ in range(500)], device) / 500
    return 2 * n**3 / product, big_N.nbytes / reading, starting


def _fastest(work: Any, device: torch.device) -> float:
    """The least of five times in seconds."""
    # The minimum: other processes can only make a measurement longer.
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        work()
        if device.type == "cuda":  # kernels run asynchronously
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
