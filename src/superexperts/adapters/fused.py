"""PEFT's fused layout (`target_parameters`): one A and one B for a whole 3-D parameter of all experts.

A [E R, I] is expert by expert; in B [O, R E] the expert is the fast index (`ParamWrapper` in
peft/tuners/lora/layer.py). PEFT 0.18 took inputs for outputs, and Unsloth trained with B expert by expert before its
zoo of September 2026. No file says which of these it is.

Shape suffixes: E experts, R rank, I and O inputs and outputs of a linear map, F intermediate size, U = 2F.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from superexperts.adapters.factors import (
    Factor,
    Factors,
    Place,
    injected_keys,
    matrices,
    peft_scaling,
    plain_number,
    read_factors,
    require_all_read,
    take_pair,
    write_export,
)
from superexperts.adapters.files import check_keys
from superexperts.adapters.fitting import stored_in
from superexperts.adapters.layer import RENAMED_BY_PEFT, linears
from superexperts.adapters.spelling import PREFIX
from superexperts.checkpoints.source import ModelSource
from superexperts.core.errors import DataError, OptionError
from superexperts.models.banks import Bank, find_banks
from superexperts.models.experts import (
    DOWN,
    GATE,
    UP,
    in_out_features,
    inputs_first,
    join_gate_up,
    split_up,
    up_projections,
)
from superexperts.models.experts import up_name as bank_up_name
from superexperts.models.loading import load_structure

__all__ = ["PEFT_018", "PEFT_019", "UNSLOTH", "UNSLOTH_PEFT_018", "Fused", "targeted", "write"]


# ---- writing ------------------------------------------------------------------------------------------------------


def write(adapter: Path, source: ModelSource, out: Path, *, copy: bool = False) -> dict[str, Any]:
    """Writes the adapter for plain PEFT; see `formats.Format`. The model's weights are not read."""
    model = load_structure(source)
    factors = read_factors(model, adapter, "adapter", stored_in(model, source))
    config, tensors = _layout(model, factors)
    # The keys and shapes must be those that PEFT itself creates on a model without weights.
    expected = injected_keys(load_structure(source), config)
    check_keys(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, out, "out")
    return write_export(out, model, factors, config, tensors, source, loader="PEFT")


def _layout(model: nn.Module, factors: Factors) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and tensors for PEFT: A and B of the chosen experts among zeros, in the layers that hold one.

    All parameters get one rank and one alpha. PEFT accepts a rank for each parameter, but warns that it has ignored it,
    and engines do ignore it. Gate and up are one parameter, so its rank is twice that of each.
    """
    plain = linears(model)
    modules: list[str] = []
    parameters: list[str] = []
    pieces: dict[str, tuple[int, dict[int, Factor]]] = {}
    """Per key, how many experts the tensor has room for, and the factors of the adapted ones."""
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
            if place.path.rpartition(".")[2] in RENAMED_BY_PEFT or place.path not in plain:
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
    """The named parameters of a bank in the bank's order. PEFT wraps them in this order: the last is outermost."""
    return [name for name, _ in bank.named_parameters(recurse=False) if name in set(names)]


def _joined_up(bank: nn.Module, expert: int, own: Mapping[tuple[int | None, str], Factor]) -> Factor | None:
    """One factor for the fused gate and up projection: both A stacked, and each B in the rows of its half."""
    gate, up = own.get((expert, GATE)), own.get((expert, UP))
    some = gate or up
    if some is None or GATE not in up_projections(bank):
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


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """A variant of the layout, as a reader for `formats.Format`."""

    name: str
    """In `formats.FORMATS`."""
    swapped: bool = False
    """PEFT 0.18: A holds the outputs and B the inputs of parameters kept as [E, O, I]. [E, I, O] is as in PEFT 0.19."""
    blockwise: bool = False
    """Unsloth: B is expert by expert."""

    def recognise(
        self, model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
    ) -> str | None:
        """Why a file is in this variant, or None.

        `OptionError` about the layout if neither shapes nor values show it: a wrong guess would not be noticed.
        """
        fused = list(targeted(model, config.target_parameters or ()))
        if not fused:
            return None
        swapped, why = _is_swapped(fused, tensors, fields)
        blockwise = _is_blockwise(fused, tensors)
        if blockwise is None and "unsloth" in str(fields).lower():
            raise OptionError(
                "'auto' cannot tell whether this adapter of Unsloth's holds B expert by expert (trained before its zoo "
                "of September 2026) or as PEFT does; give unsloth or peft-0.19",
                field="layout",
            )
        if (swapped, bool(blockwise)) != (self.swapped, self.blockwise):
            return None
        return f"{why}; untrained experts are blocks of B" if blockwise else why

    def read(self, model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Factors:
        """The factors of a file; `OptionError` about the layout if untrained experts show the other order of B."""
        blockwise = _is_blockwise(list(targeted(model, config.target_parameters or ())), tensors)
        if blockwise is not None and blockwise != self.blockwise:
            order = "expert by expert, as in Unsloth's" if blockwise else "with the expert as fast index, as in PEFT's"
            what = f"columns of zeros in its B are {order} layout"
            raise OptionError(f"{self.name!r} does not fit this file: {what}; leave it out", field="layout")
        factors: dict[Place, Factor] = {}
        left = dict(tensors)
        for key, bank, name in targeted(model, config.target_parameters or ()):
            a, b = take_pair(left, key)
            count, (inputs, outputs) = bank.num_experts, in_out_features(bank.module, name)
            swapped = self.swapped and not inputs_first(bank.module)
            expected = (outputs, inputs) if swapped else (inputs, outputs)
            if a.shape[0] % count or (a.shape[1], b.shape[0]) != expected or a.shape[0] != b.shape[1]:
                raise DataError(
                    f"{key} is A {tuple(a.shape)}, B {tuple(b.shape)}, but {bank.path}.{name} has {count} experts of "
                    f"{inputs} inputs and {outputs} outputs; give the adapter's own model",
                    field="adapter",
                )
            rank = a.shape[0] // count
            a_ERI = a.reshape(count, rank, -1)
            b_EOR = b.reshape(len(b), count, rank).transpose(0, 1) if self.blockwise else (
                b.reshape(len(b), rank, count).permute(2, 0, 1)
            )  # fmt: skip
            if swapped:
                a_ERI, b_EOR = b_EOR.transpose(1, 2), a_ERI.transpose(1, 2)
            scaling = peft_scaling(config, f"{bank.path}.{name}", rank)
            for expert in range(count):
                parts = {DOWN: b_EOR[expert]} if name == DOWN else split_up(bank.module, b_EOR[expert])
                for projection, b_OR in parts.items():
                    place = Place(path=bank.path, expert=expert, projection=projection)
                    factors[place] = Factor(a_RI=a_ERI[expert], b_OR=b_OR, scaling=scaling)
        for path in matrices(model):
            if f"{PREFIX}{path}.lora_A.weight" in left:
                a_RI, b_OR = take_pair(left, f"{PREFIX}{path}")
                whole = any(f".{path}.weight".endswith(f".{target}") for target in config.target_parameters or ())
                at = f"{path}.weight" if whole else path
                factors[Place(path=path)] = Factor(a_RI=a_RI, b_OR=b_OR, scaling=peft_scaling(config, at, len(a_RI)))
        require_all_read(left)
        return factors


PEFT_019 = Fused(name="peft-0.19")
PEFT_018 = Fused(name="peft-0.18", swapped=True)
UNSLOTH = Fused(name="unsloth", blockwise=True)
UNSLOTH_PEFT_018 = Fused(name="unsloth-peft-0.18", swapped=True, blockwise=True)


def targeted(model: nn.Module, target_parameters: Iterable[str]) -> Iterator[tuple[str, Bank, str]]:
    """(key before `.lora_A`, bank, name of its parameter) for each 3-D parameter that a PEFT configuration names."""
    targets = tuple(target_parameters)
    for bank in find_banks(model):
        names = [
            name
            for name in _parameters(bank.module, (DOWN, bank_up_name(bank.module)))
            if any(f".{bank.path}.{name}".endswith(f".{target}") for target in targets)
        ]
        for depth, name in enumerate(reversed(names)):
            yield f"{PREFIX}{bank.path}{'.base_layer' * depth}", bank, name


def _is_swapped(
    fused: list[tuple[str, Bank, str]], tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> tuple[bool, str]:
    """Whether A holds the outputs, as PEFT 0.18 wrote it, and what shows it."""
    square = True
    for key, bank, name in fused:
        inputs, outputs = in_out_features(bank.module, name)
        a = tensors.get(f"{key}.lora_A.weight")
        if a is None:
            raise DataError(f"{key}.lora_A.weight is missing; save the adapter again", field="adapter")
        if inputs_first(bank.module):
            return False, "parameters kept as [experts, in, out] are the same in both versions"
        if inputs != outputs:
            square = False
            if a.shape[1] == outputs:
                return True, f"A of {key.removeprefix(PREFIX)} has the width of the outputs, {outputs}"
    if not square:
        return False, "A has the width of the inputs"
    version = str(fields.get("peft_version") or "")
    if not version:
        raise OptionError(
            "'auto' finds only square projections and no PEFT version; give peft-0.18 or peft-0.19", field="layout"
        )
    old = tuple(int(part) for part in version.split(".")[:2]) < (0, 19)
    return old, f"projections are square, and PEFT {version} wrote it"


def _is_blockwise(fused: list[tuple[str, Bank, str]], tensors: Mapping[str, Tensor]) -> bool | None:
    """Whether the columns of zeros in B, of untrained experts, are expert by expert; None if they fit both orders."""
    for key, bank, _ in fused:
        b = tensors.get(f"{key}.lora_B.weight")
        if b is None or b.shape[1] % bank.num_experts:
            continue
        empty = ~b.any(0)
        blocks, interleaved = empty.view(bank.num_experts, -1), empty.view(-1, bank.num_experts)
        as_blocks = bool((blocks.all(1) == blocks.any(1)).all())
        as_peft = bool((interleaved.all(0) == interleaved.any(0)).all())
        if as_blocks != as_peft:
            return as_blocks
    return None
