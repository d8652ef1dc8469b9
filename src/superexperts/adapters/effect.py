"""How far an adapter moves a model's logits, and how many tokens reach its experts.

Shape suffixes: B sequences, L tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from superexperts.adapters.exposure import counting
from superexperts.adapters.lora import start_of
from superexperts.core.console import note
from superexperts.core.errors import DataError, EffectError, Field, OptionError

__all__ = ["Effect", "adapter_effect", "require_effect", "without_adapter"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """How far an adapter moves a model on some text."""

    max_logit_change: float
    """Largest |logit with the adapter - logit without|."""
    kl: float
    """KL(with || without) of the next token in nats, mean over positions."""
    probe_tokens: int
    """Tokens of the text."""
    probe_share: float | None
    """Share of them that reach an adapted expert in some layer; None if the adapter is not on experts."""
    probe_experts: dict[str, int]
    """How many of them each adapted expert sees, by its name (`L2E54`)."""

    @property
    def none(self) -> bool:
        """Whether no logit changes."""
        return not self.max_logit_change > 0

    @property
    def unreached(self) -> list[str]:
        """Names of the adapted experts that no token reached."""
        return [name for name, count in self.probe_experts.items() if not count]


def require_effect(adapted: PeftModel, sequences: Sequence[Tensor], folder: Path, field: str) -> Effect:
    """Measures the adapter on rows of token ids [L]. `DataError` about `field` if no logit changes; a note names the
    adapted experts that no token reached. `folder` is the adapter's, for the message."""
    effect = adapter_effect(adapted, sequences)
    unreached = f"{', '.join(effect.unreached)} saw none of {effect.probe_tokens:,} probe tokens"
    if effect.none:
        why = f" ({unreached})" if effect.unreached else ""
        raise DataError(
            f"{folder} changes no logit of {effect.probe_tokens:,} probe tokens{why}; train it, or give text that "
            "reaches its experts",
            field=field,
        )
    if effect.unreached:
        reached = len(effect.probe_experts) - len(effect.unreached)
        note(f"{field}: {unreached}; {reached} other adapted expert{' was' if reached == 1 else 's were'} reached")
    return effect


@torch.no_grad()
def adapter_effect(model: PeftModel, sequences_BL: Iterable[Tensor]) -> Effect:
    """Compares the model with its adapter against itself without, on rows of token ids [L] (lengths may differ).

    `EffectError` if the adapter makes logits that are not finite.
    """
    # Rows run one by one: nothing is padded, and at most two [L, V] tensors are held.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    change, divergence, positions = 0.0, 0.0, 0
    with counting(model, training=False) as exposure:
        for ids_L in sequences_BL:
            ids_BL = ids_L[None].to(next(model.parameters()).device)
            exposure.on = True
            with_LV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
            exposure.on = False
            with without_adapter(model):
                without_LV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
            if not with_LV.isfinite().all():
                raise EffectError(
                    "the adapter makes logits that are not finite: training diverged; lower ", Field("learning_rate")
                )
            change = max(change, float((with_LV - without_LV).abs().max()))
            divergence += float(
                F.kl_div(without_LV.log_softmax(-1), with_LV.log_softmax(-1), reduction="sum", log_target=True)
            )
            positions += len(ids_L)
    for module, training in modes:
        module.training = training
    if not positions:
        raise OptionError("there is no row to measure the adapter's effect on; give at least one", field="data")
    return Effect(
        max_logit_change=change,
        kl=divergence / positions,
        probe_tokens=positions,
        probe_share=exposure.share() if exposure.experts else None,
        # Every process measures the same rows, so the counts are not summed over processes.
        probe_experts=exposure.by_expert(together=False),
    )


@contextlib.contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Within the block the model computes what its base does.

    Usually every LoRA scaling is set to 0: the layers stay in place, so the sums run in the same order as with the
    adapter, and an adapter that does nothing measures exactly 0. `disable_adapter` takes the stock forward, which sums
    in another order and differs in the last bits; it is for adapters that are more than A and B. After a start that
    changed the base's weights (PiSSA, OLoRA) the base is the adapter as it began.
    """
    if start := start_of(model):
        (name,) = model.active_adapters
        trained = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        trained = {key: tensor.clone() for key, tensor in trained.items()}
        set_peft_model_state_dict(model, dict(start), adapter_name=name)
        try:
            yield
        finally:
            set_peft_model_state_dict(model, trained, adapter_name=name)
        return
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    whole = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    if whole or any(any(layer.use_dora.values()) for layer in layers):
        with model.disable_adapter():
            yield
        return
    scalings = [layer.scaling for layer in layers]
    before = [dict(scaling) for scaling in scalings]
    for scaling in scalings:
        scaling.update(dict.fromkeys(scaling, 0.0))
    try:
        yield
    finally:
        for scaling, values in zip(scalings, before, strict=True):
            scaling.update(values)
