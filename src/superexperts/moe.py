"""The one seam to the model: with `bank.py` and `implementation.py`, the only one that knows how an MoE layer is built.

Transformers 5 holds a layer's routed experts as one bank of 3-D parameters whose forward is looked up by a name; ours
(`implementation.py`) serves every family. Shared experts are ordinary MLPs beside the bank and are reached by hooks.

Shape suffixes: T tokens (batch x sequence), N tokens routed to one expert, D hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

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
    is_bank,
    join_gate_up,
    projections,
    ready,
    shared_down,
    split_gate_up,
    up_name,
)
from .decoder import decoder_layers, layer_number
from .errors import ExpertsError, ModelError
from .implementation import CONTROLS, IMPLEMENTATION, Control, Edit, Source, Tap, mask_and_add, share

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
    "is_bank",
    "join_gate_up",
    "mask_and_add",
    "projections",
    "ready",
    "silenced",
    "split_gate_up",
    "tapped",
    "unwrapped",
    "up_name",
    "zero_experts",
]


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
                weight_R=torch.ones_like(token_T, dtype=output.dtype),
                made=ready(piece),
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
