"""Finding the experts of a model: every mixture-of-experts layer of a transformers 5 model as one `Bank`.

Transformers 5 keeps the routed experts of a layer as one module with 3-D parameters, built by
`use_experts_implementation`. That marker is what `find_banks` looks for, so no table of model families is needed.
Shared experts are ordinary MLPs beside the routed ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor, nn

from superexperts.core.errors import ExpertsError, ModelError
from superexperts.core.types import ExpertKey, key_name, key_order
from superexperts.models.decoder import decoder_layers, layer_number, text_config
from superexperts.models.experts import down_bias, down_weight, is_bank, shared_down

__all__ = ["Bank", "check_experts", "expert_keys", "find_banks", "unwrapped", "zero_experts"]


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


def find_banks(model: nn.Module, field: str = "model") -> tuple[Bank, ...]:
    """Every routed expert bank of a transformers 5 model, in the order of the layers.

    A bank is a module that `use_experts_implementation` has built, whatever its class or name; its layer is its index
    in the decoder's list of layers. In a model of several parts only the language model's experts for text count.
    `ModelError` about `field`, the setting that named the model, if there is none.
    """
    banks: list[Bank] = []
    first: nn.ModuleList | None = None
    for path, module in model.named_modules():
        if is_bank(module) and _reads_text(model, path, module):
            layer = layer_number(model, path, field)
            layers = decoder_layers(model, path)
            first = layers if first is None else first
            if layers is not first:  # diffusion_gemma reads the text twice, with the same weights
                continue
            # granitemoeshared has its shared expert beside the block; gemma4's layer is the block itself, and holds
            # much besides experts.
            whole = layers[layer]
            own = [
                child
                for block in _blocks(model, unwrapped(path))  # PEFT wraps what it adapts
                if block is not whole and block in set(whole.modules())
                for child in block.children()
            ]
            beside = [child for name, child in whole.named_children() if name == "mlp" or name.startswith("shared")]
            banks.append(Bank(layer=layer, path=path, module=module, shared_down=shared_down([*own, *beside], module)))
    if not banks:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ModelError(
            f"{family} has no routed experts that transformers 5 can swap; use an MoE checkpoint", field=field
        )
    return tuple(sorted(banks, key=lambda bank: bank.layer))


def _blocks(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that a bank is in, from the inside out."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1)]


def _reads_text(model: nn.Module, path: str, bank: nn.Module) -> bool:
    """Whether a bank is the language model's: parts for pictures and sound have settings of another class, and
    Ernie-4.5-VL has in each layer a second bank, for pictures."""
    settings = getattr(bank, "config", None)
    known = settings is None or not hasattr(model, "config") or type(settings) is type(text_config(model))
    return known and "vision" not in path


def unwrapped(path: str) -> str:
    """A bank's path without PEFT's wrappers, which may be nested: one for each parameter of the bank that it adapts."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def expert_keys(banks: Collection[Bank]) -> tuple[ExpertKey, ...]:
    """Every (layer, expert) of the banks."""
    return tuple(key for bank in banks for key in bank.expert_keys())


def check_experts(banks: Collection[Bank], experts: Collection[ExpertKey], field: str = "experts") -> None:
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
            raise ExpertsError(f"{key_name(key)} is not in the model ({have}); name an expert that is", field=field)


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
                    bias_ED = down_bias(bank.module)
                    tensors = [down_weight(bank.module)[expert], None if bias_ED is None else bias_ED[expert]]
                for tensor in tensors:
                    if tensor is not None:
                        tensor.zero_()
