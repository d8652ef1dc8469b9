"""Where a forward pass stops giving finite numbers: the first layer, and the expert in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from superexperts.core.errors import Field, ModelError
from superexperts.core.types import key_name
from superexperts.models.banks import find_banks
from superexperts.models.decoder import decoder_layers
from superexperts.models.experts import BankCall
from superexperts.models.hooks import tapped

__all__ = ["first_not_finite", "not_finite_error"]


def not_finite_error(model: nn.Module, ids_L: Tensor) -> ModelError:
    """The error for a model whose logits on these token ids are not finite."""
    return ModelError(
        f"its logits are not finite numbers: {first_not_finite(model, ids_L)}; repair the checkpoint, or try ",
        *(Field("dtype"), " float32"),
        field="model",
    )


def first_not_finite(model: nn.Module, ids_L: Tensor) -> str:
    """Runs the model on token ids [L] and says in words where NaN or an infinite number arises first.

    That is an expert whose output is not finite though its layer's input is, the attention or another part of a layer,
    the embeddings, or the output head.
    """
    try:
        banks = find_banks(model)
    except ModelError:
        return "they arise in a layer of a model without experts"
    found: list[str] = []
    layers = decoder_layers(model, banks[0].path)
    inputs: dict[int, bool] = {}

    def tap(call: BankCall) -> None:
        broken = [(call.layer, one.expert) for one in call.each() if not _finite(one.output_ND)]
        if not found and broken and inputs.get(call.layer, True):
            found.append(f"they arise first in layer {call.layer}, in the output of expert {key_name(broken[0])}")

    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(_watched(layer, number, found))
        for bank in banks:
            hook = bank.module.register_forward_pre_hook(
                lambda _, given, number=bank.layer: inputs.update({number: _finite(given[0])})
            )
            stack.callback(hook.remove)
        stack.enter_context(tapped(model, tap))
        with torch.inference_mode():
            cast(Any, model)(input_ids=ids_L[None].to(device), use_cache=False)
    return found[0] if found else "every layer's output is finite, so they arise in the output head"


@contextlib.contextmanager
def _watched(layer: nn.Module, number: int, found: list[str]) -> Iterator[None]:
    """Within the block, a layer's output that is not finite is noted, if nothing was noted before."""

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = given[0] if given else named.get("hidden_states")
        if number == 0 and not found and hidden is not None and not _finite(hidden):
            found.append("they arise in the embeddings")

    def after(_: nn.Module, given: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(hidden, Tensor) and not _finite(hidden):
            found.append(f"they arise first in layer {number}, outside its experts")

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
