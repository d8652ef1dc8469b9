"""How other programs spell an adapter's keys, and the one spelling that is read here: that of PEFT's own files.

PEFT leaves the adapter's name out of the keys that it saves. State dicts gathered by trainers keep it
(`lora_A.default.weight`), with the names of the wrappers around the model (`_orig_mod`, `_fsdp_wrapped_module`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from superexperts.core.errors import DataError, ModelError
from superexperts.models.banks import find_banks

__all__ = ["PREFIX", "base_weights", "fit_prefix", "plain_keys"]

PREFIX = "base_model.model."
"""Prefix of every key of a PEFT file."""

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = (
    (re.compile(r"\.(lora_[AB])\.([^.]+)\.(weight|bias|\d+_[a-z]+_proj)$"), r".\1.\3", 2),
    (re.compile(r"\.(lora_embedding_[AB]|trainable_tokens_delta)\.([^.]+)$"), r".\1", 2),
    (re.compile(r"\.lora_magnitude_vector\.(?!weight$)([^.]+)(?:\.weight)?$"), ".lora_magnitude_vector", 1),
    (re.compile(r"\.modules_to_save\.([^.]+)\."), ".", 1),
)
"""Where the adapter's name is in a key, what to write instead, and which group is the name."""
_BASE = re.compile(r"\.(?:original_module|(?:token_adapter\.)?base_layer)\.(weight|bias)$")
"""Weights of the base model in a file; PEFT saves them with LoRA on the embeddings and the output head."""
_AROUND = {"base_model", "model", "module", "language_model", "text_model", "thinker", "transformer", "decoder"}
"""Names of modules that contain a decoder."""


def plain_keys(tensors: Mapping[str, Tensor], file: str, field: str) -> dict[str, Tensor]:
    """The tensors under the keys that PEFT would have saved; weights of the base end with `.base_layer.weight`.

    `DataError` about `field` if the keys of `file` name more than one adapter.
    """
    found: dict[str, Tensor] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        plain = _WRAPPERS.sub(r"\1", key)
        if plain.count(PREFIX) > 1:
            plain = PREFIX + plain.rpartition(PREFIX)[2]
        for pattern, replacement, group in _NAMED:
            if match := pattern.search(plain):
                names.add(match[group])
                plain = pattern.sub(replacement, plain)
        found[_BASE.sub(r".base_layer.\1", plain)] = tensor
    if len(names) > 1:
        raise DataError(f"{file} holds several adapters ({', '.join(sorted(names))}); save one of them", field=field)
    return found


def base_weights(model: nn.Module, tensors: Mapping[str, Tensor], kept: set[str]) -> dict[str, str]:
    """Key -> the model's parameter, for the tensors of a file that are weights of the base and not of the adapter.

    `kept` are the names of modules that the adapter holds whole.
    """
    parameters = model.state_dict().keys()
    found = {}
    for key in tensors:
        name = re.sub(r"\.base_layer\.(weight|bias)$", r".\1", key.removeprefix(PREFIX))
        path = name.rpartition(".")[0]
        whole = any(f".{path}".endswith(f".{module}") for module in kept) and name == key.removeprefix(PREFIX)
        if name in parameters and not whole:
            found[key] = name
    return found


# ---- where a file was trained on the same model under other names ---------------------------------------------------


def fit_prefix(
    model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the fields of adapter_config.json, with the names that this model's class uses.

    An adapter of a model inside a larger one (`model.language_model.layers`) is for `model.layers` of the text model
    alone, or the other way round. What comes before `layers.N` is all that differs. A `target_modules` that is a
    regular expression is replaced by the paths in the file.
    """
    own, stored = _prefixes(model)
    bare = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    theirs = {name.partition("layers.")[0] for name in bare if re.search(r"(^|\.)layers\.\d+\.", name)}
    if len(theirs) != 1 or own is None:
        return dict(tensors), dict(fields)
    other: str = theirs.pop()
    if other in (own, stored):
        return {PREFIX + name: tensor for name, tensor in bare.items()}, dict(fields)
    if not set(filter(None, other.split("."))) <= _AROUND:
        return dict(tensors), dict(fields)

    prefix: str = own

    def renamed(name: str) -> str:
        if name.startswith(other):
            return prefix + name.removeprefix(other)
        for leaf in ("lm_head.", "embed_tokens."):  # beside the layers, or outside of the text model
            paths = [path for path, _ in model.named_modules() if f".{path}.".endswith(f".{leaf}")]
            if f".{leaf}" in f".{name}" and paths:
                return f"{paths[0]}.{f'.{name}'.partition(f'.{leaf}')[2]}"
        return name

    found = {PREFIX + renamed(name): tensor for name, tensor in bare.items()}
    return found, {name: _renamed_field(name, value, other, own, found) for name, value in fields.items()}


def _prefixes(model: nn.Module) -> tuple[str | None, str | None]:
    """What comes before `layers.N` in the model's names, and in those of the family's checkpoints."""
    path = next((bank.path for bank in _banks(model)), None)
    if path is None:
        paths = [name for name, _ in model.named_modules() if re.search(r"(^|\.)layers\.0\.", name)]
        path = min(paths, key=len, default=None)
    if path is None:
        return None, None
    own = path.partition("layers.")[0]
    some = next(name for name in model.state_dict() if name.startswith(f"{own}layers."))
    state = {some: model.state_dict()[some]}
    (stored,) = list(revert_weight_conversion(model, state))[:1] or [some]
    return own, stored.partition("layers.")[0]


def _banks(model: nn.Module) -> Any:
    try:
        return find_banks(model)
    except ModelError:
        return ()


def _renamed_field(name: str, value: Any, other: str, own: str, tensors: Mapping[str, Tensor]) -> Any:
    if name == "target_modules" and isinstance(value, str) and value != "all-linear":
        paths = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
        return sorted(path for path in paths if not path.endswith(".base_layer"))
    if isinstance(value, dict) and name in ("rank_pattern", "alpha_pattern", "experts"):
        return {_renamed_entry(entry, other, own): inner for entry, inner in value.items()}
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return [_renamed_entry(entry, other, own) for entry in value]
    return value


def _renamed_entry(entry: str, other: str, own: str) -> str:
    if not other:
        return own + entry if entry.startswith("layers.") else entry
    return entry.replace(re.escape(other), re.escape(own)).replace(other, own)
