"""An adapter merged into a checkpoint's own tensors, one at a time, to the bit as PEFT merges it into a loaded model.

Shape suffixes: R rank, I and O inputs and outputs of a linear map.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from superexperts.adapters.factors import Factor, read_factors
from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.writer import Patch
from superexperts.core.errors import DataError, Field, ModelError
from superexperts.models.banks import find_banks
from superexperts.models.experts import DOWN, split_projections, up_name
from superexperts.models.key_mapping import KeyMapping, Parts

__all__ = ["merged_patches"]


def merged_patches(
    model: nn.Module, key_mapping: KeyMapping, base: Checkpoint, adapter: Path, field: str
) -> list[Patch]:
    """What an adapter of A and B makes of the base's tensors; `model` is a structure without weights.

    `DataError` or `ModelError` where the adapter is more than that or another model's, or where the checkpoint keeps
    what it changes in an order that cannot be edited; when written, for weights that are not finite.
    """
    key_mapping.check_complete(model)
    if key_mapping.quantized:
        raise ModelError("the base is quantized, into which nothing can be merged; use its bfloat16 form", field=field)
    factors = read_factors(model, adapter, field)
    banks = {bank.path: bank for bank in find_banks(model)}
    patches: list[Patch] = []
    experts: dict[tuple[str, int, str], dict[str, Factor]] = {}
    for place, factor in factors.items():
        if place.expert is None:
            entry = key_mapping.whole(f"{place.path}.weight")
            if entry is None:
                raise ModelError(f"the checkpoint does not hold {place.path}.weight as it is in the model", field=field)
            patches.append(Patch(entry=entry, data=functools.partial(_linear, base, entry, factor)))
        else:
            name = DOWN if place.projection == DOWN else up_name(banks[place.path].module)
            experts.setdefault((place.path, place.expert, name), {})[place.projection] = factor
    for (path, expert, name), own in experts.items():
        parts = key_mapping.expert_parts(banks[path], name)
        if parts is None:
            raise ModelError(f"the checkpoint keeps the experts of {path} in another order than the model", field=field)
        patches += [
            Patch(entry=entry, data=functools.partial(_expert, base, banks[path].module, name, parts[expert], i, own))
            for i, entry in enumerate(parts[expert])
        ]
    return patches


def _linear(base: Checkpoint, entry: Entry, factor: Factor) -> Tensor:
    return _finite(_merged(base.read(entry), factor), entry)


def _expert(
    base: Checkpoint, bank: nn.Module, name: str, parts: Parts, wanted: int, factors: Mapping[str, Factor]
) -> Tensor:
    """One of the pieces that an expert's part of a parameter has in the checkpoint."""
    own = torch.cat([base.read(entry) for entry in parts])
    for projection, weight_OI in split_projections(bank, name, own).items():
        if projection in factors:
            weight_OI.copy_(_merged(weight_OI, factors[projection]))
    return _finite(torch.split(own, [entry.shape[0] for entry in parts])[wanted], parts[wanted])


def _merged(weight_OI: Tensor, factor: Factor) -> Tensor:
    # In float32, in which PEFT keeps the adapter of a half-precision model, and rounded once.
    change_OI = factor.b_OR.float() @ factor.a_RI.float() * factor.scaling
    return (weight_OI + change_OI).to(weight_OI.dtype)


def _finite(weight: Tensor, entry: Entry) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise DataError(
            f"makes {entry.key} not finite; train again with a lower ", Field("learning_rate"), field="adapter"
        )
    return weight
