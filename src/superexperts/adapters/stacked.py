"""One A and one B of three dimensions for the experts of a layer: `...experts.down_proj.lora_A.weight` [E, R, I].

Trainers that keep experts in one tensor write this, and engines read it. A factor that all experts share has E = 1.
Unsloth's gpt_oss numbers the experts instead: `...experts.gate_up_projs.3.lora_A.weight` [R, I].

Shape suffixes: E experts, R rank, I and O inputs and outputs of a linear map.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from superexperts.adapters.factors import (
    Factor,
    Factors,
    Place,
    matrices,
    peft_scaling,
    require_all_read,
    take_pair,
)
from superexperts.adapters.spelling import PREFIX
from superexperts.core.errors import DataError
from superexperts.models.banks import Bank, find_banks
from superexperts.models.experts import DOWN, GATE, UP, projections, split_up

__all__ = ["read", "recognise"]

_KEY = re.compile(r"layers\.(\d+)\.(?:.*\.)?experts\.([a-z0-9_]+?)(?:\.(\d+))?\.lora_A(?:\.weight)?$")
_NAMES = {
    "gate_proj": GATE, "w1": GATE, "up_proj": UP, "w3": UP, "down_proj": DOWN, "down_projs": DOWN, "w2": DOWN,
    "gate_up_proj": "both", "gate_up_projs": "both", "w13": "both",
}  # fmt: skip
"""Name in a file -> the projection, or both gate and up in one."""


def recognise(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> str | None:
    """Why a file is in this layout, or None; see `formats.Format`."""
    found = next((key for key in tensors for match in [_KEY.search(key)] if match and match[2] in _NAMES), None)
    return None if found is None else f"keys such as {found.removeprefix(PREFIX)}"


def read(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Factors:
    """The factors of a file; see `formats.Format`."""
    banks = {bank.layer: bank for bank in find_banks(model)}
    left = {key if key.endswith(".weight") else f"{key}.weight": tensor for key, tensor in tensors.items()}
    factors: dict[Place, Factor] = {}
    for key in sorted(left):
        match = _KEY.search(key)
        if match is None or match[2] not in _NAMES or int(match[1]) not in banks or key not in left:
            continue
        bank, projection = banks[int(match[1])], _NAMES[match[2]]
        name = key.removesuffix(".lora_A.weight")
        a, b = take_pair(left, name)
        numbers = range(bank.num_experts) if match[3] is None else [int(match[3])]
        rank = a.shape[-2]
        scaling = peft_scaling(config, name.removeprefix(PREFIX), rank)
        for expert in numbers:
            if expert >= bank.num_experts:
                raise DataError(f"{name} is for an expert that the model does not have", field="adapter")
            a_RI, b_OR = _of_expert(a, bank, expert), _of_expert(b, bank, expert)
            for part, piece_OR in _pieces(bank, projection, b_OR):
                shape = tuple(projections(bank.module, expert)[part].shape)
                if (piece_OR.shape[0], a_RI.shape[-1]) != shape or piece_OR.shape[1] != rank:
                    raise DataError(
                        f"{name} has A {list(a.shape)} and B {list(b.shape)}, which are not [experts, rank, inputs] "
                        f"and [experts, outputs, rank] of {shape[1]} inputs and {shape[0]} outputs; give the "
                        "adapter's own model",
                        field="adapter",
                    )
                place = Place(path=bank.path, expert=expert, projection=part)
                factors[place] = Factor(a_RI=a_RI, b_OR=piece_OR, scaling=scaling)
    for path in matrices(model):
        if f"{PREFIX}{path}.lora_A.weight" in left:
            a_RI, b_OR = take_pair(left, f"{PREFIX}{path}")
            factors[Place(path=path)] = Factor(a_RI=a_RI, b_OR=b_OR, scaling=peft_scaling(config, path, len(a_RI)))
    require_all_read(left)
    return factors


def _of_expert(factor: Tensor, bank: Bank, expert: int) -> Tensor:
    """One expert's matrix of a factor, which may be shared by all of them."""
    if factor.dim() == 2:
        return factor
    if factor.dim() != 3 or len(factor) not in (1, bank.num_experts):
        raise DataError(
            f"a factor of the experts of {bank.path} has the shape {list(factor.shape)}, which is not that of one of "
            f"{bank.num_experts} experts; give the adapter's own model",
            field="adapter",
        )
    return factor[0 if len(factor) == 1 else expert]


def _pieces(bank: Bank, projection: str, b_OR: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(projection, its rows of B)."""
    if projection == "both":
        yield from split_up(bank.module, b_OR).items()
    else:
        yield projection, b_OR
