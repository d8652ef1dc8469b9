"""Writes an adapter as other programs load it: a merged checkpoint, PEFT's fused layout, or one key for each expert."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM

from superexperts.adapters import lora
from superexperts.adapters.factors import expert_names, injected_keys, read_factors, save_layout
from superexperts.adapters.formats import write_fused, write_per_expert
from superexperts.adapters.merge import merged_patches
from superexperts.checkpoints.provenance import Record, base_files, name_of
from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import ModelSource, adapter_folder, resolve
from superexperts.checkpoints.writer import Change, carry_along, patch_shards
from superexperts.core.config import identity
from superexperts.core.config_adapters import ExportConfig
from superexperts.core.console import note
from superexperts.core.errors import DataError, Field, ModelError, OptionError, OutputError
from superexperts.core.runs import completed, fingerprint, new_folder, read_json, write_manifest, write_text
from superexperts.models.key_mapping import KeyMapping
from superexperts.models.loading import load_as_stored, load_structure

__all__ = ["run"]

ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""


def run(config: ExportConfig) -> dict[str, Any]:
    """The command: checks the adapter against its model, writes it, and checks what was written."""
    started = time.monotonic()
    folder = adapter_folder(config.adapter)
    fields = lora.read_fields(folder, "adapter")
    checkpoint = _base(config, fields)
    base = checkpoint.folder
    if config.out.resolve() in (folder.resolve(), config.adapter.resolve(), base.resolve()):
        raise OutputError(f"{config.out} is what is to be exported; choose another folder", field="out")
    inputs = identity(config, model=checkpoint.fingerprint, adapter=fingerprint(folder))
    if completed(config.out, "export", inputs):
        note(f"export: {config.out} is up to date, nothing to do")
        return {"out": str(config.out), **read_json(config.out / "manifest.json", "manifest")["result"]}
    with new_folder(config.out, "export", synced=config.format != "merged") as temporary:
        if config.format == "merged":
            result = _merged(folder, checkpoint, config.copy, temporary)
        else:
            result = _adapter(config.format, folder, checkpoint, base, temporary)
        result = {"format": config.format, "model": checkpoint.name, **result}
        outputs = sorted(file.name for file in temporary.iterdir())
        write_manifest(temporary, "export", inputs, outputs, time.monotonic() - started, result=result)
    return {"out": str(config.out), **result}


def _base(config: ExportConfig, fields: dict[str, Any]) -> ModelSource:
    model = config.model or fields.get("base_model_name_or_path")
    if not model:
        raise OptionError(f"{config.adapter} names no base model; give its checkpoint", field="model")
    revision = config.revision if config.revision or config.model else fields.get("revision")
    return resolve(model, revision, trust_remote_code=config.trust_remote_code)


def _merged(adapter: Path, checkpoint: ModelSource, copy: bool, out: Path) -> dict[str, Any]:
    """The whole checkpoint, in its own dtype, with the adapter added to the weights; a standard one in every way.

    Only shards that hold a changed tensor are written; the model is loaded only where its checkpoint keeps what
    changes in an order that cannot be edited, or the adapter is more than A and B.
    """
    folder = checkpoint.folder
    with Checkpoint(folder) as base:
        model = load_structure(checkpoint)
        settings, _ = lora.read_adapter(adapter, "adapter")  # what is broken is so in memory, too
        lora.check_home(model, settings, adapter, "adapter")
        changes: Sequence[Change] = ()
        try:
            patches = merged_patches(model, KeyMapping(model, base), base, adapter, "adapter")
        except (DataError, ModelError) as error:
            note(f"export: not shard by shard, the model is loaded ({error})")
            _merged_in_memory(adapter, checkpoint, out)
            carry_along(folder, out, skip=sorted(file.name for file in out.iterdir()))
        else:
            changes = patch_shards(base, patches, out, copy=copy)
            carry_along(folder, out)
        Record(
            command="export",
            mode="merged",
            experts=(),
            model=name_of(checkpoint.name),
            revision=checkpoint.revision,
            files=base_files(base, folder),
            changes=tuple(changes),
        ).write(out)
    with Checkpoint(out) as written:
        return {"keys": len(written), "bytes": _size(out), "changed": len({change.key for change in changes})}


def _merged_in_memory(adapter: Path, checkpoint: ModelSource, out: Path) -> None:
    model = load_as_stored(checkpoint)
    adapted = lora.load_adapter(model, adapter, "adapter")
    # PEFT's safe merge rounds the change before it is added, and so rounds twice in bfloat16.
    merged = cast(Any, adapted).merge_and_unload()
    broken = [name for name, parameter in merged.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        raise DataError(
            f"{adapter} makes {broken[0]} not finite; train again with a lower ",
            Field("learning_rate"),
            field="adapter",
        )
    cast(AutoModelForCausalLM, merged).save_pretrained(out)


def _adapter(layout: str, adapter: Path, checkpoint: ModelSource, base: Path, out: Path) -> dict[str, Any]:
    """An adapter in another layout; the model's weights are not read."""
    model = load_structure(checkpoint)
    factors = read_factors(model, adapter, "adapter")
    config, tensors = (write_fused if layout == "peft" else write_per_expert)(model, factors)
    more: dict[str, Any] = {}
    if layout == "peft":
        # PEFT's own word for what this configuration needs, on a model without weights.
        lora.check_keys(
            injected_keys(load_structure(checkpoint), config),
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            out,
            "out",
        )
    else:
        # An engine takes keys that fit nothing without a word, so each must be a weight of the checkpoint.
        with Checkpoint(base) as checkpoint_tensors:
            stored = set(checkpoint_tensors)
        strangers = [
            name
            for key in tensors
            if (name := key.removeprefix("base_model.model.").rpartition(".lora_")[0]) + ".weight" not in stored
        ]
        if strangers:
            raise ModelError(
                f"{checkpoint.name} holds no weight {strangers[0]}; give the adapter's own model", field="model"
            )
        if config.r > ENGINE_RANKS[-1]:
            raise OptionError(f"'vllm' has ranks up to {ENGINE_RANKS[-1]}, not {config.r}; use merged", field="format")
        more["max_lora_rank"] = next(rank for rank in ENGINE_RANKS if rank >= config.r)
        if any(".kv_b_proj." in key for key in tensors):
            note("export: vLLM drops LoRA on kv_b_proj unless it runs with VLLM_MLA_DISABLE=1")
    save_layout(out, config, tensors, base=checkpoint.name, revision=checkpoint.revision)
    experts = expert_names(model, factors)
    what = ", ".join(experts) or "linear maps"
    write_text(
        out / "README.md",
        f"---\nlibrary_name: peft\ntags:\n- lora\n---\n\n# LoRA on {what} of {checkpoint.name}\n\n"
        f"In the layout that {'PEFT' if layout == 'peft' else 'vLLM'} loads; every other expert of the layers named "
        "is filled with zeros.\n",
    )
    return {"experts": experts, "keys": len(tensors), "r": config.r, **more, "bytes": _size(out)}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
