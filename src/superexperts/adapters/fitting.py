"""An adapter's configuration and tensors as they go onto one model, and what in them is more than A and B."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from torch import Tensor, nn

from superexperts.adapters.files import MLX, adapter_config, read_fields, read_tensors, same_values
from superexperts.adapters.spelling import PREFIX, base_weights, fit_prefix
from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import ModelSource
from superexperts.core.errors import DataError, ModelError
from superexperts.models.key_mapping import KeyMapping

__all__ = [
    "BEYOND",
    "Beyond",
    "Stored",
    "beyond_factors",
    "read_fitting",
    "require_loadable",
    "start_without_record",
    "starts_from_base",
    "stored_by",
    "stored_in",
]

Stored = Callable[[str], Tensor | None]
"""Name of a parameter -> its value in the checkpoint, or None where that cannot be read as it is."""


def read_fitting(
    model: nn.Module, folder: Path, field: str, stored: Stored | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's configuration and tensors under the names of this model, without the weights of the base.

    PEFT saves the base's embeddings and output head with LoRA on them. They must be those of this model: `stored`
    returns the checkpoint's tensor for a parameter, and replaces the model's own where that is without weights.
    `DataError` or `ModelError` about `field` if the file cannot be read, or was saved with another base.
    """
    fields = read_fields(folder, field)
    if MLX in fields:
        raise DataError(f"{folder} is in the layout of mlx-lm; import it first", field=field)
    tensors, fields = fit_prefix(model, read_tensors(folder, field), fields)
    config = adapter_config(fields, folder, field)
    kept = set(config.modules_to_save or ())
    if kept and config.ensure_weight_tying:  # PEFT then saves what is tied to them as well
        kept |= {name.rpartition(".")[0] for pair in cast(Any, model).all_tied_weights_keys.items() for name in pair}
    state = model.state_dict()
    trained = tensors if config.bias == "none" else {key: t for key, t in tensors.items() if not key.endswith(".bias")}
    of_base = base_weights(model, trained, kept)
    for key, saved in list(tensors.items()):
        name = of_base.get(key, key.removeprefix(PREFIX))
        if name in state and saved.shape[1:] == state[name].shape[1:] and len(saved) != len(state[name]):
            raise ModelError(
                f"{folder} was saved with {name} of {len(saved):,} rows, and this model's has {len(state[name]):,}: "
                "the vocabulary was resized before training; save the resized model, and give that",
                field=field,
            )
    for key, name in of_base.items():
        saved, own = tensors.pop(key), state[name]
        if own.is_meta and stored is not None:
            own = stored(name)
        if own is not None and not own.is_meta and not same_values(saved.to(own.dtype), own):
            raise ModelError(
                f"{folder} was saved with other values of {name} than this model's; give the model that it was "
                "trained on",
                field=field,
            )
    return config, tensors


_FOREIGN = re.compile(r"\.experts\.(?:\d+\.|(?!base_layer\.)[a-z0-9_]+\.(?:\d+\.)?lora_)")
"""Part of a key of another program's layout: an expert's number or a projection's name behind the experts."""


def require_loadable(tensors: Mapping[str, Tensor], folder: Path, field: str) -> None:
    """`DataError` about `field` for a layout of experts that must be imported before it can be put on a model."""
    if found := next((key for key in tensors if _FOREIGN.search(key)), None):
        raise DataError(
            f"{folder} is in another program's layout of experts ({found.removeprefix(PREFIX)}); import it first",
            field=field,
        )


def stored_in(model: nn.Module, source: ModelSource) -> Stored:
    """Reads a parameter of a structure from its checkpoint, which is opened when it is asked for."""

    def read(name: str) -> Tensor | None:
        with Checkpoint(source.folder, source.field) as checkpoint:
            return stored_by(model, KeyMapping(model, checkpoint))(name)

    return read


def stored_by(model: nn.Module, key_mapping: KeyMapping) -> Stored:
    """As `stored_in`, of an open checkpoint. A tied parameter is read where the checkpoint has it."""
    tied = cast(Any, model).all_tied_weights_keys

    def read(name: str) -> Tensor | None:
        entry = key_mapping.whole(name) or key_mapping.whole(tied.get(name, name))
        return None if entry is None else key_mapping.checkpoint.read(entry)

    return read


# ---- what is more than A and B of linear maps ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beyond:
    """Something in an adapter that scaling * B A at linear maps cannot express."""

    words: str
    """What it is, for a message."""
    holds: Callable[[LoraConfig, Mapping[str, Tensor]], bool]
    """Whether an adapter of this configuration and these tensors has it."""
    instead: str = "PEFT loads it as it is, and export it as merged for anything else"
    """What to do, for a message."""


def starts_from_base(config: LoraConfig) -> bool:
    """Whether the adapter began with values taken out of the base's weights."""
    start = str(config.init_lora_weights).lower()
    return start.startswith(("pissa", "corda", "lora_ga")) or start in ("olora", "loftq")


BEYOND = (
    Beyond(words="DoRA", holds=lambda config, tensors: bool(config.use_dora) or _has(tensors, "lora_magnitude_vector")),
    Beyond(
        words="a bias beside B (lora_bias)",
        holds=lambda config, _: bool(config.lora_bias),
        instead="PEFT loads it as it is, and it can be exported as merged where each of its maps has a bias",
    ),
    Beyond(words="biases of the base model (bias)", holds=lambda config, _: config.bias != "none"),
    Beyond(words="whole modules (modules_to_save)", holds=lambda config, _: bool(config.modules_to_save)),
    Beyond(
        words="rows of the embeddings (trainable_token_indices)",
        holds=lambda config, tensors: bool(config.trainable_token_indices) or _has(tensors, "trainable_tokens"),
    ),
    Beyond(words="LoRA on the embeddings", holds=lambda _, tensors: _has(tensors, "lora_embedding_")),
    Beyond(
        words="layers used twice (layer_replication)",
        holds=lambda config, _: bool(config.layer_replication),
        instead="use it as it is, with PEFT",
    ),
    Beyond(
        words="a start that changed the base's weights (init_lora_weights: {init})",
        holds=lambda config, _: starts_from_base(config),
    ),
    Beyond(
        words="a variant of LoRA ({variant})",
        holds=lambda config, _: _variant(config) is not None,
        instead="use it as it is, with PEFT",
    ),
)  # fmt: skip
"""Checked in this order. A new kind of adapter is one entry."""
VARIANTS = (
    "alora_invocation_tokens", "use_qalora", "velora_config", "monteclora_config", "use_bdlora", "arrow_config",
    "kasa_config",
)  # fmt: skip
"""Fields of PEFT's configuration that replace scaling * B A by something else."""


def _has(tensors: Mapping[str, Tensor], part: str) -> bool:
    return any(part in key for key in tensors)


def _variant(config: LoraConfig) -> str | None:
    return next((name for name in VARIANTS if getattr(config, name, None)), None)


def beyond_factors(config: LoraConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """What in an adapter is more than A and B of linear maps, and what to do, as a sentence that begins with
    the adapter; None if nothing is."""
    for entry in BEYOND:
        if entry.holds(config, tensors):
            words = entry.words.format(init=config.init_lora_weights, variant=_variant(config))
            return f"holds {words}, which is more than A and B of linear maps; {entry.instead}"
    return None


def start_without_record(config: LoraConfig) -> str | None:
    """Why the base weights that the adapter was trained beside are unknown; None if they are known.

    PiSSA and OLoRA can be worked out from the base again. CorDA, LoRA-GA and LoftQ took data or choices that no file
    holds, and PiSSA's fast form drew random numbers.
    """
    start = str(config.init_lora_weights).lower()
    if start in ("corda", "lora_ga", "loftq") or start.startswith("pissa_niter_"):
        return (
            f"it began with init_lora_weights={config.init_lora_weights!r}, which changed the base's weights in a way "
            "that no file records; save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    return None
