"""What an adapter adds to a model, whatever the layout of its file: scaling * B A at each linear map that it changes.

Every layout in `formats.py` is written from these factors and read into them. Our own layout, one A and one B for each
projection of each chosen expert, is here.

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
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from superexperts.adapters import lora
from superexperts.adapters.files import check_fits, check_keys, write_adapter
from superexperts.adapters.fitting import Stored, beyond_factors, read_fitting, require_loadable
from superexperts.adapters.layer import RENAMED_BY_PEFT, ExpertLoraConfig, ExpertsLora, is_projection, linears
from superexperts.adapters.spelling import PREFIX
from superexperts.checkpoints.source import ModelSource
from superexperts.core.errors import DataError, ModelError
from superexperts.core.runs import write_text
from superexperts.models.banks import find_banks, unwrapped
from superexperts.models.experts import DOWN, GATE, UP
from superexperts.models.experts import projections as bank_projections

__all__ = [
    "Factor",
    "Factors",
    "Place",
    "expert_names",
    "injected_keys",
    "matrices",
    "own_layout",
    "peft_scaling",
    "plain_number",
    "read_factors",
    "require_all_read",
    "take_pair",
    "write_export",
]


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
        """A and B filled with zeros to a higher rank, which add the same under another scaling."""
        a_RI = self.a_RI.new_zeros(rank, self.a_RI.shape[1])
        b_OR = self.b_OR.new_zeros(self.b_OR.shape[0], rank)
        a_RI[: self.rank] = self.a_RI
        b_OR[:, : self.rank] = self.b_OR if scaling == self.scaling else self.b_OR * (self.scaling / scaling)
        return a_RI, b_OR

    def reduced(self) -> Factor | None:
        """The factor without the ranks that add nothing; None if no rank is left."""
        kept_R = self.a_RI.any(1) & self.b_OR.any(0)
        if not kept_R.any():
            return None
        return Factor(a_RI=self.a_RI[kept_R], b_OR=self.b_OR[:, kept_R], scaling=self.scaling)


Factors = Mapping[Place, Factor]


def expert_names(model: nn.Module, factors: Factors) -> list[str]:
    """Names such as L2E54 of the routed experts among the places."""
    layers = {unwrapped(bank.path): bank.layer for bank in find_banks(model)}
    found = sorted({(layers[place.path], place.expert) for place in factors if place.expert is not None})
    return [f"L{layer}E{expert}" for layer, expert in found]


# ---- our own layout -----------------------------------------------------------------------------------------------


def read_factors(model: nn.Module, folder: Path, field: str, stored: Stored | None = None) -> dict[Place, Factor]:
    """The factors of an adapter that `train` wrote, or of a plain PEFT adapter on linear maps and routers.

    `model` may be a structure without weights; it comes back as it was. `stored` is as in `fitting.read_fitting`.
    `DataError` or `ModelError` about `field` unless every key has a place in the model, every module its keys, and all
    shapes are right.
    """
    config, saved = read_fitting(model, folder, field, stored)
    require_loadable(saved, folder, field)
    check_fits(model, config, folder, field)
    if beyond := beyond_factors(config, saved):
        raise DataError(f"{folder} {beyond}", field=field)
    config.init_lora_weights = True  # values come from the file; some starts need the base's weights
    try:
        with lora.quiet():
            get_peft_model(cast(Any, model), config)
        wide = next((m for m in model.modules() if isinstance(m, ParamWrapper) and m.num_experts > 1), None)
        found = {} if wide else {name: (place, scaling, shape) for name, place, scaling, shape in _own_names(model)}
    except (ValueError, RuntimeError, TypeError) as error:  # RuntimeError: a huge size in config.json
        line = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder} does not fit this model ({line}); give the adapter's own model", field=field
        ) from error
    finally:
        lora.detach(model)
    if wide is not None:
        raise DataError(f"{folder} is in PEFT's target_parameters layout; import it first", field=field)
    check_keys(
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
    """(key in the file, place, scaling, shape) of every A and B of the adapter on a model."""
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
    """The configuration and tensors of an adapter in our own layout, at one rank and one scaling for all of it."""
    rank, scaling = max(factor.rank for factor in factors.values()), next(iter(factors.values())).scaling
    banks = {bank.path: bank for bank in find_banks(model)}
    shared = {lora.shared_path(model, bank) for bank in banks.values() if bank.shared_down is not None}
    experts: dict[str, list[int]] = {}
    modules: list[str] = []
    hidden: list[str] = []
    parameters: list[str] = []
    routers = matrices(model).keys() - linears(model).keys()
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
        if place.path in routers:
            parameters.append(f"{place.path}.weight")
        elif owner is None and place.path.rpartition(".")[2] in RENAMED_BY_PEFT:
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
        target_parameters=parameters or None,
        experts=experts,
        shared=sorted(shared & set(modules)),
        linears=hidden,
        projections=[name for name in (GATE, UP, DOWN) if name in projections],
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return config, tensors


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear map, or another module with a matrix `weight`, such as a router that is not an `nn.Linear`."""
    found = dict(linears(model))
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding):
            found.setdefault(path, module)
    return found


def plain_number(value: float) -> float:
    """16.0 as 16, which other programs expect for alpha."""
    return int(value) if value == int(value) else value


def injected_keys(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes that PEFT itself creates for an adapter of this configuration on this model."""
    try:
        with lora.quiet():
            get_peft_model(cast(Any, model), config)
        return {name: shape for name, _, _, shape in _own_names(model)}
    finally:
        lora.detach(model)


# ---- what readers and writers of other layouts share --------------------------------------------------------------


def take_pair(left: dict[str, Tensor], key: str) -> tuple[Tensor, Tensor]:
    """Removes `{key}.lora_A.weight` and `{key}.lora_B.weight` from the tensors that are left; returns both in float32.

    `DataError` if one is missing.
    """
    for letter in "AB":
        if f"{key}.lora_{letter}.weight" not in left:
            raise DataError(f"{key}.lora_{letter}.weight is missing; save the adapter again", field="adapter")
    return left.pop(f"{key}.lora_A.weight").float(), left.pop(f"{key}.lora_B.weight").float()


def require_all_read(left: Mapping[str, Tensor]) -> None:
    """`DataError` if a file holds tensors that belong to nothing in the model."""
    if left:
        some = ", ".join(sorted(left)[:2])
        raise DataError(
            f"{len(left)} keys have no place in the model ({some}, ...); give the adapter's own model", field="adapter"
        )


def peft_scaling(config: LoraConfig, name: str, rank: int) -> float:
    """The scaling that PEFT gives a module or parameter of this name."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))


def write_export(
    out: Path,
    model: nn.Module,
    factors: Factors,
    config: LoraConfig,
    tensors: Mapping[str, Tensor],
    source: ModelSource,
    *,
    loader: str,
) -> dict[str, Any]:
    """Writes an adapter's two files and a card that names the program that loads them; returns what was written."""
    write_adapter(out, config, tensors, source)
    experts = expert_names(model, factors)
    write_text(
        out / "README.md",
        "---\nlibrary_name: peft\ntags:\n- lora\n---\n\n"
        f"# LoRA on {', '.join(experts) or 'linear maps'} of {source.name}\n\n"
        f"In the layout that {loader} loads; every other expert of the layers named is filled with zeros.\n",
    )
    return {"experts": experts, "keys": len(tensors), "r": config.r}
