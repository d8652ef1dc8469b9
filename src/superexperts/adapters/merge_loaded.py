"""Merges an adapter into a loaded model and saves it: where a checkpoint's tensors cannot be changed one by one.

Weights that are tied stop being so where the adapter changes one of them, and a quantized base is written as ordinary
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from superexperts.adapters.files import one_line
from superexperts.adapters.lora import load_adapter, quiet
from superexperts.checkpoints.source import ModelSource
from superexperts.core.errors import DataError, Field
from superexperts.models.loading import load_unquantized

__all__ = ["merge_in_memory"]


def merge_in_memory(adapter: Path, source: ModelSource, out: Path) -> None:
    """Loads the model, merges the adapter as PEFT does, and writes the checkpoint into `out`.

    `DataError` for an adapter that cannot be merged, `ModelError` for a base with a quantization that cannot be undone.
    """
    adapted = load_adapter(load_unquantized(source), adapter, "adapter")
    _require_biases(adapted, adapter)
    tied = _untie(adapted)
    # Not PEFT's safe merge: it rounds the change before adding it, and so rounds twice in bfloat16.
    try:
        with quiet():
            merged = cast(Any, adapted).merge_and_unload()
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:  # a variant that only runs unmerged
        raise DataError(f"{adapter} cannot be merged ({one_line(error)}); use it as it is", field="adapter") from error
    broken = [name for name, parameter in merged.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        raise DataError(
            f"{adapter} makes {broken[0]} not finite; train again with a lower ",
            Field("learning_rate"),
            field="adapter",
        )
    _tie_again(merged, tied)
    merged.save_pretrained(out)


def _require_biases(adapted: PeftModel, adapter: Path) -> None:
    """`DataError` for `lora_bias` on a map without a bias: the family's checkpoints have no place for it."""
    for path, module in adapted.get_base_model().named_modules():
        biased = isinstance(module, LoraLayer) and any(module.lora_bias.values())
        if biased and getattr(cast(Any, module).get_base_layer(), "bias", None) is None:
            raise DataError(
                f"{adapter} has a bias beside B (lora_bias) at {path}, which has none in the checkpoint, so it cannot "
                "be merged; use it as it is",
                field="adapter",
            )


# ---- tied weights --------------------------------------------------------------------------------------------------


def _untie(adapted: PeftModel) -> dict[str, str]:
    """Gives every weight that is tied to another a copy; returns {name: name of the other}."""
    model: Any = adapted.get_base_model()
    tied = dict(model.all_tied_weights_keys)
    for name, other in tied.items():
        module, leaf = _holder(model, name)
        source, source_leaf = _holder(model, other)
        if getattr(module, leaf) is getattr(source, source_leaf):
            setattr(module, leaf, nn.Parameter(getattr(source, source_leaf).detach().clone(), requires_grad=False))
    return tied


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter below what PEFT put around it, and the parameter's name there."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    while not isinstance(getattr(module, leaf, None), nn.Parameter) or hasattr(module, "base_layer") or (
        hasattr(module, "original_module")
    ):  # fmt: skip
        inside = getattr(module, "base_layer", None)
        module = inside if inside is not None else module.original_module
    return module, leaf


def _tie_again(model: Any, tied: Mapping[str, str]) -> None:
    """Leaves the model's weights tied if they still are the same; if not, its settings say so."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    same = all(bool((parameters[name] == parameters[other]).all()) for name, other in tied.items())
    if same:
        model.tie_weights()
        return
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
