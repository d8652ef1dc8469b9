"""Prunes experts on a checkpoint's shards alone: silent (as in arXiv 2507.23279), constant, or gone.

Modules that need transformers are imported where they are used: for zeros in an ordinary checkpoint nothing has to wait
for it, nor for torch.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superexperts.checkpoints.provenance import Record, base_files, name_of
from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.source import resolve
from superexperts.checkpoints.writer import Change, Patch, Zeros, carry_along, patch_shards, rewrite_shards
from superexperts.core.config import PruneConfig, identity
from superexperts.core.console import note
from superexperts.core.errors import Field, ModelError, OutputError
from superexperts.core.runs import completed, new_folder, write_manifest, write_text
from superexperts.core.types import ExpertKey, chosen_experts, key_name
from superexperts.surgery import locate_by_shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["run"]


def run(config: PruneConfig) -> dict[str, Any]:
    """The command: finds the experts' bytes, writes a checkpoint in which they are others or gone, and a record.

    No model is loaded (`mean` runs one, a layer at a time), and everything else goes along as it is.
    """
    started = time.monotonic()
    chosen = chosen_experts(config.experts, config.model)
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    folder = source.folder
    if config.out.resolve().is_relative_to(folder.resolve()):
        raise OutputError(f"{config.out} is ", Field("model"), " itself or in it; choose another folder", field="out")
    inputs = identity(config, model=source.fingerprint, experts=chosen.experts)
    ids_SL: Tensor | None = None
    if config.mode == "mean":
        from superexperts.data.corpora import digest_ids
        from superexperts.surgery.locate import check_biases
        from superexperts.surgery.mean import sequences

        check_biases(source, chosen.experts)
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
    from superexperts.surgery.remove import plan_removal

    removal = plan_removal(
        resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code), base, experts
    )
    rewrite_shards(base, removal.shards, out, copy=config.copy)
    carry_along(base.folder, out, skip=["config.json"])
    # Not `write_json`: some families have an Infinity here, which transformers writes and reads.
    write_text(out / "config.json", json.dumps(removal.settings, ensure_ascii=False, indent=2) + "\n")
    return removal.changes


def _patched(
    config: PruneConfig, base: Checkpoint, experts: Sequence[ExpertKey], out: Path, ids_SL: Tensor | None
) -> Sequence[Change]:
    """Zeros, or the experts' means over sequences where there are some."""
    found = None
    if config.mode == "zero" and not config.trust_remote_code:  # code of the checkpoint's own may mean anything
        found = locate_by_shape.find(base, experts)
    if found is None:
        from superexperts.surgery.locate import find

        found = find(config, base, experts)
    if found is None and config.mode == "zero":
        return _in_memory(config, base, experts, out)
    if found is None:
        raise ModelError(
            "'mean' edits shards, but these keep the experts in another order; use ",
            Field("mode"),
            " zero",
            field="mode",
        )
    constants = {} if ids_SL is None else _constants(config, base, ids_SL, found)
    patches: list[Patch | Zeros] = [Zeros(entry=down.weight) for down in found]
    for down in found:
        if down.bias is not None:
            mean_D = constants.get(down.expert)
            rounded = None if mean_D is None else functools.partial(_rounded, mean_D, down.bias)
            patches.append(Zeros(entry=down.bias) if rounded is None else Patch(entry=down.bias, data=rounded))
    changes = patch_shards(base, patches, out, copy=config.copy)
    carry_along(base.folder, out)
    return changes


def _rounded(value: Tensor, entry: Entry) -> Tensor:
    return value.to(entry.dtype)


def _in_memory(config: PruneConfig, base: Checkpoint, experts: Sequence[ExpertKey], out: Path) -> Sequence[Change]:
    """The way for checkpoints whose layout only transformers' conversion undoes: the whole model, loaded and saved."""
    from superexperts.models.banks import zero_experts
    from superexperts.models.loading import load_as_stored

    note("prune: this checkpoint keeps the experts in an order that cannot be edited in place; the model is loaded")
    model: Any = load_as_stored(resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code))
    zero_experts(model, experts)
    model.save_pretrained(out)
    carry_along(base.folder, out, skip=sorted(file.name for file in out.iterdir()))
    return ()


def _constants(
    config: PruneConfig, base: Checkpoint, ids_SL: Tensor, found: Sequence[locate_by_shape.Down]
) -> dict[ExpertKey, Tensor]:
    """Each expert's mean output over the corpus [D]."""
    from superexperts.surgery.mean import means

    return means(config, base, ids_SL, [down.expert for down in found])
