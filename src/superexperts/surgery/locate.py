"""Where a checkpoint holds experts' down_proj, told by its model's structure and transformers' rules for loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.source import ModelSource, resolve
from superexperts.core.config_surgery import PruneConfig
from superexperts.core.errors import Field, ModelError
from superexperts.core.types import ExpertKey, key_name
from superexperts.models.banks import check_experts, find_banks
from superexperts.models.experts import DOWN
from superexperts.models.key_mapping import BLOCKS, KeyMapping
from superexperts.models.loading import load_structure, settings_of
from superexperts.surgery.locate_by_shape import Down

__all__ = ["check_biases", "downs", "find"]


def find(config: PruneConfig, base: Checkpoint, experts: Sequence[ExpertKey]) -> list[Down] | None:
    """As `downs`, of a checkpoint that is proved to be whole first, and to have the experts."""
    model = load_structure(resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code))
    banks = find_banks(model)
    check_experts(banks, experts)
    key_mapping = KeyMapping(model, base)
    key_mapping.check_complete(model)
    if key_mapping.quantized and config.mode != "zero":
        raise ModelError(
            f"{config.mode!r} needs weights that are not quantized; use ", Field("mode"), " zero", field="mode"
        )
    found = downs(model, key_mapping, experts)
    if found is None and key_mapping.quantized:
        raise ModelError(
            f"{config.model!r} is quantized in a layout that cannot be edited; use bfloat16", field="model"
        )
    return found


def downs(model: nn.Module, key_mapping: KeyMapping, experts: Sequence[ExpertKey]) -> list[Down] | None:
    """Each expert's down_proj; None where the checkpoint's layout lets one not be edited without the others."""
    banks = {bank.layer: bank for bank in find_banks(model)}
    paths = {module: path for path, module in model.named_modules()}
    found = []
    for layer, expert in experts:
        bank = banks[layer]
        bias: Entry | None = None
        if expert == "shared":
            assert bank.shared_down is not None
            path, has_bias = paths[bank.shared_down], bank.shared_down.bias is not None
            weight, bias = key_mapping.whole(f"{path}.weight"), key_mapping.whole(f"{path}.bias") if has_bias else None
        else:
            has_bias = cast(Any, bank.module).has_bias
            weights = key_mapping.expert_parts(bank, DOWN) or key_mapping.expert_parts(bank, f"{DOWN}{BLOCKS}")
            biases = key_mapping.expert_parts(bank, f"{DOWN}_bias") if has_bias else None
            (weight,) = (None,) if weights is None else weights[expert]
            (bias,) = (None,) if biases is None else biases[expert]
        if weight is None or (has_bias and bias is None):
            return None
        found.append(Down(expert=(layer, expert), weight=weight, bias=bias))
    return found


def check_biases(source: ModelSource, experts: Sequence[ExpertKey]) -> None:
    """`ModelError` in families that have no place for a mean."""
    banks = find_banks(load_structure(source))
    check_experts(banks, experts)
    for layer, expert in experts:
        bank = next(bank for bank in banks if bank.layer == layer)
        shared = bank.shared_down is not None and bank.shared_down.bias is not None
        if not (shared if expert == "shared" else cast(Any, bank.module).has_bias):
            family = settings_of(source).get_text_config().model_type
            raise ModelError(
                (
                    f"'mean' needs a bias of down_proj to hold the mean, which {family} does not have for "
                    f"{key_name((layer, expert))}; use zero or remove"
                ),
                field="mode",
            )
