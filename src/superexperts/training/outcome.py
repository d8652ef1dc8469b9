"""What a finished training must have achieved, and the files that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from superexperts.adapters.effect import Effect, adapter_effect
from superexperts.adapters.files import check_keys, order_config, read_adapter
from superexperts.checkpoints.source import ModelSource
from superexperts.core.console import note
from superexperts.core.errors import EffectError, ExpertsError, Field
from superexperts.core.runs import write_json, write_text
from superexperts.training.card import model_card
from superexperts.training.recipe import recipe_text
from superexperts.training.rows import Example

__all__ = ["measure_effect", "require_exposure", "round_adapter", "save_adapter", "write_description"]

PROBE_ROWS = 32
"""Rows, evenly spread over the data, on which the adapter's effect is measured."""


def require_exposure(seen: Mapping[str, int], tokens: int, data: Path, *, allow_unexposed: bool) -> None:
    """`ExpertsError` for an adapted expert that saw no training token, unless allowed: its A and B are untrained.

    `seen` holds the tokens that each adapted expert saw, of all `tokens` in the file `data`.
    """
    unseen = [name for name, count in seen.items() if not count]
    if unseen and not allow_unexposed:
        raise ExpertsError(
            f"{', '.join(unseen)} saw none of the {tokens:,} training tokens of {data}; nothing was written: choose "
            "experts that these rows reach, or give ",
            Field("allow_unexposed"),
            field="experts",
        )
    if unseen:
        note(f"train: {', '.join(unseen)} saw none of the {tokens:,} training tokens")


def round_adapter(adapted: PeftModel, dtype: str) -> torch.dtype:
    """Rounds the adapter to the values that will be saved, so that what is measured is what is loaded later.

    `auto` is the dtype of the model's own weights if that is half precision, otherwise float32. Returns the dtype.
    """
    own = next(parameter for parameter in adapted.parameters() if not parameter.requires_grad).dtype
    if dtype == "auto":
        rounded = own if own in (torch.float16, torch.bfloat16) else torch.float32
    else:
        rounded = getattr(torch, dtype)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                # Rounded in place but kept in float32: the forward pass computes with exactly the saved values.
                parameter.copy_(parameter.to(rounded))
    return rounded


def measure_effect(adapted: PeftModel, examples: Sequence[Example], data: Path, *, what: str, field: str) -> Effect:
    """The adapter's effect on rows of `data`. `EffectError` about `field` if it changes no logit; `what` says in the
    message what was adapted."""
    step = max(1, len(examples) // PROBE_ROWS)
    rows = [torch.tensor(example.input_ids) for example in examples[::step][:PROBE_ROWS]]
    effect = adapter_effect(adapted, rows)
    if effect.none:
        raise EffectError(
            f"the adapter on {what} changes no logit of {len(rows)} rows of {data}; nothing was written: choose "
            "experts that these rows reach, or train longer",
            field=field,
        )
    return effect


def save_adapter(adapted: PeftModel, tensors: Mapping[str, Tensor], folder: Path, source: ModelSource) -> None:
    """Writes PEFT's two files and reads them back: `DataError` unless the file holds `tensors`, key for key.

    They name the base model as the user named it. PEFT would write a path of this machine instead.
    """
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = source.name, source.revision
    # Without `save_embedding_layers=False` PEFT asks the Hub whether the embeddings were resized.
    adapted.save_pretrained(str(folder), state_dict=dict(tensors), save_embedding_layers=False)
    order_config(folder)
    _, saved = read_adapter(folder, "out")
    trained = {name.replace(".default.", "."): value for name, value in tensors.items()}
    check_keys(trained, saved, folder, "out", same=torch.equal)


def write_description(
    folder: Path, settings: Mapping[str, Any], result: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Writes training.json, recipe.yaml, and the adapter's card and recipe, below the output folder.

    `digests` holds the SHA-256 of each data file by the file's name.
    """
    comment = "superexperts train --recipe FILE; " + ", ".join(
        f"{name}: sha256 {digest}" for name, digest in digests.items()
    )
    # The recipe that is published with the adapter names the data files without their folders on this machine.
    published = {
        name: value.name if name in ("data", "eval_data") and value is not None else value
        for name, value in settings.items()
    }
    write_text(folder / "adapter" / "README.md", model_card(settings, result, digests))
    write_text(folder / "adapter" / "recipe.yaml", recipe_text(published, comment))
    write_text(folder / "recipe.yaml", recipe_text(settings, comment))
    write_json(folder / "training.json", result)
