"""Loads a model to train on in less memory: linear maps in 4 bits, and lower layers outside the device's memory."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig

from superexperts.adapters import lora
from superexperts.adapters.layer import linears
from superexperts.checkpoints.float8 import is_quantized
from superexperts.checkpoints.source import ModelSource
from superexperts.core.console import note
from superexperts.core.distributed import is_distributed
from superexperts.core.errors import ModelError, OptionError
from superexperts.models.decoder import decoder_layers, layer_number
from superexperts.models.loading import load_as_stored, load_model, load_structure, pick_device, settings_of

__all__ = ["load_to_train"]


def load_to_train(
    source: ModelSource,
    attach: Callable[[nn.Module], PeftModel],
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    offload: bool = False,
) -> nn.Module:
    """The model as `load_model` loads it, or in less memory.

    `load_in_4bit` holds linear maps outside the adapted layers in 4 bits. `offload` keeps the layers below the lowest
    adapted one in main memory, or in files below `folder` where there is no GPU. `attach` puts the adapter on a model;
    it is tried on one without weights, to find the adapted layers. `OptionError` if one of the two cannot be done.
    """
    if not load_in_4bit and not offload:
        return load_model(source, device=device, dtype=dtype)
    if is_quantized(settings_of(source)):
        raise OptionError(
            "the model is quantized already; leave it out", field="load_in_4bit" if load_in_4bit else "offload"
        )
    # The adapter is attached to an empty copy first: which layers it adapts decides how the real weights are loaded.
    structure = load_structure(source)
    attach(structure)
    paths = [path for path, module in structure.named_modules() if isinstance(module, LoraLayer)]
    paths = [path.removeprefix("base_model.model.") for path in paths]
    lora.detach(structure)
    try:
        layers = decoder_layers(structure, paths[0])
        adapted = {layer_number(structure, path) for path in paths}
    except ModelError as error:
        raise OptionError(
            f"the adapter is on {paths[0]}, outside the decoder's layers; leave it out",
            field="load_in_4bit" if load_in_4bit else "offload",
        ) from error
    prefix = next(path for path, module in structure.named_modules() if module is layers)
    to_run_on = pick_device(device)
    dtype = "float32" if dtype == "auto" and to_run_on.type == "cpu" else dtype
    more: dict[str, Any] = {}
    if load_in_4bit:
        skipped = [f"{prefix}.{layer}" for layer in adapted]
        more["quantization_config"] = _four_bits(structure, skipped, to_run_on)
    lowest = min(adapted) if offload else 0
    if offload:
        if not lowest:
            raise OptionError(
                "layer 0 carries an adapter, so no layer is below the lowest adapted one; leave it out", field="offload"
            )
        if is_distributed():
            raise OptionError(
                "works in one process only; for several use FSDP with offloaded parameters", field="offload"
            )
        more["offload_folder"] = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
    place = "disk" if to_run_on.type == "cpu" else "cpu"
    away = {f"{prefix}.{layer}": place for layer in range(lowest)}
    model = load_as_stored(source, dtype, device_map=_device_map(structure, away, to_run_on), **more)
    if away:
        where = "on disk" if place == "disk" else "in main memory"
        note(f"train: layers 0 to {lowest - 1} stay {where}; no gradient reaches them")
    return model


def require_bitsandbytes() -> None:
    """`OptionError` if bitsandbytes, which computes with 4-bit weights, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError("bitsandbytes is not installed; run pip install superexperts[4bit]", field="load_in_4bit")


def _four_bits(model: nn.Module, skipped: list[str], device: torch.device) -> BitsAndBytesConfig:
    require_bitsandbytes()
    head = next((name for name, module in model.named_modules() if module is _head(model)), "lm_head")
    kept = [re.escape(path) for path in (*skipped, head)]
    outside = {
        path: linear
        for path, linear in linears(model).items()
        if not any(re.match(rf"{pattern}(\.|$)", path) for pattern in kept)
    }
    unfit = [path for path, linear in outside.items() if device.type == "cpu" and not _fits_cpu(linear)]
    kept += [re.escape(path) for path in unfit]
    free = [path for path in outside if path not in unfit]
    if not free:
        raise OptionError(
            "no linear map of a suitable size lies outside the adapted layers (bitsandbytes has no 4 bits for experts "
            "held in one tensor); leave it out",
            field="load_in_4bit",
        )
    note(f"train: {len(free)} linear maps are held in 4 bits; experts, adapted layers and the head stay as they are")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        # NF4 with levels at normal quantiles is QLoRA's choice (arXiv 2305.14314).
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def _fits_cpu(linear: Any) -> bool:
    """Whether bitsandbytes' kernels for CPUs take a map of this size."""
    return bool(linear.in_features % 64 == 0 and linear.out_features % 32 == 0)


def _head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def _device_map(model: nn.Module, away: dict[str, str], device: torch.device) -> dict[str, Any]:
    """The place of every module, as Accelerate takes it: `away` for the modules in it, the device for all others."""
    if not away:
        return {"": device}
    elsewhere = device.index or 0 if device.type == "cuda" else device.type  # as Accelerate names devices
    places: dict[str, Any] = dict(away)

    def place(path: str, module: nn.Module) -> None:
        if path in away:
            return
        inside = [name for name in away if name.startswith(f"{path}.")] if path else list(away)
        if not inside:
            places[path] = elsewhere
            return
        for name, child in module.named_children():
            place(f"{path}.{name}" if path else name, child)

    place("", model)
    return places
