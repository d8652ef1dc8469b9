"""Where a checkpoint holds the down_proj of experts, found from the structure of its model and transformers' rules for
loading it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.core.errors import Field, ModelError
from superexperts.core.types import ExpertKey, key_name
from superexperts.models.banks import check_experts, find_banks
from superexperts.models.decoder import text_config
from superexperts.models.experts import DOWN, down_bias
from superexperts.models.key_mapping import BLOCKS, KeyMapping
from superexperts.surgery.locate_by_shape import DownProjection

__all__ = ["check_biases", "down_projections", "locate"]


def locate(
    structure: nn.Module, base: Checkpoint, experts: Sequence[ExpertKey], *, values_matter: bool
) -> list[DownProjection] | None:
    """The down_proj of each expert in a checkpoint; None if its layout does not keep the experts apart.

    `structure` is the model without weights. With `values_matter` something other than zeros is to be written, which
    quantized weights cannot hold. `ModelError` if the checkpoint is incomplete, or quantized in a layout that cannot be
    edited; `ExpertsError` for an expert that the model does not have.
    """
    check_experts(find_banks(structure, base.field), experts)
    key_mapping = KeyMapping(structure, base)
    key_mapping.check_complete(structure)
    if key_mapping.quantized and values_matter:
        raise ModelError("'mean' needs weights that are not quantized; use ", Field("mode"), " zero", field="mode")
    found = down_projections(structure, key_mapping, experts)
    for down in found or ():
        _check_zero(base, down.weight)
    if found is None and key_mapping.quantized:
        raise ModelError("is quantized in a layout that cannot be edited; use a bfloat16 checkpoint", field=base.field)
    return found


def _check_zero(base: Checkpoint, weight: Entry) -> None:
    """`ModelError` where 0 does not stand for 0: whole numbers that a zero point is subtracted from."""
    module = weight.key.rpartition(".")[0]
    points = [key for key in base if key.startswith(f"{module}.") and "zero" in key.removeprefix(f"{module}.")]
    if points and not weight.dtype.is_floating_point:
        raise ModelError(
            f"{weight.key!a} holds whole numbers that a zero point ({points[0]!a}) is subtracted from, so zeros do not "
            "silence the expert; use a bfloat16 checkpoint",
            field=base.field,
        )


def down_projections(
    structure: nn.Module, key_mapping: KeyMapping, experts: Sequence[ExpertKey]
) -> list[DownProjection] | None:
    """The down_proj of each expert; None if the layout of the checkpoint does not allow editing one without others."""
    banks = {bank.layer: bank for bank in find_banks(structure)}
    paths = {module: path for path, module in structure.named_modules()}
    found = []
    for layer, expert in experts:
        bank = banks[layer]
        bias: Entry | None = None
        if expert == "shared":
            assert bank.shared_down is not None
            path, has_bias = paths[bank.shared_down], bank.shared_down.bias is not None
            weight, bias = key_mapping.whole(f"{path}.weight"), key_mapping.whole(f"{path}.bias") if has_bias else None
        else:
            has_bias = down_bias(bank.module) is not None
            weights = key_mapping.expert_rows(bank, DOWN) or key_mapping.expert_parts(bank, f"{DOWN}{BLOCKS}")
            biases = key_mapping.expert_parts(bank, f"{DOWN}_bias") if has_bias else None
            (weight,) = (None,) if weights is None else weights[expert]
            (bias,) = (None,) if biases is None else biases[expert]
        if weight is None or (has_bias and bias is None):
            return None
        found.append(DownProjection(expert=(layer, expert), weight=weight, bias=bias))
    return found


def check_biases(structure: nn.Module, experts: Sequence[ExpertKey]) -> None:
    """`ModelError` for an expert without a bias of down_proj, which is the only place for a mean."""
    banks = {bank.layer: bank for bank in find_banks(structure)}
    check_experts(list(banks.values()), experts)
    for layer, expert in experts:
        bank = banks[layer]
        shared = bank.shared_down is not None and bank.shared_down.bias is not None
        if not (shared if expert == "shared" else down_bias(bank.module) is not None):
            family = text_config(structure).model_type
            raise ModelError(
                f"'mean' needs a bias of down_proj to hold the mean, which {family} does not have for "
                f"{key_name((layer, expert))}; use zero or remove",
                field="mode",
            )
