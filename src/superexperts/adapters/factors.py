"""What an adapter adds to a model, whatever layout its file has: scaling * B A at each linear map it changes.

The layouts of `layouts.py` are written from this and read into it; the own layout, one A and B for each projection of
each chosen expert, is here.

Shape suffixes: R rank, I and O inputs and outputs of a linear map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from superexperts.adapters import lora
from superexperts.adapters.layer import RENAMED_BY_PEFT, ExpertLoraConfig, ExpertsLora, is_projection, linears
from superexperts.core.errors import DataError, Field, ModelError
from superexperts.models.banks import find_banks, unwrapped
from superexperts.models.experts import DOWN, GATE, UP
from superexperts.models.experts import projections as bank_projections

__all__ = [
    "PREFIX",
    "Factor",
    "Factors",
    "Place",
    "expert_names",
    "injected_keys",
    "own_layout",
    "plain_number",
    "read_factors",
    "save_layout",
]

PREFIX = "base_model.model."
"""Before every key of a PEFT file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A linear map: one projection of a routed expert, or an ordinary module."""

    path: str
    """Of the expert's bank, or of the linear module."""
    expert: int | None = None
    projection: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """scaling * B A."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a_RI.shape[0]

    def padded(self, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B of a higher rank, filled with zeros, that add the same with another scaling."""
        a_RI = self.a_RI.new_zeros(rank, self.a_RI.shape[1])
        b_OR = self.b_OR.new_zeros(self.b_OR.shape[0], rank)
        a_RI[: self.rank] = self.a_RI
        b_OR[:, : self.rank] = self.b_OR if scaling == self.scaling else self.b_OR * (self.scaling / scaling)
        return a_RI, b_OR

    def reduced(self) -> Factor | None:
        """Without the ranks that add nothing, None where nothing is left."""
        kept_R = self.a_RI.any(1) & self.b_OR.any(0)
        if not kept_R.any():
            return None
        return Factor(a_RI=self.a_RI[kept_R], b_OR=self.b_OR[:, kept_R], scaling=self.scaling)


Factors = Mapping[Place, Factor]


def expert_names(model: nn.Module, factors: Factors) -> list[str]:
    """L2E54 for each routed expert among the places."""
    layers = {unwrapped(bank.path): bank.layer for bank in find_banks(model)}
    found = sorted({(layers[place.path], place.expert) for place in factors if place.expert is not None})
    return [f"L{layer}E{expert}" for layer, expert in found]


# ---- our own layout -----------------------------------------------------------------------------------------------


def read_factors(model: nn.Module, folder: Path, field: str) -> dict[Place, Factor]:
    """The factors of an adapter that `train` wrote, or of a plain PEFT adapter on linear modules.

    `model` may be a structure without weights; it comes back as it was. Every key must have a home and every module
    its keys, in the right shapes.
    """
    config, saved = lora.read_adapter(folder, field)
    if config.target_parameters:
        raise DataError(f"{folder} is in PEFT's target_parameters layout; `superexperts import` it first", field=field)
    if config.use_dora or config.lora_bias or config.bias != "none" or config.modules_to_save:
        raise DataError(
            f"{folder} is more than A and B (DoRA, a bias, whole modules); use ",
            Field("format"),
            " merged",
            field=field,
        )
    lora.check_home(model, config, folder, field)
    try:
        with lora.quiet():
            get_peft_model(cast(Any, model), config)
        found = {name: (place, scaling, shape) for name, place, scaling, shape in _own_names(model)}
    except (ValueError, RuntimeError) as error:  # RuntimeError: a size in config.json that no memory has room for
        line = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder} does not fit this model ({line}); give its own model", field=field) from error
    finally:
        lora.detach(model)
    lora.check_keys(
        {name: shape for name, (_, _, shape) in found.items()},
        {name: tuple(tensor.shape) for name, tensor in saved.items()},
        folder,
        field,
    )
    return {
        place: Factor(a_RI=saved[name], b_OR=saved[name.replace(".lora_A.", ".lora_B.")], scaling=scaling)
        for name, (place, scaling, _) in found.items()
        if ".lora_A." in name
    }


def _own_names(model: nn.Module) -> Iterator[tuple[str, Place, float, tuple[int, ...]]]:
    """(key in the file, where it adds, scaling, shape) of every A and B of the adapter on a model."""
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for letter, parts in (("A", module.lora_A), ("B", module.lora_B)):
            for own, parameter in parts["default"].named_parameters():
                place, scaling = Place(path=path), module.scaling["default"]
                if isinstance(module, ExpertsLora):
                    scaling = module.scaling_of("default", own)
                    expert, projection = own.split("_", 1)
                    place = Place(path=path, expert=int(expert), projection=projection)
                yield f"{PREFIX}{path}.lora_{letter}.{own}", place, scaling, tuple(parameter.shape)


def own_layout(model: nn.Module, factors: Factors) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and tensors of an adapter of our own: one rank, one scaling, nothing that nothing changes."""
    rank, scaling = max(factor.rank for factor in factors.values()), next(iter(factors.values())).scaling
    banks = {bank.path: bank for bank in find_banks(model)}
    shared = {lora.shared_path(model, bank) for bank in banks.values() if bank.shared_down is not None}
    experts: dict[str, list[int]] = {}
    modules: list[str] = []
    hidden: list[str] = []
    tensors: dict[str, Tensor] = {}

    def add(key_a: str, place: Place, weight_OI: Tensor) -> None:
        nothing = Factor(
            a_RI=torch.zeros(0, weight_OI.shape[1]), b_OR=torch.zeros(weight_OI.shape[0], 0), scaling=scaling
        )
        a_RI, b_OR = factors.get(place, nothing).padded(rank, scaling)
        tensors[PREFIX + key_a], tensors[PREFIX + key_a.replace(".lora_A.", ".lora_B.")] = a_RI, b_OR

    used, projections = set(), set()
    for place in factors:
        if place.expert is not None:
            used.add((place.path, place.expert))
            projections.add(place.projection)
            continue
        owner = next((path for path in shared if place.path.startswith(f"{path}.")), None)
        if owner is None and place.path.rpartition(".")[2] in RENAMED_BY_PEFT:
            hidden.append(place.path)
            modules.append(place.path.rpartition(".")[0])
        else:
            modules.append(place.path if owner is None else owner)
        if owner is not None:
            projections.add(place.path.rpartition(".")[2])
        if owner is None:
            add(f"{place.path}.lora_A.weight", place, cast(Tensor, model.get_submodule(place.path).weight))
    for path, expert in sorted(used):
        experts.setdefault(path, []).append(expert)
        for projection, weight_OI in bank_projections(banks[path].module, expert).items():
            if projection not in projections:
                continue
            place = Place(path=path, expert=expert, projection=projection)
            add(f"{path}.lora_A.{expert}_{projection}", place, weight_OI)
    for path in sorted(shared & set(modules)):
        for name, linear in linears(model.get_submodule(path)).items():
            if not is_projection(name, projections):
                continue
            place = Place(path=f"{path}.{name}")
            add(f"{place.path}.lora_A.weight", place, cast(Tensor, linear.weight))
    config = ExpertLoraConfig(
        r=rank,
        lora_alpha=plain_number(scaling * rank),
        target_modules=[*experts, *dict.fromkeys(modules)],
        experts=experts,
        shared=sorted(shared & set(modules)),
        linears=hidden,
        projections=[name for name in (GATE, UP, DOWN) if name in projections],
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return config, tensors


def plain_number(value: float) -> float:
    """16.0 as 16, as other readers expect alpha."""
    return int(value) if value == int(value) else value


def save_layout(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], *, base: str, revision: str | None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; `base` is the model as the user names it."""
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(str(folder))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / lora.WEIGHTS_FILE,
        metadata={"format": "pt"},
    )


def injected_keys(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes that PEFT itself gives an adapter of this configuration on this model."""
    try:
        with lora.quiet():
            get_peft_model(cast(Any, model), config)
        return {name: shape for name, _, _, shape in _own_names(model)}
    finally:
        lora.detach(model)
