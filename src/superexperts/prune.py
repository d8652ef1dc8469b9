"""Prunes experts on a checkpoint's shards alone: silent (as in arXiv 2507.23279), constant, or gone."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from . import moe
from .artifacts import ExpertKey, key_name
from .bank import DOWN
from .checkpoint import Checkpoint, Entry
from .config import PruneConfig, identity
from .console import note
from .errors import ModelError, OutputError
from .folders import checkpoint_folder
from .homes import BLOCKS, Homes
from .model import (
    chosen_experts,
    load_as_stored,
    load_structure,
    settings_of,
)
from .record import Record, base_files, name_of
from .remove import plan_removal
from .rundir import completed, fingerprint, new_folder, write_manifest, write_text
from .surgery import Change, Patch, carry_along, patch_shards, rewrite_shards

__all__ = ["Down", "downs", "run"]


def run(config: PruneConfig) -> dict[str, Any]:
    """The command: finds the experts' bytes, writes a checkpoint in which they are others or gone, and a record.

    No model is loaded (`mean` runs one, a layer at a time), and everything else goes along as it is.
    """
    started = time.monotonic()
    chosen = chosen_experts(config.experts, config.model)
    folder = checkpoint_folder(config.model, config.revision)
    if config.out.resolve() == folder.resolve():
        raise OutputError(f"--out: {config.out} is MODEL itself; choose another folder")
    inputs = identity(config, model=fingerprint(folder), experts=chosen.experts)
    ids_SL: Tensor | None = None
    if config.mode == "mean":
        _check_biases(config, folder, chosen.experts)
        from .corpora import digest_ids  # here, so that the other modes do not wait for what reads corpora
        from .mean import sequences

        ids_SL = sequences(config)
        inputs["corpus"] = digest_ids(ids_SL)
    result = {"out": str(config.out), "mode": config.mode, "pruned": [key_name(key) for key in chosen.experts]}
    if completed(config.out, "prune", inputs):
        note(f"prune: {config.out} is up to date, nothing to do")
        return result
    with Checkpoint(folder) as base, new_folder(config.out, "prune", synced=False) as temporary:
        if config.mode == "remove":
            changes = _removed(config, base, chosen.experts, temporary)
        else:
            changes = _patched(config, base, chosen.experts, temporary, ids_SL)
        Record(
            command="prune",
            mode=config.mode,
            experts=tuple(result["pruned"]),
            model=name_of(config.model),
            revision=config.revision,
            files=base_files(base, folder),
            changes=tuple(changes),
        ).write(temporary)
        outputs = sorted(file.name for file in temporary.iterdir())
        write_manifest(temporary, "prune", inputs, outputs, time.monotonic() - started)
    return result


def _removed(config: PruneConfig, base: Checkpoint, experts: Sequence[ExpertKey], out: Path) -> Sequence[Change]:
    removal = plan_removal(config, base, experts)
    rewrite_shards(base, removal.shards, out, copy=config.copy)
    carry_along(base.folder, out, skip=["config.json"])
    # Not `write_json`: some families have an Infinity here, which transformers writes and reads.
    write_text(out / "config.json", json.dumps(removal.settings, ensure_ascii=False, indent=2) + "\n")
    return removal.changes


def _patched(
    config: PruneConfig, base: Checkpoint, experts: Sequence[ExpertKey], out: Path, ids_SL: Tensor | None
) -> Sequence[Change]:
    """Zeros, or the experts' means over sequences where there are some."""
    model = load_structure(config)
    banks = moe.find_banks(model)
    moe.check_experts(banks, experts)
    homes = Homes(model, base)
    homes.check_complete(model)
    if homes.quantized and config.mode != "zero":
        raise ModelError(f"--mode: {config.mode!r} needs weights that are not quantized; use --mode zero")
    found = downs(model, homes, experts)
    if found is None and config.mode == "zero":
        if homes.quantized:
            raise ModelError(f"MODEL: {config.model!r} is quantized in a layout that cannot be edited; use bfloat16")
        return _in_memory(config, base, experts, out)
    if found is None:
        raise ModelError("--mode: 'mean' edits shards, but these keep the experts in another order; use --mode zero")
    constants = {} if ids_SL is None else _constants(config, base, ids_SL, found)
    patches = [
        Patch(entry=entry, data=functools.partial(_constant, entry, constants.get(down.expert) if is_bias else None))
        for down in found
        for entry, is_bias in ((down.weight, False), (down.bias, True))
        if entry is not None
    ]
    changes = patch_shards(base, patches, out, copy=config.copy)
    carry_along(base.folder, out)
    return changes


def _constant(entry: Entry, value: Tensor | None) -> Tensor:
    """What replaces an entry: zeros, or a value rounded to its dtype."""
    return torch.zeros((), dtype=entry.dtype).expand(entry.shape) if value is None else value.to(entry.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Down:
    """Where a checkpoint holds one expert's down_proj."""

    expert: ExpertKey
    weight: Entry
    bias: Entry | None
    """None in families without one."""


def downs(model: nn.Module, homes: Homes, experts: Sequence[ExpertKey]) -> list[Down] | None:
    """Each expert's down_proj; None where the checkpoint's layout lets one not be edited without the others."""
    banks = {bank.layer: bank for bank in moe.find_banks(model)}
    paths = {module: path for path, module in model.named_modules()}
    found = []
    for layer, expert in experts:
        bank = banks[layer]
        bias: Entry | None = None
        if expert == "shared":
            assert bank.shared_down is not None
            path, has_bias = paths[bank.shared_down], bank.shared_down.bias is not None
            weight, bias = homes.whole(f"{path}.weight"), homes.whole(f"{path}.bias") if has_bias else None
        else:
            has_bias = cast(Any, bank.module).has_bias
            weights = homes.expert_parts(bank, DOWN) or homes.expert_parts(bank, f"{DOWN}{BLOCKS}")
            biases = homes.expert_parts(bank, f"{DOWN}_bias") if has_bias else None
            (weight,) = (None,) if weights is None else weights[expert]
            (bias,) = (None,) if biases is None else biases[expert]
        if weight is None or (has_bias and bias is None):
            return None
        found.append(Down(expert=(layer, expert), weight=weight, bias=bias))
    return found


def _in_memory(config: PruneConfig, base: Checkpoint, experts: Sequence[ExpertKey], out: Path) -> Sequence[Change]:
    """The way for checkpoints whose layout only transformers' conversion undoes: the whole model, loaded and saved."""
    note("prune: this checkpoint keeps the experts in an order that cannot be edited in place; the model is loaded")
    model = load_as_stored(config)
    moe.zero_experts(model, experts)
    cast(AutoModelForCausalLM, model).save_pretrained(out)
    carry_along(base.folder, out, skip=sorted(file.name for file in out.iterdir()))
    return ()


# ---- the mean -----------------------------------------------------------------------------------------------------


def _check_biases(config: PruneConfig, folder: Path, experts: Sequence[ExpertKey]) -> None:
    """`ModelError` in families that have no place for a mean."""
    banks = moe.find_banks(load_structure(config))
    moe.check_experts(banks, experts)
    for layer, expert in experts:
        bank = next(bank for bank in banks if bank.layer == layer)
        shared = bank.shared_down is not None and bank.shared_down.bias is not None
        if not (shared if expert == "shared" else cast(Any, bank.module).has_bias):
            family = settings_of(config, folder).get_text_config().model_type
            raise ModelError(
                f"--mode: 'mean' needs a bias of down_proj to hold the mean, which {family} does not have for "
                f"{key_name((layer, expert))}; use zero or remove"
            )


def _constants(config: PruneConfig, base: Checkpoint, ids_SL: Tensor, found: Sequence[Down]) -> dict[ExpertKey, Tensor]:
    """Each expert's mean output over the corpus [D]."""
    from .mean import means

    return means(config, base, ids_SL, [down.expert for down in found])
