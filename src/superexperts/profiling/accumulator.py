"""Adds up the statistics of every expert from `BankCall`s, on the device of the model.

Nothing as large as the activations is created or kept: each row is reduced at once to its largest |value| and its norm.

Shape suffixes: T tokens of a batch (B sequences x L positions), E experts of a bank, R rows (a token at one of its
experts, sorted by expert and then by token), N rows of a piece, P experts that have rows in a piece, each once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from superexperts.core.distributed import gathered, is_distributed
from superexperts.core.errors import Field, ModelError
from superexperts.core.types import ExpertId, ExpertStats, key_name, key_order
from superexperts.models.banks import Bank, expert_keys
from superexperts.models.decoder import text_config
from superexperts.models.experts import BankCall, Piece
from superexperts.profiling.reference import is_gathered_by_rank, reference_rows
from superexperts.profiling.rules import layer_shares

__all__ = ["Accumulator", "merged"]


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a float -> the integer type of the same size."""


class _Peaks:
    """For each expert of a bank the largest |value| so far and its place; of equal values the first one counts."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.value_E = torch.full((size,), -1.0, device=device)
        """-1 for an expert without tokens, as in the next two."""
        self.place_E = torch.full((size,), -1, device=device)
        """Place of the token of the peak in the corpus: sequence x L + position."""
        self.channel_E = torch.full((size,), -1, device=device)

    def update(self, expert_P: Tensor, value_P: Tensor, place_P: Tensor, channel_P: Tensor) -> None:
        """Takes new peaks, at most one per expert, of tokens that come after all earlier ones."""
        # Strictly larger: among equal values the first one stays, as in a pass over the corpus token by token.
        better_P = value_P > self.value_E[expert_P]
        expert_P = expert_P[better_P]
        self.value_E[expert_P] = value_P[better_P]
        self.place_E[expert_P] = place_P[better_P]
        self.channel_E[expert_P] = channel_P[better_P]

    def cpu(self) -> _Peaks:
        moved = copy.copy(self)
        moved.value_E, moved.place_E = self.value_E.cpu(), self.place_E.cpu()
        moved.channel_E = self.channel_E.cpu()
        return moved

    def merge(self, other: _Peaks) -> None:
        """Takes the peaks of other batches, in whichever order they were run."""
        first_E = (other.value_E == self.value_E) & (other.place_E < self.place_E)
        better_E = (other.value_E > self.value_E) | first_E
        self.channel_E = torch.where(better_E, other.channel_E, self.channel_E)
        self.place_E = torch.where(better_E, other.place_E, self.place_E)
        self.value_E = torch.where(better_E, other.value_E, self.value_E)

    def listed(self) -> list[tuple[float, int, int]]:
        """(value, place, channel) for each expert."""
        return list(zip(self.value_E.tolist(), self.place_E.tolist(), self.channel_E.tolist(), strict=True))


class _Rows:
    """The peak of each row of a call, collected piece by piece, and the row with the highest peak of each expert."""

    def __init__(self) -> None:
        self._peaks: list[Tensor] = []
        self._highest: list[tuple[Tensor, Tensor, Tensor]] = []
        """For each piece its experts, and for each of these one row of the call and the values of that row."""
        self._done = 0

    def add(self, expert_N: Tensor, values: Tensor, peak_N: Tensor, is_one_expert: bool) -> None:
        """Takes the rows [N, channels] of a piece and the largest |value| of each."""
        if is_one_expert:
            expert_P, row_P = expert_N[:1], peak_N.argmax()[None]
        else:
            expert_P, row_P = _highest_rows(expert_N, peak_N)
        self._highest.append((expert_P, self._done + row_P, values.index_select(0, row_P)))
        self._peaks.append(peak_N)
        self._done += len(peak_N)

    def peaks(self) -> Tensor:
        """The largest |value| of every row, float32."""
        return torch.cat(self._peaks)

    def highest(self, place_R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The experts that have rows, and for each its peak with place and channel; of equal peaks the first."""
        expert_P, row_P, values = (torch.cat(column) for column in zip(*self._highest, strict=True))
        return expert_P, self.peaks()[row_P], place_R[row_P], values.abs().argmax(-1)


class _Bank:
    """The statistics of the experts of one bank."""

    def __init__(self, experts: tuple[ExpertId, ...], device: torch.device, *, by_rank: bool) -> None:
        self.experts, self._by_rank = experts, by_rank
        self.sums_4E: dict[int, Tensor] = {}
        """For each batch, by the place of its first token: number of tokens, gate sum, sum of weighted norms, number of
        rows that are not finite; float64. They are added up in the order of the corpus, so that the sum does not depend
        on which process ran which batch."""
        self.first_E, self.reference_E = (torch.zeros(len(experts), device=device) for _ in range(2))
        self.input, self.output = _Peaks(len(experts), device), _Peaks(len(experts), device)

    def update(self, call: BankCall, real_T: Tensor | None, start: int, length: int) -> None:
        """Takes the rows of all tokens that are not padding; `start` is the place of the first token of the batch."""
        real_R = None if real_T is None else real_T[call.token_R]
        inner, output, norms, done = _Rows(), _Rows(), [], 0
        for piece, inner_N, output_N, norm_N in call.made(_measured):
            rows = slice(done, done := done + len(piece.output_ND))
            own_N = slice(None) if real_R is None else real_R[rows]
            expert_N = call.expert_R[rows][own_N]
            if not len(expert_N):
                continue
            inner.add(expert_N, piece.inner_NF[own_N], inner_N[own_N], piece.is_one_expert)
            output.add(expert_N, piece.output_ND[own_N], output_N[own_N], piece.is_one_expert)
            norms.append(norm_N[own_N])
        if not norms:
            return
        columns = (call.expert_R, call.token_R, call.rank_R, call.weight_R)
        expert_R, token_R, rank_R, weight_R = (column if real_R is None else column[real_R] for column in columns)
        peak_R = output.peaks()
        counts_E = torch.bincount(expert_R, minlength=len(self.experts))
        # REAP's saliency (arXiv 2510.13999): mean over an expert's tokens of routing weight times norm of its output.
        weighted_R = weight_R.double() * torch.cat(norms)
        terms_4R = (torch.ones_like(peak_R), weight_R, weighted_R, ~torch.isfinite(peak_R))
        self.sums_4E[start] = torch.stack([_sums(term_R, counts_E) for term_R in terms_4R])
        self.input.update(*inner.highest(start + token_R))
        self.output.update(*output.highest(start + token_R))
        # Of each sequence the reference code sees one row of a routed expert, and all rows of a shared one.
        first_R = torch.ones_like(expert_R, dtype=torch.bool)
        # Rows are sorted by expert, then by token, so each (expert, sequence) is one run and its first row the first
        # token.
        if self.experts != ("shared",):
            sequence_R = expert_R * (int(token_R.max()) // length + 1) + token_R // length
            first_R[1:] = sequence_R[1:] != sequence_R[:-1]
        seen_R = reference_rows(first_R, rank_R, token_R) if self._by_rank else first_R
        self.first_E = self.first_E.scatter_reduce(0, expert_R[first_R], peak_R[first_R], "amax")
        self.reference_E = self.reference_E.scatter_reduce(0, expert_R[seen_R], peak_R[seen_R], "amax")

    def cpu(self) -> _Bank:
        moved = copy.copy(self)
        moved.sums_4E = {start: sums_4E.cpu() for start, sums_4E in self.sums_4E.items()}
        moved.first_E, moved.reference_E = self.first_E.cpu(), self.reference_E.cpu()
        moved.input, moved.output = self.input.cpu(), self.output.cpu()
        return moved

    def merge(self, other: _Bank) -> None:
        """Takes the statistics of other batches."""
        self.sums_4E |= other.sums_4E
        self.first_E = torch.maximum(self.first_E, other.first_E)
        self.reference_E = torch.maximum(self.reference_E, other.reference_E)
        self.input.merge(other.input)
        self.output.merge(other.output)

    def rows(self, layer: int, ids_T: Tensor, length: int) -> list[ExpertStats]:
        """The statistics of each expert; `ids_T` are the token ids of the corpus, in sequences of `length`."""
        found = []
        rows_seen = self.first_E.tolist(), self.reference_E.tolist()
        peaks = zip(self.output.listed(), self.input.listed(), *rows_seen, strict=True)
        sums_4E = torch.zeros(4, len(self.experts), dtype=torch.float64)
        for start in sorted(self.sums_4E):
            sums_4E += self.sums_4E[start].cpu()
        sums = zip(*sums_4E.tolist(), strict=True)
        for expert, (tokens, gate, weighted, wrong), (output, inner, first, reference) in zip(
            self.experts, sums, peaks, strict=True
        ):
            if wrong:
                raise ModelError(
                    f"{key_name((layer, expert))} writes a value that is not finite; try ",
                    Field("dtype"),
                    " float32",
                    field="model",
                )
            row = ExpertStats(layer=layer, expert=expert)
            if tokens:
                row = dataclasses.replace(
                    row,
                    tokens=int(tokens),
                    gate_sum=gate,
                    reap=weighted / tokens,
                    first_token_output_max=first,
                    reference_output_max=reference,
                    output_max=output[0],
                    position=output[1] % length,
                    token_id=int(ids_T[output[1]]),
                    channel=output[2],
                    input_max=inner[0],
                    input_position=inner[1] % length,
                    input_token_id=int(ids_T[inner[1]]),
                    input_channel=inner[2],
                )
            found.append(row)
        return found


class Accumulator:
    """Adds up `ExpertStats` while a model runs; pass it to `hooks.tapped`. How sequences are put into batches does not
    change the result.

    Call `start_batch` before each forward pass. Peaks are exact, norms are computed in float32 and sums in float64.
    `banks` are the model's banks to be profiled, `ids_BL` the token ids [B, L] of the whole corpus, in the order of the
    batches; all sequences have one length.
    """

    def __init__(self, model: nn.Module, banks: Sequence[Bank], ids_BL: Tensor) -> None:
        self._keys = sorted(expert_keys(banks), key=key_order)
        self._by_rank = is_gathered_by_rank(text_config(model).model_type)
        self._ids_BL = ids_BL
        self._banks: dict[tuple[int, ExpertId], _Bank] = {}
        self._start = 0
        self._real_T: Tensor | None = None

    def start_batch(self, first: int, mask_BL: Tensor) -> None:
        """Announces the next sequences: the number of the first, and their mask (1 for tokens, 0 for padding)."""
        self._start = first * self._ids_BL.shape[1]
        self._real_T = None if bool(mask_BL.all()) else mask_BL.flatten().bool()

    def __call__(self, call: BankCall) -> None:
        where = call.layer, call.experts[0]
        if where not in self._banks:
            self._banks[where] = _Bank(call.experts, call.expert_R.device, by_rank=self._by_rank)
        real_T = None if self._real_T is None else self._real_T.to(call.expert_R.device)
        self._banks[where].update(call, real_T, self._start, self._ids_BL.shape[1])

    def merge(self, other: Accumulator) -> None:
        """Takes the statistics of other batches of the same corpus. The order of the merges does not matter."""
        for where, bank in other._banks.items():
            if where in self._banks:
                self._banks[where].merge(bank)
            else:
                self._banks[where] = copy.deepcopy(bank)

    def cpu(self) -> Accumulator:
        """A copy in the memory of the CPU, where those of several devices can be merged."""
        moved = copy.copy(self)
        moved._real_T = None
        moved._banks = {where: bank.cpu() for where, bank in self._banks.items()}
        return moved

    def rows(self) -> tuple[ExpertStats, ...]:
        """The statistics of every expert, in the order of `key_order`; `ModelError` if one wrote inf or nan."""
        ids_T, length = self._ids_BL.flatten(), self._ids_BL.shape[1]
        found = {row.key: row for (layer, _), bank in self._banks.items() for row in bank.rows(layer, ids_T, length)}
        rows = [found.get(key) or ExpertStats(layer=key[0], expert=key[1]) for key in self._keys]
        tokens, gates = layer_shares(rows, "routed"), layer_shares(rows, "gate")
        return tuple(
            dataclasses.replace(row, token_share=tokens.get(row.key), gate_share=gates.get(row.key)) for row in rows
        )


def merged(accumulator: Accumulator) -> Accumulator:
    """The statistics of all processes together: exactly what one process computes from all batches."""
    if not is_distributed():
        return accumulator
    total, *others = gathered(accumulator.cpu())
    for other in others:
        total.merge(other)
    return total


def _measured(piece: Piece) -> tuple[Piece, Tensor, Tensor, Tensor]:
    """A piece, and for each row the largest |input|, the largest |output| and the norm of the output, float32 [N]."""
    inner_N, output_N = (_in_parts(_peaks, values) for values in (piece.inner_NF, piece.output_ND))
    return piece, inner_N, output_N, _in_parts(_norms, piece.output_ND)


def _in_parts(measure: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """A measure of each row of [N, channels], on a CPU for a few rows at a time, so that they stay in its cache."""
    step = max(1, 2**18 // values.shape[1]) if values.device.type == "cpu" else len(values)
    return torch.cat([measure(part) for part in torch.split(values, step)])


def _peaks(values: Tensor) -> Tensor:
    """The largest |value| of each row, float32; NaN if the row has one."""
    # Without their sign, floats have the order of their bits, and a CPU compares integers several times as fast.
    whole = BITS[values.dtype.itemsize]
    bits = values.view(whole).bitwise_and(torch.iinfo(whole).max)
    return bits.amax(-1).view(values.dtype).float()


def _norms(values: Tensor) -> Tensor:
    """The L2 norm of each row, float32."""
    return cast(Tensor, torch.linalg.vector_norm(values.float(), dim=-1))  # bfloat16 has no fast path on a CPU


def _highest_rows(expert_N: Tensor, peak_N: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that have rows, and for each the row with the largest peak; of equal peaks the first."""
    expert_P, local_N = torch.unique_consecutive(expert_N, return_inverse=True)
    # In two passes, largest value and then first row that has it: argmax per group does not exist on a GPU.
    best_P = peak_N.new_full(expert_P.shape, -1.0).scatter_reduce(0, local_N, peak_N, "amax")
    last = len(peak_N) - 1
    row_N = torch.where(peak_N == best_P[local_N], torch.arange(len(peak_N), device=peak_N.device), last)
    return expert_P, torch.full_like(expert_P, last).scatter_reduce(0, local_N, row_N, "amin")


def _sums(value_R: Tensor, counts_E: Tensor) -> Tensor:
    """The sum of the rows of each expert in float64, always in the same order (a scatter on a GPU has none)."""
    return torch.segment_reduce(value_R.double(), "sum", lengths=counts_E, axis=0, unsafe=True)
