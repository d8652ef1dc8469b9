"""A model made ready to be asked: with its adapter, which must fit the prompts and change something."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superexperts.adapters.effect import require_effect
from superexperts.adapters.lora import load_adapter
from superexperts.checkpoints.source import adapter_folder
from superexperts.core.console import is_shown
from superexperts.core.paths import require_folder
from superexperts.data.chat import read_prompt_record, require_same_prompt
from superexperts.evaluation.prompts import Prompts
from superexperts.models.banks import check_experts, find_banks

__all__ = ["adapter_to_ask", "name_after", "prepared"]

PROBE_TOKENS = 256
"""Tokens taken from the end of each prompt on which the effect of an adapter is measured."""


def adapter_to_ask(folder: Path, prompts: Prompts) -> Path:
    """The adapter's folder; `DataError` if there is none, `OptionError` if it was trained on another kind of prompt."""
    found = adapter_folder(require_folder(folder, "adapter", "the adapter folder that `train` wrote"))
    require_same_prompt(read_prompt_record(found), prompts.record, folder)
    return found


def name_after(adapter: Path | None) -> str:
    """The default name of a variant: base, or that of the adapter's folder (`adapter`, as `train` calls it, takes the
    name of the folder above)."""
    if adapter is None:
        return "base"
    folder = adapter.resolve()
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return name if name and is_shown(name) else "adapter"


def prepared(
    model: nn.Module, tokenizer: Any, adapter: Path | None, silent: Any, texts: Sequence[str]
) -> tuple[nn.Module, dict[str, Any] | None]:
    """(the model with its adapter, the adapter's effect on texts); raises if the adapter changes no logit, or if an
    expert in `silent` does not exist."""
    if silent:
        check_experts(find_banks(model), silent, "silence")
    if adapter is None:
        return model, None
    adapted = load_adapter(model, adapter, "adapter")
    probe = [torch.tensor(tokenizer(text, verbose=False).input_ids[-PROBE_TOKENS:]) for text in texts]
    return adapted, dataclasses.asdict(require_effect(adapted, probe, adapter, "adapter"))
