"""Statistics of every expert, gathered from `moe.BankCall`s a whole bank at a time, on the model's own device.

Nothing as large as the activations is made or kept: each row is reduced to its largest |value| and its norm.

Shape suffixes: T tokens of a batch (B sequences x L positions), E experts of a bank, R rows (a token at one of its
experts, sorted by expert and then by token), F intermediate size, D hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from . import moe
from .artifacts import ExpertId, ExpertKey, ExpertStats, key_name, key_order
from .errors import ModelError
from .select import layer_shares

__all__ = ["Recorder"]

NOWHERE = torch.iinfo(torch.int64).max
"""A place in the corpus that comes after every token's."""


class _Peaks:
    """Per expert of a bank the largest |value| so far, and where it was; the first of equals wins."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.value_E = torch.full((size,), -1.0, device=device)
        """-1 without tokens, as are the next two."""
        self.place_E = torch.full((size,), -1, device=device)
        """Place of the peak's token in the corpus: sequence x L + position."""
        self.channel_E = torch.full((size,), -1, device=device)

    def update(self, expert_R: Tensor, place_R: Tensor, values: Tensor, peak_R: Tensor) -> None:
        """Takes rows of `values` [R, channels], whose largest |value| is `peak_R`."""
        best_E = _reduce(expert_R, peak_R, torch.full_like(self.value_E, -1.0), "amax")
        # Of the rows that reach their expert's peak, the one that comes first in the corpus.
        reaching_R = torch.where(peak_R == best_E[expert_R], place_R, NOWHERE)
        first_E = _reduce(expert_R, reaching_R, torch.full_like(self.place_E, NOWHERE), "amin")
        at_R = reaching_R == first_E[expert_R]
        row_E = torch.zeros_like(first_E)
        row_E[expert_R[at_R]] = at_R.nonzero()[:, 0]
        better_E = best_E > self.value_E
        self.channel_E = torch.where(better_E, values[row_E].abs().argmax(-1), self.channel_E)
        self.place_E = torch.where(better_E, first_E, self.place_E)
        self.value_E = torch.where(better_E, best_E, self.value_E)

    def cpu(self) -> _Peaks:
        moved = copy.copy(self)
        moved.value_E, moved.place_E = self.value_E.cpu(), self.place_E.cpu()
        moved.channel_E = self.channel_E.cpu()
        return moved

    def merge(self, other: _Peaks) -> None:
        """Takes the peaks of other tokens."""
        first_E = (other.value_E == self.value_E) & (other.place_E < self.place_E)
        better_E = (other.value_E > self.value_E) | first_E
        self.channel_E = torch.where(better_E, other.channel_E, self.channel_E)
        self.place_E = torch.where(better_E, other.place_E, self.place_E)
        self.value_E = torch.where(better_E, other.value_E, self.value_E)

    def listed(self) -> list[tuple[float, int, int]]:
        """Per expert (value, place, channel)."""
        return list(zip(self.value_E.tolist(), self.place_E.tolist(), self.channel_E.tolist(), strict=True))


class _Bank:
    """What is known of one bank's experts."""

    def __init__(self, experts: tuple[ExpertId, ...], device: torch.device) -> None:
        self.experts = experts
        self.sums_4E: dict[int, Tensor] = {}
        """Per batch, by the place of its first token: tokens, gate sum, sum of weighted norms, values that are not
        finite; float64. They are added up in the order of the corpus, whoever ran which batch."""
        self.first_E = torch.zeros(len(experts), device=device)
        self.input, self.output = _Peaks(len(experts), device), _Peaks(len(experts), device)

    def update(self, call: moe.BankCall, real_T: Tensor | None, start: int, length: int) -> None:
        """Takes the rows of tokens that are no padding; `start` is the place of the batch's first token."""
        real_R = slice(None) if real_T is None else real_T[call.token_R]
        expert_R, token_R, weight_R = call.expert_R[real_R], call.token_R[real_R], call.weight_R[real_R]
        inner_RF, output_RD = call.inner_RF[real_R], call.output_RD[real_R]
        if not len(expert_R):
            return
        counts_E = torch.bincount(expert_R, minlength=len(self.experts))
        inner_peak_R, _ = _row_norms(inner_RF)
        peak_R, norm_R = _row_norms(output_RD)
        terms_4R = (torch.ones_like(peak_R), weight_R, weight_R.double() * norm_R, ~torch.isfinite(peak_R))
        self.sums_4E[start] = torch.stack([_sums(term_R, counts_E) for term_R in terms_4R])
        self.input.update(expert_R, start + token_R, inner_RF, inner_peak_R)
        self.output.update(expert_R, start + token_R, output_RD, peak_R)
        # The reference's hook sees a routed expert's first token of a sequence, and all tokens of a shared expert.
        first_R = torch.ones_like(expert_R, dtype=torch.bool)
        if self.experts != ("shared",):
            sequence_R = expert_R * (int(token_R.max()) // length + 1) + token_R // length
            first_R[1:] = sequence_R[1:] != sequence_R[:-1]
        self.first_E = _reduce(expert_R[first_R], peak_R[first_R], self.first_E, "amax")

    def cpu(self) -> _Bank:
        moved = copy.copy(self)
        moved.sums_4E = {start: sums_4E.cpu() for start, sums_4E in self.sums_4E.items()}
        moved.first_E = self.first_E.cpu()
        moved.input, moved.output = self.input.cpu(), self.output.cpu()
        return moved

    def merge(self, other: _Bank) -> None:
        """Takes what is known from other batches."""
        self.sums_4E |= other.sums_4E
        self.first_E = torch.maximum(self.first_E, other.first_E)
        self.input.merge(other.input)
        self.output.merge(other.output)

    def rows(self, layer: int, ids_T: Tensor, length: int) -> list[ExpertStats]:
        found = []
        peaks = zip(self.output.listed(), self.input.listed(), self.first_E.tolist(), strict=True)
        sums_4E = torch.zeros(4, len(self.experts), dtype=torch.float64)
        for start in sorted(self.sums_4E):
            sums_4E += self.sums_4E[start].cpu()
        sums = zip(*sums_4E.tolist(), strict=True)
        for expert, (tokens, gate, weighted, wrong), (output, inner, first) in zip(
            self.experts, sums, peaks, strict=True
        ):
            if wrong:
                raise ModelError(
                    f"MODEL: {key_name((layer, expert))} writes a value that is not finite; try --dtype float32"
                )
            row = ExpertStats(layer=layer, expert=expert)
            if tokens:
                row = dataclasses.replace(
                    row,
                    tokens=int(tokens),
                    gate_sum=gate,
                    reap=weighted / tokens,
                    first_token_output_max=first,
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


class Recorder:
    """A tap for `moe.tapped` that gathers `ExpertStats`. Results do not depend on how sequences are put into batches.

    Call `start_batch` before each forward pass; all sequences have one length. Peaks are exact, norms are taken in
    float32, sums in float64. `ids_BL` are the sequences [B, L] of the whole corpus, in the order of the batches.
    """

    def __init__(self, keys: Collection[ExpertKey], ids_BL: Tensor) -> None:
        self._keys = sorted(keys, key=key_order)
        self._ids_BL = ids_BL
        self._banks: dict[tuple[int, ExpertId], _Bank] = {}
        self._start = 0
        self._real_T: Tensor | None = None

    def start_batch(self, first: int, mask_BL: Tensor) -> None:
        """Says which sequences come next: the number of the first, and 1 for tokens, 0 for padding."""
        self._start = first * self._ids_BL.shape[1]
        self._real_T = None if bool(mask_BL.all()) else mask_BL.flatten().bool()

    def __call__(self, call: moe.BankCall) -> None:
        where = call.layer, call.experts[0]
        if where not in self._banks:
            self._banks[where] = _Bank(call.experts, call.expert_R.device)
        real_T = None if self._real_T is None else self._real_T.to(call.expert_R.device)
        self._banks[where].update(call, real_T, self._start, self._ids_BL.shape[1])

    def merge(self, other: Recorder) -> None:
        """Takes what another one recorded of other batches of the same corpus; the result does not depend on who ran
        which, nor on the order of the merges."""
        for where, bank in other._banks.items():
            if where in self._banks:
                self._banks[where].merge(bank)
            else:
                self._banks[where] = copy.deepcopy(bank)

    def cpu(self) -> Recorder:
        """The same in the CPU's memory, where recorders of several devices can be merged."""
        moved = copy.copy(self)
        moved._real_T = None
        moved._banks = {where: bank.cpu() for where, bank in self._banks.items()}
        return moved

    def rows(self) -> tuple[ExpertStats, ...]:
        """Every expert's statistics, in the order of `key_order`. `ModelError` names one that wrote inf or nan."""
        ids_T, length = self._ids_BL.flatten(), self._ids_BL.shape[1]
        found = {row.key: row for (layer, _), bank in self._banks.items() for row in bank.rows(layer, ids_T, length)}
        rows = [found.get(key) or ExpertStats(layer=key[0], expert=key[1]) for key in self._keys]
        tokens, gates = layer_shares(rows, "routed"), layer_shares(rows, "gate")
        return tuple(
            dataclasses.replace(row, token_share=tokens.get(row.key), gate_share=gates.get(row.key)) for row in rows
        )


def _row_norms(values: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of [R, channels] the largest |value| and the L2 norm, float32."""
    # On a CPU, a few rows at a time stay in the cache in float32: four times faster than a norm of bfloat16 rows, which
    # has no fast path. A GPU takes all at once.
    step = max(1, 2**18 // values.shape[1]) if values.device.type == "cpu" else len(values)
    peaks, norms = [], []
    for part in torch.split(values, step):
        wide = part.float()
        peaks.append(torch.maximum(wide.amax(-1), -wide.amin(-1)))
        norms.append(torch.linalg.vector_norm(wide, dim=-1))
    return torch.cat(peaks), torch.cat(norms)


def _reduce(expert_R: Tensor, value_R: Tensor, start_E: Tensor, how: str) -> Tensor:
    """Per expert the largest ("amax") or smallest ("amin") of `start_E` and its rows."""
    return start_E.scatter_reduce(0, expert_R, value_R, how)


def _sums(value_R: Tensor, counts_E: Tensor) -> Tensor:
    """Per expert the sum of its rows, in float64 and always in the same order (a scatter on a GPU adds in any)."""
    return torch.segment_reduce(value_R.double(), "sum", lengths=counts_E, axis=0, unsafe=True)
