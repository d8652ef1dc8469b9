"""One key for each expert, named as the checkpoint names it: `...experts.3.gate_proj.lora_A.weight`.

Serving engines such as vLLM read this layout.

Shape suffixes: R rank, I and O inputs and outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from superexperts.adapters.factors import (
    Factor,
    Factors,
    Place,
    matrices,
    peft_scaling,
    plain_number,
    read_factors,
    require_all_read,
    take_pair,
    write_export,
)
from superexperts.adapters.fitting import stored_in
from superexperts.adapters.fused import targeted
from superexperts.adapters.spelling import PREFIX
from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import ModelSource
from superexperts.core.console import note
from superexperts.core.errors import Field, ModelError, OptionError
from superexperts.models.banks import find_banks
from superexperts.models.experts import DOWN, GATE, UP, projections, up_projections
from superexperts.models.experts import up_name as bank_up_name
from superexperts.models.key_mapping import KeyMapping
from superexperts.models.loading import load_structure

__all__ = ["checkpoint_names", "read", "recognise", "write"]

ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for --max-lora-rank (vllm/config/lora.py)."""


def write(adapter: Path, source: ModelSource, out: Path, *, copy: bool = False) -> dict[str, Any]:
    """Writes the adapter for vLLM; see `formats.Format`. The model's weights are not read."""
    model = load_structure(source)
    factors = read_factors(model, adapter, "adapter", stored_in(model, source))
    with Checkpoint(source.folder, source.field) as checkpoint:
        config, tensors = _layout(model, factors, KeyMapping(model, checkpoint), source)
    if config.r > ENGINE_RANKS[-1]:
        raise OptionError(f"'vllm' has ranks up to {ENGINE_RANKS[-1]}, not {config.r}; use merged", field="format")
    if any(".kv_b_proj." in key for key in tensors):
        note("export: vLLM drops LoRA on kv_b_proj unless it runs with VLLM_MLA_DISABLE=1")
    result = write_export(out, model, factors, config, tensors, source, loader="vLLM")
    # vLLM reads PEFT's layout for families with their experts in one tensor, unless it is asked for this one.
    named = {place for place in factors if place.expert is not None} <= checkpoint_names(
        model, factors, fused=False
    ).keys()
    result |= {} if named else {"mixed_layouts": True}
    return result | {"max_lora_rank": next(rank for rank in ENGINE_RANKS if rank >= config.r)}


def _layout(
    model: nn.Module, factors: Factors, key_mapping: KeyMapping, source: ModelSource
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and tensors for engines: all experts and projections of a layer with a chosen expert, at one
    rank; those that are not adapted are zeros.

    `OptionError` if the family's checkpoints have no name for a single expert, `ModelError` for a weight that the
    checkpoint does not hold: engines skip keys that fit nothing without a message.
    """
    touched = {place.path for place in factors if place.expert is not None}
    shape = {}
    for bank in find_banks(model):
        if bank.path in touched:
            for expert in range(bank.num_experts):
                for projection, weight_OI in projections(bank.module, expert).items():
                    shape[Place(path=bank.path, expert=expert, projection=projection)] = tuple(weight_OI.shape)
    places = [*shape, *(place for place in factors if place.expert is None)]
    tied = cast(Any, model).all_tied_weights_keys
    names = _names_on_disk(checkpoint_names(model, places), key_mapping, source, tied)
    nameless = next((place for place in places if place not in names), None)
    if nameless is not None:
        raise OptionError(
            f"'vllm' needs a name for each expert, but checkpoints of this family keep {nameless.path} in one tensor; "
            "use ",
            Field("format"),
            " merged",
            field="format",
        )
    rank, scaling = max(factor.rank for factor in factors.values()), next(iter(factors.values())).scaling
    some = next(iter(factors.values())).a_RI
    tensors = {}
    for place in places:
        if place in factors:
            a_RI, b_OR = factors[place].padded(rank, scaling)
        else:
            outputs, inputs = shape[place]
            a_RI, b_OR = some.new_zeros(rank, inputs), some.new_zeros(outputs, rank)
        tensors[f"{PREFIX}{names[place]}.lora_A.weight"], tensors[f"{PREFIX}{names[place]}.lora_B.weight"] = a_RI, b_OR
    config = LoraConfig(
        r=rank,
        lora_alpha=plain_number(scaling * rank),
        target_modules=sorted({names[place].rpartition(".")[2] for place in places}),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return config, tensors


def _names_on_disk(
    names: Mapping[Place, str], key_mapping: KeyMapping, source: ModelSource, tied: Collection[str]
) -> dict[Place, str]:
    """The names with what this checkpoint has before `layers.N`: it may hold the model inside a larger one."""
    found = {}
    sources = {name.rpartition(".")[0]: entries for name, entries in key_mapping.sources.items()}
    for place, name in names.items():
        entries = sources.get(place.path, [])
        key = entries[0][1] if entries else ""
        whole = len(entries) == 1  # of an expert: the checkpoint keeps all of them in one tensor
        if place.expert is None and whole and key.endswith(".weight"):
            found[place] = key.removesuffix(".weight")
        else:
            found[place] = key.partition("layers.")[0] + "layers." + name.partition("layers.")[2]
        if not entries and f"{place.path}.weight" in tied:
            raise ModelError(
                f"{place.path} is tied to another weight in {source.name}, and engines keep one of them; use ",
                Field("format"),
                " merged",
                field="adapter",
            )
        if not entries or not (whole or f"{found[place]}.weight" in key_mapping.checkpoint):
            raise ModelError(f"{source.name} holds no weight {name}; repair the checkpoint", field=source.field)
    return found


def recognise(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> str | None:
    """Why a file is in this layout, or None; see `formats.Format`."""
    if any(targeted(model, config.target_parameters or ())):
        return None
    return "no 3-D parameter is named in target_parameters"


def read(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Factors:
    """The factors of a file that has keys for all experts or for some; see `formats.Format`."""
    factors: dict[Place, Factor] = {}
    left = dict(tensors)
    for place, name in checkpoint_names(model, _all_places(model)).items():
        if f"{PREFIX}{name}.lora_A.weight" in left:
            a_RI, b_OR = take_pair(left, f"{PREFIX}{name}")
            factors[place] = Factor(a_RI=a_RI, b_OR=b_OR, scaling=peft_scaling(config, name, len(a_RI)))
    require_all_read(left)
    return factors


def checkpoint_names(model: nn.Module, places: Iterable[Place], *, fused: bool = True) -> dict[Place, str]:
    """The names of linear maps in the family's checkpoints, without `.weight`.

    Experts that checkpoints keep in one tensor are named as engines do, `experts.3.up_proj`, unless `fused` is False.
    Other places that share a tensor are left out. transformers offers no function for
    this, so numbered tensors of one element are sent through the renaming by which it saves a model.
    """
    banks = {bank.path: bank for bank in find_banks(model)}
    order = list(dict.fromkeys(places))
    number = {place: float(i + 1) for i, place in enumerate(order)}
    state: dict[str, Tensor] = {}
    for path, bank in banks.items():
        numbers = {
            projection: torch.tensor(
                [
                    number.get(Place(path=path, expert=expert, projection=projection), 0)
                    for expert in range(bank.num_experts)
                ],
                dtype=torch.float64,
            )
            for projection in (GATE, UP, DOWN)
        }
        ups = [numbers[projection] for projection in up_projections(bank.module)]
        state[f"{path}.{bank_up_name(bank.module)}"] = torch.stack(ups, dim=1)[:, :, None]
        state[f"{path}.{DOWN}"] = numbers[DOWN][:, None, None]
    for place in order:
        if place.expert is None:
            state[f"{place.path}.weight"] = torch.full((1, 1), number[place], dtype=torch.float64)
    names = {}
    for key, tensor in revert_weight_conversion(cast(Any, model), state).items():
        if tensor.numel() == 1 and tensor.item() > 0 and key.endswith(".weight"):
            names[order[int(tensor.item()) - 1]] = key.removesuffix(".weight")
        elif fused and tensor.numel() > 1 and key.rpartition(".")[2] in (DOWN, "gate_up_proj", UP):
            for place in (order[int(number) - 1] for number in tensor.flatten().tolist() if number > 0):
                names[place] = f"{key.rpartition('.')[0]}.{place.expert}.{place.projection}"
    return names


def _all_places(model: nn.Module) -> list[Place]:
    """Every projection of every routed expert, and every router and linear map."""
    places = [
        Place(path=bank.path, expert=expert, projection=projection)
        for bank in find_banks(model)
        for expert in range(bank.num_experts)
        for projection in projections(bank.module, expert)
    ]
    return [*places, *(Place(path=path) for path in matrices(model))]
