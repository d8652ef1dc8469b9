"""Counts how many tokens each adapted expert sees, where the router sends tokens to a bank; padding is not counted.

Shape suffixes: B sequences, L tokens per sequence, T = B x L, K experts per token, E experts in a bank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from superexperts.adapters.layer import ExpertsLora
from superexperts.core.errors import ModelError
from superexperts.core.types import ExpertKey, key_name, key_order
from superexperts.models.banks import Bank, find_banks, unwrapped

__all__ = ["Exposure", "adapted_experts", "counting"]


def adapted_experts(model: nn.Module) -> tuple[ExpertKey, ...]:
    """The experts that an adapter on the model can change; in a wholly adapted bank, those with a nonzero B."""
    banks = {unwrapped(bank.path): bank for bank in _banks(model)}
    found: set[ExpertKey] = set()
    for path, module in model.named_modules():
        bank = banks.get(unwrapped(path))
        if isinstance(module, ExpertsLora):
            assert bank is not None
            found |= {(bank.layer, expert) for experts in module.experts.values() for expert in experts}
        elif isinstance(module, ParamWrapper) and bank is not None:
            for part in module.lora_B.values():
                used_E = part.weight.reshape(len(part.weight), -1, bank.num_experts).any((0, 1))
                found |= {(bank.layer, int(expert)) for expert in used_E.nonzero()}
    for bank in banks.values():
        if bank.shared_down is not None:
            block = model.get_submodule(unwrapped(bank.path).rpartition(".")[0])
            for sibling in block.children():
                inside = list(sibling.modules())
                if any(module is bank.shared_down for module in inside) and any(
                    isinstance(module, LoraLayer) for module in inside
                ):
                    found.add((bank.layer, "shared"))
    return tuple(sorted(found, key=key_order))


def _banks(model: nn.Module) -> tuple[Bank, ...]:
    """The model's banks; empty for a model without experts, which can have an adapter on its attention."""
    try:
        return find_banks(model)
    except ModelError:
        return ()


class Exposure:
    """Running counts; see `counting`."""

    def __init__(self, experts: tuple[ExpertKey, ...]) -> None:
        self.experts = experts
        self.on = True
        """Whether forward passes are counted."""
        self.tokens = 0
        """Tokens counted, padding excluded."""
        self._counts: dict[int, Tensor] = {}
        """Per layer, tokens of each expert [E]."""
        self._mask_T: Tensor | None = None
        self._reached_T: Tensor | None = None
        self._reached = 0

    def by_expert(self, *, together: bool = True) -> dict[str, int]:
        """Tokens that each adapted expert saw, by its name; summed over all processes if `together`."""
        own = [self.tokens if expert == "shared" else self._count(layer, expert) for layer, expert in self.experts]
        totals = torch.tensor(own, dtype=torch.int64)
        if together and torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            totals = totals.to(device)
            torch.distributed.all_reduce(totals)
        return {key_name(key): int(total) for key, total in zip(self.experts, totals.tolist(), strict=True)}

    def state(self) -> dict[str, Any]:
        """The counts of this process, as JSON."""
        return {"tokens": self.tokens, "counts": {str(layer): row.tolist() for layer, row in self._counts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from the counts that `state` returned."""
        self.tokens = state["tokens"]
        self._counts = {int(layer): torch.tensor(row) for layer, row in state["counts"].items()}

    def share(self) -> float:
        """Share of the tokens that reached an adapted expert in some layer."""
        return self._reached / self.tokens if self.tokens else 0.0

    def _count(self, layer: int, expert: int) -> int:
        return int(self._counts[layer][expert]) if layer in self._counts else 0

    def begin(self, ids_BL: Tensor, mask_BL: Tensor | None) -> None:
        """A forward pass of the model begins."""
        self.end()
        self._mask_T = torch.ones_like(ids_BL.flatten(), dtype=torch.bool)
        if mask_BL is not None and mask_BL.shape == ids_BL.shape:
            self._mask_T = mask_BL.flatten().bool()
        self._reached_T = torch.zeros_like(self._mask_T)

    def see(self, layer: int, index_TK: Tensor, experts: int) -> None:
        """A bank receives its tokens."""
        mask_T = self._mask_T
        if mask_T is None or len(mask_T) != len(index_TK):
            mask_T = torch.ones_like(index_TK[:, 0], dtype=torch.bool)
        mask_T = mask_T.to(index_TK.device)
        zeros_E = torch.zeros(experts, dtype=torch.int64)
        counts = self._counts[layer] = self._counts.get(layer, zeros_E).to(index_TK.device)
        counts.index_add_(0, index_TK.flatten(), mask_T[:, None].expand_as(index_TK).flatten().long())
        own = [expert for key_layer, expert in self.experts if key_layer == layer]
        if self._reached_T is not None and len(self._reached_T) == len(index_TK):
            chosen = torch.tensor([expert for expert in own if expert != "shared"], device=index_TK.device)
            hit_T = torch.ones_like(mask_T) if "shared" in own else torch.isin(index_TK, chosen).any(1)
            self._reached_T = self._reached_T.to(index_TK.device) | (hit_T & mask_T)

    def end(self) -> None:
        """The forward pass is over."""
        if self._mask_T is not None and self._reached_T is not None:
            self.tokens += int(self._mask_T.sum())
            self._reached += int(self._reached_T.sum())
        self._mask_T = self._reached_T = None


@contextlib.contextmanager
def counting(adapted: nn.Module, *, training: bool) -> Iterator[Exposure]:
    """Within the block, counts every forward pass in training mode, or every one in evaluation mode.

    `adapted` is the PeftModel that is called. Layers that gradient checkpointing runs a second time, in the backward
    pass, are counted once.
    """
    model = cast(Any, adapted).get_base_model()
    exposure = Exposure(adapted_experts(model))
    layers = {layer for layer, _ in exposure.experts}

    def counted(module: nn.Module) -> bool:
        in_backward = torch._C._current_graph_task_id() != -1  # -1 outside of autograd's backward pass
        return exposure.on and module.training == training and not in_backward

    def begin(module: nn.Module, arguments: tuple[Any, ...], fields: dict[str, Any]) -> None:
        if counted(module):
            exposure.begin(fields["input_ids"], fields.get("attention_mask"))

    def end(module: nn.Module, *_: Any) -> None:
        if counted(module):
            exposure.end()

    handles = [
        adapted.register_forward_pre_hook(begin, with_kwargs=True),
        adapted.register_forward_hook(end),
    ]
    for bank in _banks(model):
        if bank.layer in layers:

            def see(module: nn.Module, arguments: tuple[Any, ...], bank: Bank = bank) -> None:
                if counted(module):
                    exposure.see(bank.layer, arguments[1], bank.num_experts)

            handles.append(bank.module.register_forward_pre_hook(see))
    try:
        yield exposure
    finally:
        for handle in handles:
            handle.remove()
