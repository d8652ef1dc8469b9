"""Profiles of a checkpoint that is never in memory as a whole: complete ones, and quick looks.

Shape suffixes: S sequences of the corpus, B sequences of a batch, L tokens per sequence, D what a decoder layer
passes on per token (the hidden size, in most families).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from superexperts.core.console import note, progress
from superexperts.core.distributed import my_share
from superexperts.core.errors import OptionError, OutputError
from superexperts.core.types import CRITERION_DEPTH, CorpusProfile, ExpertKey, Statistic
from superexperts.models.banks import Bank, find_banks
from superexperts.models.cpu_attention import padded_values
from superexperts.models.decoder import num_layers
from superexperts.models.experts import BankCall, Piece, ready
from superexperts.models.hooks import tapped
from superexperts.models.layer_by_layer import Kept, layer_by_layer
from superexperts.models.streaming import StreamedModel
from superexperts.profiling.accumulator import Accumulator, merged
from superexperts.profiling.criterion import layers_below, super_experts_in

__all__ = ["banks_below", "profile_streamed", "quick_look"]

FIRST_ROUNDS = 4
"""Sequences of the first pass of a quick look; each is a round."""
SAME_ROUNDS = 3
"""A quick look ends once the super experts have stayed the same for so many rounds."""


def banks_below(model: nn.Module, depth: float) -> list[Bank]:
    """The banks of experts in the layers below round(depth x layers); `OptionError` if there are none."""
    layers = num_layers(model)
    banks = [bank for bank in find_banks(model) if bank.layer < layers_below(depth, layers)]
    if not banks:
        raise OptionError(f"{depth} leaves no MoE layer of {layers} layers; give a larger share", field="depth")
    return banks


@torch.inference_mode()
def profile_streamed(
    streamed: StreamedModel,
    ids_SL: Tensor,
    *,
    batch_size: int = 8,
    depth: float = 1.0,
    budget: int = 2**32,
    folder: Path | None = None,
    description: str | None = None,
) -> CorpusProfile:
    """The same as `measure.profile_corpus` for int64 sequences [S, L], one decoder layer at a time.

    Between two layers the hidden states, and what else a family passes on, are kept in memory, or beyond `budget` bytes
    in a nameless file in `folder`.
    The experts of a layer are read one by one while others compute; with several batches they are kept until the last.
    """
    banks = banks_below(streamed.model, depth)
    layers = range(banks[-1].layer + 1)
    batches = my_share(range(0, len(ids_SL), batch_size))
    accumulator = Accumulator(streamed.model, banks, ids_SL)
    kept: dict[int, Kept] = {start: {} for start in batches}
    with (
        padded_values(),
        tapped(streamed.model, accumulator, streamed.experts),
        layer_by_layer(streamed.model, banks[0].path) as run,
        streamed.running(layers, batches=len(batches)) as loaded,
        progress(description, len(layers) * len(batches)) as bar,
    ):
        for layer in loaded:
            for start in batches:
                ids_BL = ids_SL[start : start + batch_size].to(streamed.device)
                accumulator.start_batch(start, torch.ones_like(ids_BL))
                now = run(layer, kept[start], input_ids=ids_BL, use_cache=False)
                kept[start] = _put_away(now, kept[start], len(ids_SL) / len(ids_BL), budget, folder)
                bar()
    return CorpusProfile(tokens=ids_SL.numel(), experts=merged(accumulator).rows())


def _put_away(now: Kept, before: Kept, batches: float, budget: int, folder: Path | None) -> Kept:
    """Copies a layer's outputs into buffers; a buffer that is free again is reused if its size fits."""
    free = [tensor for place, tensor in before.items() if place not in now]
    in_memory = sum(tensor.nbytes for tensor in now.values()) * batches <= budget
    away = {}
    for place, tensor in now.items():
        if place in before:
            away[place] = tensor
            continue
        fits = (one for one, other in enumerate(free) if (other.shape, other.dtype) == (tensor.shape, tensor.dtype))
        index = next(fits, None)
        buffer = _buffer_like(tensor, in_memory, folder) if index is None else free.pop(index)
        away[place] = buffer.copy_(tensor)
    return away


def _buffer_like(tensor: Tensor, in_memory: bool, folder: Path | None) -> Tensor:
    """A buffer for what a batch passes on between layers, in memory or in a file."""
    if in_memory or not tensor.numel():
        return torch.empty_like(tensor, device="cpu")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".hidden-") as file:
        try:
            if sys.platform == "linux":  # otherwise a full disk would kill the process later, with SIGBUS
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        except OSError as error:
            raise OutputError(
                f"{tensor.nbytes / 2**30:.1f} GiB more cannot be kept in {folder} ({error.strerror}); free some "
                "space, or raise the budget",
                field="activation_budget",
            ) from error
        # The file loses its name here but lasts as long as it is mapped, so nothing is left behind after a kill.
        flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return flat.view(tensor.shape)


@torch.inference_mode()
def quick_look(
    streamed: StreamedModel, ids_SL: Tensor, *, depth: float, statistic: Statistic, description: str | None = None
) -> CorpusProfile:
    """The super experts of a checkpoint, at about the cost of reading the experts that at least one token is routed to.

    A few of the sequences [S, L] run at once. Their statistics are kept apart, so that one pass through the checkpoint
    shows what each further sequence (a round) changes. If the super experts still change, twice as many sequences
    follow. At the end of the corpus the result is marked as not stable.
    """
    banks = banks_below(streamed.model, depth)
    total = Accumulator(streamed.model, banks, ids_SL)
    sets: list[frozenset[ExpertKey]] = []
    while len(sets) < len(ids_SL):
        first, count = len(sets), FIRST_ROUNDS if not sets else 2 * len(sets)
        rounds = [Accumulator(streamed.model, banks, ids_SL) for _ in range(min(count, len(ids_SL) - first))]
        _one_pass(streamed, banks, ids_SL[first : first + len(rounds)], rounds, first, description)
        for accumulator in rounds:
            total.merge(accumulator)
            depth_here = min(CRITERION_DEPTH, depth)
            found = super_experts_in(total.rows(), num_layers(streamed.model), depth_here, statistic)
            sets.append(frozenset(row.key for row in found))
        stable = len(sets) >= SAME_ROUNDS and len(set(sets[-SAME_ROUNDS:])) == 1
        if stable:
            break
    else:
        note(f"profile: the super experts still changed in the last of {len(sets)} rounds; give more tokens")
    return CorpusProfile(tokens=len(sets) * ids_SL.shape[1], experts=total.rows(), stable=stable)


def _one_pass(
    streamed: StreamedModel,
    banks: Sequence[Bank],
    ids_BL: Tensor,
    rounds: Sequence[Accumulator],
    first: int,
    description: str | None,
) -> None:
    """Runs sequences [B, L] as one batch; the accumulator of each round gets the statistics of one of them."""
    length = ids_BL.shape[1]

    def split_by_sequence(call: BankCall) -> None:
        # There are so few tokens that all rows of a bank fit in memory.
        pieces = list(call.pieces)
        inner_RF, output_RD = (
            torch.cat([getattr(piece, name) for piece in pieces]) for name in ("inner_NF", "output_ND")
        )
        for number, accumulator in enumerate(rounds):
            own_R = call.token_R // length == number
            own = Piece(inner_NF=inner_RF[own_R], output_ND=output_RD[own_R], is_one_expert=False)
            accumulator.start_batch(first + number, torch.ones(1, length))
            accumulator(
                dataclasses.replace(
                    call,
                    expert_R=call.expert_R[own_R],
                    token_R=call.token_R[own_R] - number * length,
                    rank_R=call.rank_R[own_R],
                    weight_R=call.weight_R[own_R],
                    made=ready(own),
                )
            )

    layers = range(banks[-1].layer + 1)
    kept: Kept = {}
    ids_BL = ids_BL.to(streamed.device)
    with (
        _one_thread_for_reading(),
        padded_values(),
        tapped(streamed.model, split_by_sequence, streamed.experts),
        layer_by_layer(streamed.model, banks[0].path) as run,
        streamed.running(layers, all_wanted=False) as loaded,
        progress(description, len(layers)) as bar,
    ):
        for layer in loaded:
            kept = run(layer, kept, input_ids=ids_BL, use_cache=False)
            bar()


@contextlib.contextmanager
def _one_thread_for_reading() -> Iterator[None]:
    """Within the block one thread fewer computes: for so few tokens per expert, reading is what takes time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
