"""Merges an adapter into a checkpoint's tensors, one at a time, with the same bits as PEFT's merge of a loaded model.

Shape suffixes: R rank, I and O inputs and outputs of a linear map.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from superexperts.adapters.factors import Factor, read_factors
from superexperts.adapters.files import check_fits
from superexperts.adapters.fitting import read_fitting, stored_by, stored_in
from superexperts.adapters.merge_loaded import merge_in_memory
from superexperts.adapters.readback import compared_logits
from superexperts.checkpoints.provenance import Record, base_files, name_of
from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.source import ModelSource
from superexperts.checkpoints.writer import Change, Patch, carry_along, patch_shards
from superexperts.core.console import note
from superexperts.core.errors import DataError, Field, ModelError
from superexperts.models.banks import find_banks
from superexperts.models.experts import DOWN, split_projections, up_name
from superexperts.models.key_mapping import KeyMapping, Parts
from superexperts.models.loading import load_structure

__all__ = ["merged_patches", "write"]


def write(adapter: Path, source: ModelSource, out: Path, *, copy: bool = False) -> dict[str, Any]:
    """Writes the whole checkpoint, in its own dtype, with the adapter added to the weights; see `formats.Format`.

    Only shards that hold a changed tensor are written. The model is loaded only if its checkpoint keeps what changes in
    an order that cannot be edited, or if the adapter is more than A and B.
    """
    with Checkpoint(source.folder, source.field) as base:
        model = load_structure(source)
        # Errors in the adapter are found here, before a model is loaded for it.
        config, _ = read_fitting(model, adapter, "adapter", stored_in(model, source))
        check_fits(model, config, adapter, "adapter")
        changes: Sequence[Change] = ()
        skip: list[str] = []
        try:
            patches = merged_patches(model, KeyMapping(model, base), base, adapter, "adapter")
        except (DataError, ModelError) as error:
            note(f"export: not shard by shard, the model is loaded ({error})")
            merge_in_memory(adapter, source, out)
            skip = sorted(file.name for file in out.iterdir())
        else:
            changes = patch_shards(base, patches, out, copy=copy)
        carry_along(source.folder, out, skip=skip)
        Record(
            command="export",
            mode="merged",
            experts=(),
            model=name_of(source.name),
            revision=source.revision,
            files=base_files(base, source.folder),
            changes=tuple(changes),
        ).write(out)
    measured = compared_logits(adapter, source, out)
    with Checkpoint(out, "out") as written:
        return {"keys": len(written), "changed": len({change.key for change in changes}), **measured}


def merged_patches(
    model: nn.Module, key_mapping: KeyMapping, base: Checkpoint, adapter: Path, field: str
) -> list[Patch]:
    """The changes that an adapter of A and B makes to the base's tensors; `model` is a structure without weights.

    `DataError` or `ModelError` about `field` if the adapter is more than A and B, belongs to another model, or changes
    tensors that the checkpoint keeps in an order that cannot be edited. Weights that are not finite are a `DataError`
    when the changes are written.
    """
    key_mapping.check_complete(model)
    if key_mapping.quantized:
        raise ModelError("the base is quantized, and no weight of it can be changed in place", field=field)
    factors = read_factors(model, adapter, field, stored_by(model, key_mapping))
    tied = cast(Any, model).all_tied_weights_keys
    banks = {bank.path: bank for bank in find_banks(model)}
    patches: list[Patch] = []
    experts: dict[tuple[str, int, str], dict[str, Factor]] = {}
    for place, factor in factors.items():
        if place.expert is None:
            if f"{place.path}.weight" in {*tied, *tied.values()}:
                raise ModelError(
                    f"{place.path}.weight is tied to another weight, which must not change with it; a merged "
                    "checkpoint has room for both: export it, and compare that",
                    field=field,
                )
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
    base: Checkpoint, bank: nn.Module, name: str, parts: Parts, piece: int, factors: Mapping[str, Factor]
) -> Tensor:
    """Piece number `piece` of those that an expert's part of a parameter has in the checkpoint."""
    own = torch.cat([base.read(entry) for entry in parts])
    for projection, weight_OI in split_projections(bank, name, own).items():
        if projection in factors:
            weight_OI.copy_(_merged(weight_OI, factors[projection]))
    return _finite(torch.split(own, [entry.shape[0] for entry in parts])[piece], parts[piece])


def _merged(weight_OI: Tensor, factor: Factor) -> Tensor:
    # As PEFT merges: it keeps the adapter of a half-precision model in float32, and rounds the sum once.
    change_OI = factor.b_OR.float() @ factor.a_RI.float() * factor.scaling
    return (weight_OI + change_OI).to(weight_OI.dtype)


def _finite(weight: Tensor, entry: Entry) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise DataError(
            f"makes {entry.key} not finite; train again with a lower ", Field("learning_rate"), field="adapter"
        )
    return weight
