"""Profiles of a checkpoint that is never in memory as a whole: in full, and as a quick look.

Shape suffixes: S sequences of the corpus, B sequences of a batch, L tokens per sequence, D whatever a decoder layer
passes on per token (its hidden size, in most families).
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
from superexperts.models.banks import Bank, expert_keys, find_banks
from superexperts.models.cpu_attention import padded_values
from superexperts.models.decoder import layer_by_layer, num_layers
from superexperts.models.experts import BankCall, Piece, ready
from superexperts.models.hooks import tapped
from superexperts.models.streaming import StreamedModel
from superexperts.profiling.accumulator import Recorder, merged
from superexperts.profiling.criterion import layers_below, super_experts

__all__ = ["banks_below", "profile_streamed", "quick_look"]

QUICK_SEQUENCES = 32
"""Sequences of the quick look at most."""
FIRST_ROUNDS = 4
SAME_ROUNDS = 3
"""Rounds after which the super experts must have stayed the same."""


def banks_below(model: nn.Module, depth: float) -> list[Bank]:
    """The banks of the layers below round(depth x layers); `OptionError` if there is none."""
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
    """As `profile.profile_corpus`, of the same int64 sequences [S, L], a decoder layer at a time.

    Between two layers hidden states are kept in memory, or past `budget` bytes in a file without a name in `folder`.
    A layer's experts are read one by one while others compute; for several batches they are kept until the last one.
    """
    banks = banks_below(streamed.model, depth)
    layers = range(banks[-1].layer + 1)
    batches = my_share(range(0, len(ids_SL), batch_size))
    recorder = Recorder(expert_keys(banks), ids_SL)
    hidden: dict[int, Tensor] = {}
    with (
        padded_values(),
        tapped(streamed.model, recorder, streamed.experts),
        layer_by_layer(streamed.model, banks[0].path) as run,
        streamed.running(layers, batches=len(batches)) as loaded,
        progress(description, len(layers) * len(batches)) as bar,
    ):
        for layer in loaded:
            for start in batches:
                ids_BL = ids_SL[start : start + batch_size].to(streamed.device)
                recorder.start_batch(start, torch.ones_like(ids_BL))
                given = hidden[start].to(streamed.device) if layer else None
                made = run(layer, given, input_ids=ids_BL, use_cache=False)
                if not layer:
                    hidden[start] = _room(made, len(ids_SL), budget, folder)
                hidden[start].copy_(made)
                bar()
    return CorpusProfile(tokens=ids_SL.numel(), experts=merged(recorder).rows())


def _room(made_BLD: Tensor, sequences: int, budget: int, folder: Path | None) -> Tensor:
    """Where a batch's hidden states are kept from layer to layer: where they are, or in a file if all are too many."""
    if made_BLD.nbytes / len(made_BLD) * sequences <= budget:
        return torch.empty_like(made_BLD, device="cpu")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".hidden-") as file:
        try:
            if sys.platform == "linux":  # a full disk says so now, not by a signal later
                os.posix_fallocate(file.fileno(), 0, made_BLD.nbytes)
        except OSError as error:
            raise OutputError(
                (
                    f"{made_BLD.nbytes / 2**30:.1f} GiB more cannot be kept in {folder} ({error.strerror}); make "
                    "room, or raise the budget"
                ),
                field="activation_budget",
            ) from error
        # The kernel keeps the file as long as it is mapped, without its name: nothing is left after a kill.
        flat = torch.from_file(file.name, shared=True, size=made_BLD.numel(), dtype=made_BLD.dtype)
    return flat.view(made_BLD.shape)


@torch.inference_mode()
def quick_look(
    streamed: StreamedModel, ids_SL: Tensor, *, depth: float, statistic: Statistic, description: str | None = None
) -> CorpusProfile:
    """The super experts of a checkpoint at about the cost of reading those experts that some token is routed to.

    Of sequences [S, L] a few are run at once, and their statistics kept apart, so that one pass through the checkpoint
    shows what each further sequence (a round) changes; unless the super experts settled, twice as many follow. At the
    end of the corpus the answer is given as not stable.
    """
    banks = banks_below(streamed.model, depth)
    total = Recorder(expert_keys(banks), ids_SL)
    sets: list[frozenset[ExpertKey]] = []
    while len(sets) < len(ids_SL):
        first, count = len(sets), FIRST_ROUNDS if not sets else 2 * len(sets)
        rounds = [Recorder(expert_keys(banks), ids_SL) for _ in range(min(count, len(ids_SL) - first))]
        _one_pass(streamed, banks, ids_SL[first : first + len(rounds)], rounds, first, description)
        for recorder in rounds:
            total.merge(recorder)
            found = super_experts(
                total.rows(),
                num_layers(streamed.model),
                depth=min(CRITERION_DEPTH, depth),
                statistic=statistic,
            )
            sets.append(frozenset(row.key for row in found))
        stable = len(sets) >= SAME_ROUNDS and len(set(sets[-SAME_ROUNDS:])) == 1
        if stable:
            break
    else:
        note(f"--quick: the super experts still changed in the last of {len(sets)} rounds; profile more --tokens")
    return CorpusProfile(tokens=len(sets) * ids_SL.shape[1], experts=total.rows(), stable=stable)


def _one_pass(
    streamed: StreamedModel,
    banks: Sequence[Bank],
    ids_BL: Tensor,
    rounds: Sequence[Recorder],
    first: int,
    description: str | None,
) -> None:
    """Runs sequences [B, L] as one batch; each round's recorder hears one of them."""
    length = ids_BL.shape[1]

    def tap(call: BankCall) -> None:
        # So few rows that all of a bank can be kept.
        pieces = list(call.pieces)
        inner_RF, output_RD = (
            torch.cat([getattr(piece, name) for piece in pieces]) for name in ("inner_NF", "output_ND")
        )
        for number, recorder in enumerate(rounds):
            own_R = call.token_R // length == number
            own = Piece(inner_NF=inner_RF[own_R], output_ND=output_RD[own_R], is_one_expert=False)
            recorder.start_batch(first + number, torch.ones(1, length))
            recorder(
                dataclasses.replace(
                    call,
                    expert_R=call.expert_R[own_R],
                    token_R=call.token_R[own_R] - number * length,
                    weight_R=call.weight_R[own_R],
                    made=ready(own),
                )
            )

    layers = range(banks[-1].layer + 1)
    hidden = None
    ids_BL = ids_BL.to(streamed.device)
    with (
        _a_core_for_readers(),
        padded_values(),
        tapped(streamed.model, tap, streamed.experts),
        layer_by_layer(streamed.model, banks[0].path) as run,
        streamed.running(layers, all_wanted=False) as loaded,
        progress(description, len(layers)) as bar,
    ):
        for layer in loaded:
            hidden = run(layer, hidden, input_ids=ids_BL, use_cache=False)
            bar()


@contextlib.contextmanager
def _a_core_for_readers() -> Iterator[None]:
    """Within the block one thread fewer computes: an expert has so few tokens that the reading is what takes time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
