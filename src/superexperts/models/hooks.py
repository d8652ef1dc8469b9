"""Tapping, silencing and editing experts while a model runs.

Transformers 5 looks up the forward function of a layer's routed experts by name (`ALL_EXPERTS_FUNCTIONS`). This module
registers one implementation that serves every model family: it runs the stock forward, and for the banks that a
context manager (`tapped`, `silenced`, `edited`) has put under control it also reports each expert's output, silences
experts or replaces their output. Shared experts are reached by ordinary forward hooks.

Shape suffixes: T tokens (batch x sequence), K experts per token, S slots (T x K), E experts in a bank, R rows: a slot,
sorted by expert, N tokens routed to one expert, F intermediate size, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from superexperts.core.errors import ExpertsError, ModelError
from superexperts.core.types import ExpertKey
from superexperts.models.banks import Bank, check_experts, find_banks, unwrapped
from superexperts.models.experts import (
    WORKERS,
    BankCall,
    Piece,
    down_weight,
    expert_norm,
    grouped,
    looped,
    ready,
    stock_forward,
)

__all__ = [
    "Edit",
    "Source",
    "Tap",
    "edited",
    "mask_and_add",
    "set_implementation",
    "share",
    "silenced",
    "tapped",
]

IMPLEMENTATION = "superexperts"

_Finished = tuple[Any, slice, Tensor, bool]
"""(what the tap measured on a piece, its rows, their weighted outputs, whether all rows are one expert's)."""

Edit = Callable[[Tensor], Tensor]
"""Replacement of an expert: its input [N, D] -> its output [N, D], before the routing weight is applied."""


Tap = Callable[[BankCall], None]

Source = Callable[[int, Sequence[int]], Iterator[Mapping[str, Tensor]]]
"""(layer, experts of it) -> their weights, as for `models.experts.Weights`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """What the registered forward does for one bank beyond the stock forward."""

    layer: int
    stock: str
    """Name of the implementation that was set before ours."""
    tap: Tap | None = None
    source: Source | None = None
    """Where the experts' weights come from, if not from the bank; with a tap only."""
    workers: Executor | None = None
    """Who computes the experts of a source on a CPU, if not the thread that the model runs in."""
    edits: Mapping[int, Edit | None] = dataclasses.field(default_factory=dict)
    """Per expert: its replacement, None to silence it."""


# Weak keys: a model that is dropped inside a block must not be kept alive by this table.
CONTROLS: weakref.WeakKeyDictionary[nn.Module, Control] = weakref.WeakKeyDictionary()


def mask_and_add(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    edits: Mapping[int, Edit | None],
) -> Tensor:
    """Runs all experts by `forward` with the chosen ones' routing weight at 0, then adds the chosen ones' own output.

    The cost over `forward` grows with the chosen experts only, and no two big numbers are subtracted: a super
    expert's 1e3 in bfloat16 would leave noise. An expert without an edit (None) is silent.
    """
    chosen = torch.tensor(sorted(edits), device=index_TK.device, dtype=index_TK.dtype)
    y_TD = forward(x_TD, index_TK, weight_TK.masked_fill(torch.isin(index_TK, chosen), 0))
    for expert, edit in sorted(edits.items()):
        if edit is None:
            continue
        token_N, slot_N = torch.where(index_TK == expert)
        if len(token_N):
            # Same order as the stock forward: the expert's output, then the routing weight, then the sum over
            # experts.
            added_ND = edit(x_TD[token_N]) * weight_TK[token_N, slot_N, None]
            y_TD = y_TD.index_add(0, token_N, added_ND.to(y_TD.dtype))
    return y_TD


def _experts_forward(bank: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    control = CONTROLS[bank]
    if control.tap is not None:
        return _tapped_forward(bank, control, x_TD, index_TK, weight_TK)

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return stock_forward(bank, control.stock, x, index, weight)

    if control.edits:
        return mask_and_add(forward, x_TD, index_TK, weight_TK, control.edits)
    return forward(x_TD, index_TK, weight_TK)


def _tapped_forward(bank: nn.Module, control: Control, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The tap sees the rows while they are made; a silenced expert is not tapped."""
    assert control.tap is not None
    routed = _Routed(bank, control, x_TD, index_TK, weight_TK)
    call = routed.call()
    with _threads(share()) if routed.workers else contextlib.nullcontext():
        control.tap(call)
        # A tap may stop early or ignore the call; the layer's output still needs every row.
        for _ in routed.begun or call.pieces:  # what the tap left
            pass
    return routed.sum_TD.to(x_TD.dtype)


class _Routed:
    """What a layer's routed experts do with a batch, computed as its pieces are consumed."""

    def __init__(self, bank: nn.Module, control: Control, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
        self.bank, self.control, self.x_TD, self.index_TK = bank, control, x_TD, index_TK
        # A stable sort keeps tokens ascending within an expert, which `BankCall` promises.
        self.expert_R, self.slot_R = torch.sort(index_TK.flatten(), stable=True)
        self.token_R, self.weight_R = self.slot_R // index_TK.shape[1], weight_TK.flatten()[self.slot_R]
        silent = [expert for expert, edit in control.edits.items() if edit is None]
        self.heard_R: Tensor | slice = slice(None)
        if silent:
            self.heard_R = ~torch.isin(self.expert_R, torch.tensor(silent, device=x_TD.device))
        self.on_cpu = x_TD.device.type == "cpu"
        self.workers = control.workers if self.on_cpu else None
        # Rounded where the stock forward rounds: each weighted answer, and their sum.
        self.sum_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        self.begun: Iterator[Any] | None = None

    def call(self) -> BankCall:
        return BankCall(
            layer=self.control.layer,
            experts=tuple(range(down_weight(self.bank).shape[0])),
            expert_R=self.expert_R[self.heard_R],
            token_R=self.token_R[self.heard_R],
            rank_R=(self.slot_R % self.index_TK.shape[1])[self.heard_R],
            weight_R=self.weight_R[self.heard_R].detach(),
            made=self.go_through,
        )

    def go_through(self, measure: Callable[[Piece], Any]) -> Iterator[Any]:
        """`BankCall.made`."""
        assert self.begun is None, "a call can be gone through once"
        self.begun = self._measured(measure)
        return self.begun

    def _measured(self, measure: Callable[[Piece], Any]) -> Iterator[Any]:
        finish = functools.partial(self._finish, measure)
        for measured, rows, wide_ND, is_one_expert in self._computed(finish):
            yield measured
            if is_one_expert:  # a token comes once in it: nothing depends on the order
                self.sum_TD.index_add_(0, self.token_R[rows], wide_ND)
            else:
                # Several experts answer the same token here. Summing by token in slot order, instead of scattering by
                # expert, makes the rounding the same on every run.
                row_S = torch.empty_like(self.slot_R)
                row_S[self.slot_R] = torch.arange(len(row_S), device=row_S.device)
                self.sum_TD = F.embedding_bag(row_S.view_as(self.index_TK), wide_ND, mode="sum")

    def _computed(self, finish: Callable[[Piece, slice], _Finished]) -> Iterator[_Finished]:
        """On a CPU, one expert at a time: its rows stay in the cache, and no memory for all rows at once has to be
        cleared. On a GPU, all experts in one grouped product, since launching many small ones would dominate."""
        source = self.control.source
        if source is None and not self.on_cpu:
            return grouped(self.bank, self.x_TD, self.expert_R, self.token_R, finish)
        weights = functools.partial(source, self.control.layer) if source else None
        return looped(self.bank, self.x_TD, self.expert_R, self.token_R, finish, weights=weights, workers=self.workers)

    def _finish(self, measure: Callable[[Piece], Any], piece: Piece, rows: slice) -> _Finished:
        heard_N = self.heard_R if isinstance(self.heard_R, slice) else self.heard_R[rows]
        inner_NF, output_ND = piece.inner_NF[heard_N].detach(), piece.output_ND[heard_N].detach()
        measured = measure(dataclasses.replace(piece, inner_NF=inner_NF, output_ND=output_ND))
        answer_ND = expert_norm(self.bank, piece.output_ND)
        if self.control.edits:
            answer_ND = answer_ND.clone()  # what was measured may still be looked at
        for expert, edit in self.control.edits.items():
            chosen_N = self.expert_R[rows] == expert
            given_ND = self.x_TD[self.token_R[rows][chosen_N]]
            answer_ND[chosen_N] = 0 if edit is None else edit(given_ND).to(answer_ND.dtype)
        return measured, rows, (answer_ND * self.weight_R[rows, None]).to(self.sum_TD.dtype), piece.is_one_expert


def share() -> int:
    """Torch threads for each of the `WORKERS`."""
    return max(1, torch.get_num_threads() // WORKERS)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within the block, torch uses `count` threads for work of the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


# ---- context managers ----


@contextlib.contextmanager
def tapped(model: nn.Module, tap: Tap, source: Source | None = None) -> Iterator[tuple[Bank, ...]]:
    """Within the block, `tap` sees what every bank and every shared expert does in every forward pass.

    Yields the banks. With a `source` the routed experts' weights are asked of it, each time for the experts that some
    token reached.
    """
    with _controlled(model, tap=tap, source=source) as banks:
        yield banks


@contextlib.contextmanager
def silenced(model: nn.Module, experts: Collection[ExpertKey]) -> Iterator[None]:
    """Within the block, the chosen experts answer 0, as if their down_proj (and its bias) were zero."""
    with _controlled(model, edits=dict.fromkeys(experts)):
        yield


@contextlib.contextmanager
def edited(model: nn.Module, edits: Mapping[ExpertKey, Edit]) -> Iterator[None]:
    """Within the block, the chosen routed experts answer what their edit computes."""
    with _controlled(model, edits=edits):
        yield


@contextlib.contextmanager
def _controlled(
    model: nn.Module,
    *,
    tap: Tap | None = None,
    source: Source | None = None,
    edits: Mapping[ExpertKey, Edit | None] | None = None,
) -> Iterator[tuple[Bank, ...]]:
    """Sets our implementation with a control for each bank, and puts everything back; blocks can be nested."""
    edits = edits or {}
    banks = find_banks(model)
    check_experts(banks, edits.keys())
    adapted = [bank.layer for bank in banks if bank.path != unwrapped(bank.path)]
    if adapted:
        # The adapter answers for its experts outside the bank: a tap would see zeros, a silence would do nothing.
        raise ModelError(
            f"layer {adapted[0]} carries an adapter on its experts; merge it into the model first", field="model"
        )
    # Blocks nest: the inner one adds to the controls of the outer one, and restores them when it ends.
    before = {bank.module: CONTROLS.get(bank.module) for bank in banks}
    stock = cast(Any, banks[0].module).config._experts_implementation
    with contextlib.ExitStack() as hooks:
        workers = None
        if source is not None and torch.get_num_threads() >= WORKERS:
            workers = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(share(),))
            hooks.enter_context(workers)
        try:
            for bank in banks:
                own: dict[int, Edit | None] = {
                    expert: edit
                    for (layer, expert), edit in edits.items()
                    if layer == bank.layer and expert != "shared"
                }
                outer = before[bank.module] or Control(layer=bank.layer, stock=stock)
                CONTROLS[bank.module] = dataclasses.replace(
                    outer,
                    tap=tap or outer.tap,
                    source=source or outer.source,
                    workers=workers or outer.workers,
                    edits={**outer.edits, **own},
                )
                if bank.shared_down is not None:
                    if tap is not None:
                        hook = bank.shared_down.register_forward_hook(_shared_tap(tap, bank.layer))
                        hooks.callback(hook.remove)
                    if (bank.layer, "shared") in edits:
                        hook = bank.shared_down.register_forward_hook(_shared_edit(edits[bank.layer, "shared"]))
                        hooks.callback(hook.remove)
            set_implementation(model, IMPLEMENTATION)
            yield banks
        finally:
            for bank in banks:
                outer_control = before[bank.module]
                if outer_control is None:
                    CONTROLS.pop(bank.module, None)
                else:
                    CONTROLS[bank.module] = outer_control
            set_implementation(model, stock)


def set_implementation(model: nn.Module, name: str) -> None:
    """Sets the experts implementation of a model that may be wrapped, say by PEFT."""
    cast(Any, model).set_experts_implementation(name)


def _shared_tap(tap: Tap, layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        output_TD = output.detach().flatten(0, -2)
        piece = Piece(inner_NF=arguments[0].detach().flatten(0, -2), output_ND=output_TD, is_one_expert=True)
        token_T = torch.arange(len(output_TD), device=output.device)
        tap(
            BankCall(
                layer=layer,
                experts=("shared",),
                expert_R=torch.zeros_like(token_T),
                token_R=token_T,
                rank_R=torch.zeros_like(token_T),
                weight_R=torch.ones_like(token_T, dtype=output.dtype),
                made=ready(piece),
            )
        )

    return hook


def _shared_edit(edit: Edit | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    if edit is not None:
        raise ExpertsError("a shared expert can be silenced, not edited; put LoRA on it by name instead")
    return lambda _, __, output: torch.zeros_like(output)
