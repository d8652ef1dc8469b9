"""The layout of mlx-lm (adapters.safetensors): A [I, R] and B [R, O], with the experts of a layer in one tensor.

`lora_a` of an ordinary linear map is [I, R] and `lora_b` [R, O], and y = W x + scale * B^T A^T x. The experts are
`switch_mlp.gate_proj` and so on, with `lora_a` [E, R, I] (once [E R, I]) and `lora_b` [E, O, R] (mlx_lm/tuner/lora.py).

Shape suffixes: E experts, R rank, I and O inputs and outputs of a linear map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from torch import Tensor, nn

from superexperts.adapters.factors import Factor, Factors, Place, matrices
from superexperts.adapters.files import MLX
from superexperts.adapters.per_expert import checkpoint_names
from superexperts.core.errors import DataError
from superexperts.models.banks import find_banks
from superexperts.models.experts import projections

__all__ = ["config_of", "read", "recognise"]

_SWITCH = re.compile(r"layers\.(\d+)\..*switch_(?:mlp|glu)\.(gate_proj|up_proj|down_proj)$")


def config_of(fields: Mapping[str, Any], folder: Path) -> LoraConfig:
    """Rank and alpha as PEFT gives them; `DataError` if the fields of adapter_config.json do not describe LoRA."""
    kind, settings = fields.get("fine_tune_type", "lora"), fields.get(MLX)
    if kind != "lora":
        what = "DoRA" if kind == "dora" else "whole weights" if kind == "full" else f"{kind!r}"
        raise DataError(
            f"{folder} holds {what} of mlx-lm; only its LoRA is read: fuse it with mlx_lm.fuse", field="adapter"
        )
    try:
        rank, scale = int(settings["rank"]), float(settings.get("scale", settings.get("alpha")))  # type: ignore[index, union-attr]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: {MLX} needs numbers 'rank' and 'scale'; repair it", field="adapter") from error
    return LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=[])


def recognise(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> str | None:
    """Why a file is in this layout, or None; see `formats.Format`."""
    return f"its settings are in {MLX}" if MLX in fields else None


def read(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Factors:
    """The factors of a file; see `formats.Format`."""
    banks = {bank.layer: bank for bank in find_banks(model)}
    places = [Place(path=path) for path in matrices(model)]
    paths = {place.path: place.path for place in places}
    paths |= {name: place.path for place, name in checkpoint_names(model, places).items()}
    scaling, factors = config.lora_alpha / config.r, dict[Place, Factor]()
    for key in sorted(tensors):
        name, _, letter = key.rpartition(".")
        if letter == "lora_b" and f"{name}.lora_a" in tensors:
            continue
        if letter != "lora_a" or f"{name}.lora_b" not in tensors:
            raise DataError(f"{key} is not half of a pair lora_a, lora_b; save the adapter again", field="adapter")
        a, b = tensors[key].float(), tensors[f"{name}.lora_b"].float()
        switch = _SWITCH.search(name)
        if switch and int(switch[1]) in banks:
            bank = banks[int(switch[1])]
            for expert in range(bank.num_experts):
                weight_OI = projections(bank.module, expert).get(switch[2])
                shape = None if weight_OI is None else tuple(weight_OI.shape)
                if shape is None or b.dim() != 3 or (b.shape[1], a.shape[-1]) != shape or len(b) != bank.num_experts:
                    raise _no_place(name, a, b)
                a_ERI = a.reshape(bank.num_experts, -1, shape[1])
                place = Place(path=bank.path, expert=expert, projection=switch[2])
                factors[place] = Factor(a_RI=a_ERI[expert], b_OR=b[expert], scaling=scaling)
            continue
        path = paths.get(name) or paths.get(name.removeprefix("language_model."))
        if path is None or a.dim() != 2 or b.dim() != 2:
            raise _no_place(name, a, b)
        if (b.shape[1], a.shape[0]) != tuple(cast(Tensor, model.get_submodule(path).weight).shape):
            raise _no_place(name, a, b)
        factors[Place(path=path)] = Factor(a_RI=a.T.contiguous(), b_OR=b.T.contiguous(), scaling=scaling)
    return factors


def _no_place(name: str, a: Tensor, b: Tensor) -> DataError:
    return DataError(
        f"{name} with lora_a {list(a.shape)} and lora_b {list(b.shape)} has no place in the model; give the adapter's "
        "own model, or fuse the adapter with mlx_lm.fuse",
        field="adapter",
    )
