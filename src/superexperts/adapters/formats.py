"""The layouts in which other programs keep LoRA on experts, written from factors and read into them.

Fused, PEFT's `target_parameters`: one A [E R, I] and one B [O, R E] for a whole 3-D parameter. A is expert by expert;
in B the expert is the fast index. PEFT 0.18 took inputs for outputs, and Unsloth (before its zoo of September 2026)
trained with B expert by expert. None of it is written in the file.
Per expert, as the checkpoint names its experts: `...experts.3.gate_proj.lora_A.weight`, what serving engines read.

Shape suffixes: E experts, R rank, I and O inputs and outputs of a linear map, F intermediate size, U = 2F.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from superexperts.adapters.factors import PREFIX, Factor, Factors, Place, plain_number
from superexperts.adapters.layer import RENAMED_BY_PEFT, linears
from superexperts.core.errors import DataError, Field, OptionError
from superexperts.models.banks import Bank, find_banks
from superexperts.models.experts import DOWN, GATE, UP, join_gate_up, projections, split_gate_up
from superexperts.models.experts import up_name as bank_up_name

__all__ = ["Layout", "checkpoint_names", "read_fused", "read_per_expert", "targeted", "write_fused", "write_per_expert"]

EXAMPLES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a fused file is to be read."""

    swapped: bool = False
    """PEFT 0.18: A holds the outputs and B the inputs, of parameters kept as [E, O, I]; [E, I, O] is as today."""
    blockwise: bool = False
    """Unsloth: B is expert by expert."""


# ---- PEFT's fused layout ------------------------------------------------------------------------------------------


def write_fused(model: nn.Module, factors: Factors) -> tuple[LoraConfig, dict[str, Tensor]]:
    """What plain PEFT loads: chosen experts' A and B among zeros, layers without a chosen expert left out.

    One rank and one alpha for everything: gate and up are one parameter, so twice the rank of each. PEFT would take a
    rank for each parameter, but warns that it ignored it, and engines do ignore it.
    """
    modules: list[str] = []
    parameters: list[str] = []
    pieces: dict[str, tuple[int, dict[int, Factor]]] = {}
    """Per key, of how many experts there is room for, and the factors of those that have one."""
    for bank in find_banks(model):
        own = {(place.expert, place.projection): factor for place, factor in factors.items() if place.path == bank.path}
        experts = sorted({expert for expert, _ in own if expert is not None})
        up_name = bank_up_name(bank.module)
        names = {DOWN if projection == DOWN else up_name for _, projection in own}
        for depth, name in enumerate(reversed(_parameters(bank.module, names))):
            found = {
                expert: own.get((expert, DOWN)) if name == DOWN else _joined_up(bank.module, expert, own)
                for expert in experts
            }
            whole = {expert: factor for expert, factor in found.items() if factor is not None}
            pieces[f"{PREFIX}{bank.path}{'.base_layer' * depth}"] = bank.num_experts, whole
            parameters.append(f"{bank.path}.{name}")
    for place, factor in factors.items():
        if place.expert is None:
            pieces[f"{PREFIX}{place.path}"] = 1, {0: factor}
            if place.path.rpartition(".")[2] in RENAMED_BY_PEFT:
                parameters.append(f"{place.path}.weight")
            else:
                modules.append(place.path)
    rank = max(factor.rank for _, whole in pieces.values() for factor in whole.values())
    scaling = next(iter(factors.values())).scaling
    tensors: dict[str, Tensor] = {}
    for key, (count, whole) in pieces.items():
        some = next(iter(whole.values()))
        a_ERI = some.a_RI.new_zeros(count, rank, some.a_RI.shape[1])
        b_ORE = some.b_OR.new_zeros(some.b_OR.shape[0], rank, count)
        for expert, factor in whole.items():
            a_ERI[expert], b_ORE[:, :, expert] = factor.padded(rank, scaling)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a_ERI.flatten(0, 1), b_ORE.flatten(1)
    config = LoraConfig(
        r=rank,
        lora_alpha=plain_number(rank * scaling),
        target_modules=modules,
        target_parameters=parameters,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return config, tensors


def _parameters(bank: nn.Module, names: Iterable[str]) -> list[str]:
    """The named parameters of a bank in the bank's order, in which PEFT wraps them: the last is outermost."""
    return [name for name, _ in bank.named_parameters(recurse=False) if name in set(names)]


def _joined_up(bank: nn.Module, expert: int, own: Mapping[tuple[int | None, str], Factor]) -> Factor | None:
    """One factor of the fused gate and up projection from two: their A one below the other, each B in its own rows."""
    gate, up = own.get((expert, GATE)), own.get((expert, UP))
    some = gate or up
    if some is None or not cast(Any, bank).has_gate:
        return some
    outputs = some.b_OR.shape[0]
    nothing = Factor(a_RI=some.a_RI[:0], b_OR=some.b_OR.new_zeros(outputs, 0), scaling=some.scaling)
    gate, up = gate or nothing, up or nothing
    same = gate.scaling == up.scaling and torch.equal(gate.a_RI, up.a_RI)
    rank = gate.rank if same else gate.rank + up.rank
    gate_a, gate_b = gate.padded(gate.rank, some.scaling)
    up_a, up_b = up.padded(up.rank, some.scaling)
    gate_RF, up_RF = gate_b.new_zeros(rank, outputs), gate_b.new_zeros(rank, outputs)
    gate_RF[: gate.rank], up_RF[rank - up.rank :] = gate_b.T, up_b.T
    a_RI = gate_a if same else torch.cat([gate_a, up_a])
    return Factor(a_RI=a_RI, b_OR=join_gate_up(bank, gate_RF, up_RF).T, scaling=some.scaling)


def targeted(model: nn.Module, target_parameters: Iterable[str]) -> Iterator[tuple[str, Bank, str]]:
    """(key before `.lora_A`, the bank, its parameter) for each 3-D parameter that a PEFT configuration names."""
    targets = tuple(target_parameters)
    for bank in find_banks(model):
        names = [
            name
            for name in _parameters(bank.module, (DOWN, bank_up_name(bank.module)))
            if any(f".{bank.path}.{name}".endswith(f".{target}") for target in targets)
        ]
        for depth, name in enumerate(reversed(names)):
            yield f"{PREFIX}{bank.path}{'.base_layer' * depth}", bank, name


def shapes(bank: Bank, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a bank's parameter."""
    parameter = getattr(bank.module, name)
    first, second = parameter.shape[1:]
    return (first, second) if cast(Any, bank.module).is_transposed else (second, first)


def read_fused(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], layout: Layout) -> Factors:
    """The factors of a file of PEFT's `target_parameters`; every tensor must have been read."""
    factors: dict[Place, Factor] = {}
    left = dict(tensors)
    for key, bank, name in targeted(model, config.target_parameters or ()):
        a, b = _take(left, key)
        count, (inputs, outputs) = bank.num_experts, shapes(bank, name)
        swapped = layout.swapped and not cast(Any, bank.module).is_transposed
        expected = (outputs, inputs) if swapped else (inputs, outputs)
        if a.shape[0] % count or (a.shape[1], b.shape[0]) != expected or a.shape[0] != b.shape[1]:
            raise DataError(
                (
                    f"{key} is A {tuple(a.shape)}, B {tuple(b.shape)}, but {bank.path}.{name} has {count} experts of "
                    f"{inputs} inputs and {outputs} outputs; give the adapter's own model"
                ),
                field="adapter",
            )
        rank = a.shape[0] // count
        a_ERI = a.reshape(count, rank, -1)
        b_EOR = b.reshape(len(b), count, rank).transpose(0, 1) if layout.blockwise else (
            b.reshape(len(b), rank, count).permute(2, 0, 1)
        )  # fmt: skip
        if swapped:
            a_ERI, b_EOR = b_EOR.transpose(1, 2), a_ERI.transpose(1, 2)
        scaling = _scaling(config, f"{bank.path}.{name}", rank)
        for expert in range(count):
            parts = {name: b_EOR[expert]}
            if name != DOWN and cast(Any, bank.module).has_gate:
                parts[GATE], parts[UP] = split_gate_up(bank.module, b_EOR[expert])
                del parts[name]
            for projection, b_OR in parts.items():
                place = Place(path=bank.path, expert=expert, projection=projection)
                factors[place] = Factor(a_RI=a_ERI[expert], b_OR=b_OR, scaling=scaling)
    for path in linears(model):
        if f"{PREFIX}{path}.lora_A.weight" in left:
            a_RI, b_OR = _take(left, f"{PREFIX}{path}")
            whole = any(f".{path}.weight".endswith(f".{target}") for target in config.target_parameters or ())
            at = f"{path}.weight" if whole else path
            factors[Place(path=path)] = Factor(a_RI=a_RI, b_OR=b_OR, scaling=_scaling(config, at, len(a_RI)))
    _all_taken(left)
    return factors


# ---- one key for each expert --------------------------------------------------------------------------------------


def checkpoint_names(model: nn.Module, places: Iterable[Place]) -> dict[Place, str]:
    """What the family's checkpoints call each linear map, without `.weight`.

    Found by sending numbered tensors of one element through the renaming by which transformers saves a model. Places
    that checkpoints keep in one tensor with others are left out.
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
        ups = (GATE, UP) if cast(Any, bank.module).has_gate else (UP,)
        state[f"{path}.{bank_up_name(bank.module)}"] = torch.stack([numbers[up] for up in ups], dim=1)[:, :, None]
        state[f"{path}.{DOWN}"] = numbers[DOWN][:, None, None]
    for place in order:
        if place.expert is None:
            state[f"{place.path}.weight"] = torch.full((1, 1), number[place], dtype=torch.float64)
    names = {}
    for key, tensor in revert_weight_conversion(cast(Any, model), state).items():
        if tensor.numel() == 1 and tensor.item() > 0 and key.endswith(".weight"):
            names[order[int(tensor.item()) - 1]] = key.removesuffix(".weight")
    return names


def all_places(model: nn.Module) -> list[Place]:
    """Every projection of every routed expert, and every linear module."""
    places = [
        Place(path=bank.path, expert=expert, projection=projection)
        for bank in find_banks(model)
        for expert in range(bank.num_experts)
        for projection in projections(bank.module, expert)
    ]
    return [*places, *(Place(path=path) for path in linears(model))]


def write_per_expert(model: nn.Module, factors: Factors) -> tuple[LoraConfig, dict[str, Tensor]]:
    """What engines load: in a layer with a chosen expert every expert and projection at one rank, zeros for the rest.

    `OptionError` where the family's checkpoints have no name for a single expert.
    """
    touched = {place.path for place in factors if place.expert is not None}
    shape = {}
    for bank in find_banks(model):
        if bank.path in touched:
            for expert in range(bank.num_experts):
                for projection, weight_OI in projections(bank.module, expert).items():
                    shape[Place(path=bank.path, expert=expert, projection=projection)] = tuple(weight_OI.shape)
    places = [*shape, *(place for place in factors if place.expert is None)]
    names = checkpoint_names(model, places)
    nameless = next((place for place in places if place not in names), None)
    if nameless is not None:
        raise OptionError(
            (
                f"'vllm' needs a name for each expert, but checkpoints of this family keep {nameless.path} in "
                "one tensor; use "
            ),
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


def read_per_expert(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Factors:
    """The factors of a file with one key for each expert, all of them or some; every tensor must have been read."""
    factors: dict[Place, Factor] = {}
    left = dict(tensors)
    for place, name in checkpoint_names(model, all_places(model)).items():
        if f"{PREFIX}{name}.lora_A.weight" in left:
            a_RI, b_OR = _take(left, f"{PREFIX}{name}")
            factors[place] = Factor(a_RI=a_RI, b_OR=b_OR, scaling=_scaling(config, name, len(a_RI)))
    _all_taken(left)
    return factors


def _take(left: dict[str, Tensor], key: str) -> tuple[Tensor, Tensor]:
    """A and B under a key, taken out of what is left."""
    for letter in "AB":
        if f"{key}.lora_{letter}.weight" not in left:
            raise DataError(f"{key}.lora_{letter}.weight is missing; save the adapter again", field="adapter")
    return left.pop(f"{key}.lora_A.weight").float(), left.pop(f"{key}.lora_B.weight").float()


def _all_taken(left: Mapping[str, Tensor]) -> None:
    if left:
        some = ", ".join(sorted(left)[:EXAMPLES])
        raise DataError(
            f"{len(left)} keys have no home in the model ({some}, ...); give the adapter's own model", field="adapter"
        )


def _scaling(config: LoraConfig, name: str, rank: int) -> float:
    """As PEFT works it out for a module or parameter of this name."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha / (rank**0.5 if config.use_rslora else rank))
