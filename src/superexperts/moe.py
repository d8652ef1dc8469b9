"""The one seam to the model: with `bank.py`, the only file that knows how a Mixture-of-Experts layer is built.

Transformers 5 holds a layer's routed experts as one bank of 3-D parameters whose forward is looked up in
`ALL_EXPERTS_FUNCTIONS` (transformers/integrations/moe.py, `use_experts_implementation`). One function registered there
serves every family: it runs the stock forward, and where a caller asks for it taps each expert's output, silences
chosen experts or replaces their output. Shared experts are ordinary MLPs beside the bank and are reached by hooks.

Shape suffixes: T tokens (batch x sequence), K experts per token, S slots (T x K), E experts in a bank, R rows: a slot,
sorted by expert, N tokens routed to one expert, D hidden size, F intermediate size of an expert.
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

from .artifacts import ExpertKey, key_name, key_order
from .bank import (
    WORKERS,
    BankCall,
    ExpertCall,
    Piece,
    down_weight,
    expert_down,
    expert_inner,
    expert_norm,
    expert_up,
    grouped,
    is_bank,
    join_gate_up,
    looped,
    projections,
    shared_down,
    split_gate_up,
    stock_forward,
    up_name,
)
from .decoder import decoder_layers, layer_number
from .errors import ExpertsError, ModelError

__all__ = [
    "Bank",
    "BankCall",
    "ExpertCall",
    "Piece",
    "check_experts",
    "down_weight",
    "edited",
    "expert_down",
    "expert_inner",
    "expert_keys",
    "expert_norm",
    "expert_up",
    "find_banks",
    "grouped",
    "is_bank",
    "join_gate_up",
    "mask_and_add",
    "projections",
    "silenced",
    "split_gate_up",
    "stock_forward",
    "tapped",
    "unwrapped",
    "up_name",
    "zero_experts",
]

IMPLEMENTATION = "superexperts"

Edit = Callable[[Tensor], Tensor]
"""x_ND, what the router sends an expert -> y_ND, what the expert answers, before the routing weight."""


Tap = Callable[[BankCall], None]

Source = Callable[[int, Sequence[int]], Iterator[Mapping[str, Tensor]]]
"""A layer, and experts of it -> their weights, as `bank.Weights` has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """One MoE layer: its routed experts, and its shared expert(s) where it has some."""

    layer: int
    """Number of the decoder layer, dense layers counted."""
    path: str
    """Name of the bank's module in the model."""
    module: nn.Module
    shared_down: nn.Linear | None
    """down_proj of the shared expert(s); None where the family has none."""

    @property
    def num_experts(self) -> int:
        """Routed experts of the bank."""
        return down_weight(self.module).shape[0]

    def expert_keys(self) -> tuple[ExpertKey, ...]:
        """Every expert of the layer, the shared one last."""
        routed: list[ExpertKey] = [(self.layer, expert) for expert in range(self.num_experts)]
        if self.shared_down is not None:
            routed.append((self.layer, "shared"))
        return tuple(routed)


# ---- finding experts --------------------------------------------------------------------------------------------


def find_banks(model: nn.Module) -> tuple[Bank, ...]:
    """Every routed expert bank of a transformers 5 model, in the order of the layers.

    A bank is a module that `use_experts_implementation` has built, whatever its class or name; its layer is its index
    in the decoder's list of layers. `ModelError` if there is none.
    """
    banks = []
    for path, module in model.named_modules():
        if is_bank(module):
            block = model.get_submodule(unwrapped(path).rpartition(".")[0])  # PEFT wraps what it adapts
            layer = layer_number(model, path)
            # granitemoeshared has its shared expert beside the block; gemma4's layer is the block itself, and holds
            # much that is no expert.
            whole = decoder_layers(model, path)[layer]
            own = [] if block is whole else [*block.children()]
            beside = [child for name, child in whole.named_children() if name == "mlp" or name.startswith("shared")]
            banks.append(Bank(layer=layer, path=path, module=module, shared_down=shared_down([*own, *beside], module)))
    if not banks:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ModelError(f"MODEL: {family} has no routed experts that transformers 5 can swap; use an MoE checkpoint")
    return tuple(sorted(banks, key=lambda bank: bank.layer))


def unwrapped(path: str) -> str:
    """A bank's path without PEFT's wrappers, which may be nested: one for each parameter of the bank that it adapts."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def expert_keys(banks: Collection[Bank]) -> tuple[ExpertKey, ...]:
    """Every (layer, expert) of the banks."""
    return tuple(key for bank in banks for key in bank.expert_keys())


def check_experts(banks: Collection[Bank], experts: Collection[ExpertKey], option: str = "--experts") -> None:
    """`ExpertsError` that names the first expert that the model does not have, and what it has instead."""
    known = set(expert_keys(banks))
    for key in sorted(experts, key=key_order):
        if key not in known:
            sizes = {bank.layer: bank.num_experts for bank in banks}
            if key[0] not in sizes:
                have = f"MoE layers are {min(sizes)}..{max(sizes)}"
            elif key[1] == "shared":
                have = "that layer has no shared expert"
            else:
                have = f"layer {key[0]} has experts 0..{sizes[key[0]] - 1}"
            raise ExpertsError(f"{option}: {key_name(key)} is not in the model ({have}); name an expert that is")


# ---- the registered implementation --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Control:
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


_CONTROLS: weakref.WeakKeyDictionary[nn.Module, _Control] = weakref.WeakKeyDictionary()


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
            added_ND = edit(x_TD[token_N]) * weight_TK[token_N, slot_N, None]
            y_TD = y_TD.index_add(0, token_N, added_ND.to(y_TD.dtype))
    return y_TD


def _experts_forward(bank: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    control = _CONTROLS[bank]
    if control.tap is not None:
        return _tapped_forward(bank, control, x_TD, index_TK, weight_TK)

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return stock_forward(bank, control.stock, x, index, weight)

    if control.edits:
        return mask_and_add(forward, x_TD, index_TK, weight_TK, control.edits)
    return forward(x_TD, index_TK, weight_TK)


def _tapped_forward(bank: nn.Module, control: _Control, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The tap sees the rows while they are made; a silenced expert is not tapped."""
    assert control.tap is not None
    expert_R, slot_R = torch.sort(index_TK.flatten(), stable=True)
    token_R, weight_R = slot_R // index_TK.shape[1], weight_TK.flatten()[slot_R]
    silent = [expert for expert, edit in control.edits.items() if edit is None]
    heard_R = ~torch.isin(expert_R, torch.tensor(silent, device=expert_R.device, dtype=expert_R.dtype))
    # On a CPU an expert at a time: its rows stay in the cache, and no memory is cleared for those of all. A GPU would
    # wait for the start of each small product.
    on_cpu = x_TD.device.type == "cpu"
    if control.source is None and not on_cpu:
        made = grouped(bank, x_TD, expert_R, token_R)
    else:
        weights = functools.partial(control.source, control.layer) if control.source else None
        made = looped(bank, x_TD, expert_R, token_R, weights, control.workers if on_cpu else None)
    # Rounded where the stock forward rounds: each weighted answer, and their sum.
    sum_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))

    def pieces() -> Iterator[Piece]:
        nonlocal sum_TD
        done = 0
        for piece in made:
            rows = slice(done, done := done + len(piece.output_ND))
            heard_N = slice(None) if not silent else heard_R[rows]
            yield dataclasses.replace(
                piece, inner_NF=piece.inner_NF[heard_N].detach(), output_ND=piece.output_ND[heard_N].detach()
            )
            answer_ND = expert_norm(bank, piece.output_ND)
            for expert, edit in control.edits.items():
                chosen_N = expert_R[rows] == expert
                answer_ND[chosen_N] = 0 if edit is None else edit(x_TD[token_R[rows][chosen_N]]).to(answer_ND.dtype)
            wide_ND = (answer_ND * weight_R[rows, None]).to(sum_TD.dtype)
            if piece.is_one_expert:  # a token comes once in it: nothing depends on the order
                sum_TD.index_add_(0, token_R[rows], wide_ND)
            else:
                row_S = torch.empty_like(slot_R)
                row_S[slot_R] = torch.arange(len(slot_R), device=slot_R.device)
                sum_TD = F.embedding_bag(row_S.view_as(index_TK), wide_ND, mode="sum")

    computed = pieces()
    call = BankCall(
        layer=control.layer,
        experts=tuple(range(down_weight(bank).shape[0])),
        expert_R=expert_R[heard_R] if silent else expert_R,
        token_R=token_R[heard_R] if silent else token_R,
        weight_R=(weight_R[heard_R] if silent else weight_R).detach(),
        pieces=computed,
    )
    with _threads(_share()) if on_cpu and control.workers else contextlib.nullcontext():
        control.tap(call)
        for _ in computed:  # what the tap left
            pass
    return sum_TD.to(x_TD.dtype)


def _share() -> int:
    """Threads of one of the `WORKERS`."""
    return max(1, torch.get_num_threads() // WORKERS)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within the block, torch computes in so many threads for the thread that it is called from."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


# ---- what callers use ---------------------------------------------------------------------------------------------


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
        raise ModelError(f"MODEL: layer {adapted[0]} carries an adapter on its experts; merge it into the model first")
    before = {bank.module: _CONTROLS.get(bank.module) for bank in banks}
    stock = cast(Any, banks[0].module).config._experts_implementation
    with contextlib.ExitStack() as hooks:
        workers = None
        if source is not None and torch.get_num_threads() >= WORKERS:
            workers = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(_share(),))
            hooks.enter_context(workers)
        try:
            for bank in banks:
                own: dict[int, Edit | None] = {
                    expert: edit
                    for (layer, expert), edit in edits.items()
                    if layer == bank.layer and expert != "shared"
                }
                outer = before[bank.module] or _Control(layer=bank.layer, stock=stock)
                _CONTROLS[bank.module] = dataclasses.replace(
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
                    _CONTROLS.pop(bank.module, None)
                else:
                    _CONTROLS[bank.module] = outer_control
            set_implementation(model, stock)


def set_implementation(model: nn.Module, name: str) -> None:
    """Sets the experts implementation of a model that may be wrapped, say by PEFT."""
    cast(Any, model).set_experts_implementation(name)


def _shared_tap(tap: Tap, layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        output_TD = output.detach().flatten(0, -2)
        token_T = torch.arange(len(output_TD), device=output.device)
        tap(
            BankCall(
                layer=layer,
                experts=("shared",),
                expert_R=torch.zeros_like(token_T),
                token_R=token_T,
                weight_R=torch.ones_like(token_T, dtype=output.dtype),
                pieces=[Piece(inner_NF=arguments[0].detach().flatten(0, -2), output_ND=output_TD, is_one_expert=True)],
            )
        )

    return hook


def _shared_edit(edit: Edit | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    if edit is not None:
        raise ExpertsError("a shared expert can be silenced, not edited; put LoRA on it by name instead")
    return lambda _, __, output: torch.zeros_like(output)


def zero_experts(model: nn.Module, experts: Collection[ExpertKey]) -> None:
    """Zeroes the chosen experts' down_proj (and its bias) in place, which is the paper's pruning."""
    banks = find_banks(model)
    check_experts(banks, experts)
    with torch.no_grad():
        for bank in banks:
            for layer, expert in experts:
                if layer != bank.layer:
                    continue
                if expert == "shared":
                    assert bank.shared_down is not None
                    tensors: list[Tensor | None] = [bank.shared_down.weight, bank.shared_down.bias]
                else:
                    bias = cast(Any, bank.module).down_proj_bias[expert] if cast(Any, bank.module).has_bias else None
                    tensors = [down_weight(bank.module)[expert], bias]
                for tensor in tensors:
                    if tensor is not None:
                        tensor.zero_()
