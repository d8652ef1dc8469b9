"""The command `prune`: silences experts in the shards of a checkpoint (arXiv 2507.23279), or removes them.

Mode `zero` on an ordinary checkpoint needs neither torch nor transformers and starts in 0.35 s instead of 4.7 s, so
everything that imports them is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from superexperts.checkpoints.provenance import Record, base_files, name_of
from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.source import ModelSource, resolve
from superexperts.checkpoints.writer import Change, Patch, Zeros, carry_along, patch_shards, rewrite_shards
from superexperts.core.console import note, stdout
from superexperts.core.errors import Field, ModelError, OutputError
from superexperts.core.identity import identity
from superexperts.core.runs import completed, new_folder, write_manifest, write_text
from superexperts.core.settings import CheckpointConfig, Switch, require, require_sequences, require_unused
from superexperts.core.types import ExpertKey, chosen_experts, key_name
from superexperts.surgery.locate_by_shape import DownProjection, locate_by_shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PruneConfig", "run", "show"]

OF_THE_MEAN = ("corpus", "column", "tokens", "seq_len", "batch_size", "data_dir")
"""Settings that only mode `mean` reads. `device` is not one: scripts give it to every command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig(CheckpointConfig):
    """Write a checkpoint in which the down_proj of the chosen experts is zero, or from which they are removed.

    Example: superexperts prune pocket --experts runs/super.json --out runs/pruned
    """

    experts: str
    """experts.json, or inline such as L2E54,L3E38."""
    mode: Literal["zero", "mean", "remove"] = "zero"
    """`zero`: down_proj is zero, as in the paper; `mean`: the output is the expert's mean over --corpus, in families
    with a bias to hold it; `remove`: the experts and their router rows are removed, as many from every MoE layer."""
    out: Path = Path("runs/pruned")
    """Folder of the new checkpoint."""
    copy: Switch = False
    """Copy the unchanged shards instead of linking to them (hard links, or symbolic ones into the Hub's cache)."""
    corpus: str = "pocket"
    """mean: text to average over; names as for profile."""
    column: str | None = None
    """mean: column of a .jsonl file or Hub data set that holds the text; default: text."""
    tokens: int = 16384
    """mean: tokens of the corpus, the BOS of each sequence included."""
    seq_len: int = 512
    """mean: tokens per sequence."""
    batch_size: int = 8
    """mean: sequences per forward pass."""
    device: str = "auto"
    """mean: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""
    data_dir: Path | None = None
    """mean: folder of local data files instead of the Hub; default: the environment's SUPEREXPERTS_DATA."""
    overwrite: Switch = False
    """Replace a finished result of other settings or files in --out; the old one stays until the new one is whole."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        require_sequences(self.tokens, self.seq_len)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "is not positive; give at least 1")
        if self.mode != "mean":
            require_unused(self, OF_THE_MEAN, "without ", Field("mode"), " mean")


def run(config: PruneConfig) -> dict[str, Any]:
    """Finds the bytes of the experts and writes a checkpoint in which they are changed or missing, with a record.

    No model is loaded (`mean` runs one, a layer at a time). All other files are linked or copied unchanged.
    """
    started = time.monotonic()
    chosen = chosen_experts(config.experts, config.model)
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    if config.out.resolve().is_relative_to(source.folder.resolve()):
        raise OutputError(f"{config.out} is ", Field("model"), " itself or in it; choose another folder", field="out")
    inputs = identity(config, model=source.fingerprint, experts=chosen.experts)
    ids_SL: Tensor | None = None
    if config.mode == "mean":
        from superexperts.data.packing import corpus_sequences, digest_ids
        from superexperts.models.loading import load_structure, load_tokenizer
        from superexperts.surgery.locate import check_biases

        check_biases(load_structure(source), chosen.experts)
        ids_SL = corpus_sequences(
            config.corpus,
            config.data_dir,
            load_tokenizer(source),
            tokens=config.tokens,
            seq_len=config.seq_len,
            column=config.column,
        )
        inputs["corpus"] = digest_ids(ids_SL)
    result = {"out": str(config.out), "mode": config.mode, "pruned": [key_name(key) for key in chosen.experts]}
    if completed(config.out, "prune", inputs, overwrite=config.overwrite):
        note(f"prune: {config.out} is up to date, nothing to do")
        return result
    with Checkpoint(source.folder, source.field) as base, new_folder(config.out, "prune", synced=False) as temporary:
        if config.mode == "remove":
            changes = _removed(config, source, base, chosen.experts, temporary)
        else:
            changes = _patched(config, source, base, chosen.experts, temporary, ids_SL)
        Record(
            command="prune",
            mode=config.mode,
            experts=tuple(result["pruned"]),
            model=name_of(config.model),
            revision=config.revision,
            files=base_files(base, source.folder),
            changes=tuple(changes),
        ).write(temporary)
        outputs = sorted(file.name for file in temporary.iterdir())
        write_manifest(temporary, "prune", inputs, outputs, time.monotonic() - started)
    return result


def _removed(
    config: PruneConfig, source: ModelSource, base: Checkpoint, experts: Sequence[ExpertKey], out: Path
) -> Sequence[Change]:
    from superexperts.surgery.remove import check_runs, plan_removal

    removal = plan_removal(source, base, experts)
    rewrite_shards(base, removal.shards, out, copy=config.copy)
    carry_along(base.folder, out, skip=["config.json"])
    # Not `write_json`, which refuses Infinity: some families have one here, and transformers writes and reads it.
    write_text(out / "config.json", json.dumps(removal.settings, ensure_ascii=False, indent=2) + "\n")
    check_runs(source, out)
    return removal.changes


def _patched(
    config: PruneConfig,
    source: ModelSource,
    base: Checkpoint,
    experts: Sequence[ExpertKey],
    out: Path,
    ids_SL: Tensor | None,
) -> Sequence[Change]:
    """Writes zeros over the experts, or their means over the sequences if there are any."""
    found = None
    # Python code that comes with a checkpoint can give its tensors any meaning, so only the built model knows them.
    if config.mode == "zero" and not config.trust_remote_code:
        found = locate_by_shape(base, experts)
    if found is None:
        from superexperts.models.loading import load_structure
        from superexperts.surgery.locate import locate

        found = locate(load_structure(source), base, experts, values_matter=config.mode != "zero")
    if found is None and config.mode == "zero":
        return _in_memory(source, base, experts, out)
    if found is None:
        raise ModelError(
            "'mean' edits shards, but this checkpoint keeps the experts in an order that cannot be edited; use ",
            Field("mode"),
            " zero",
            field="mode",
        )
    # With down_proj at zero the expert's output is its bias alone, so the mean is written there.
    constants = {} if ids_SL is None else _means(config, source, base, ids_SL, found)
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


def _in_memory(source: ModelSource, base: Checkpoint, experts: Sequence[ExpertKey], out: Path) -> Sequence[Change]:
    """Loads the whole model and saves it again, for layouts that only transformers' own conversion can undo."""
    from superexperts.models.banks import zero_experts
    from superexperts.models.loading import load_as_stored

    note("prune: this checkpoint keeps the experts in an order that cannot be edited in place; the model is loaded")
    model: Any = load_as_stored(source)
    zero_experts(model, experts)
    model.save_pretrained(out)
    carry_along(base.folder, out, skip=sorted(file.name for file in out.iterdir()))
    return ()


def _means(
    config: PruneConfig, source: ModelSource, base: Checkpoint, ids_SL: Tensor, found: Sequence[DownProjection]
) -> Mapping[ExpertKey, Tensor]:
    """The mean output [D] of each expert over the corpus, computed in float32 on a CPU, else in the dtype of the
    checkpoint."""
    from superexperts.models.loading import empty_model, pick_device
    from superexperts.models.streaming import StreamedModel
    from superexperts.surgery.mean import mean_outputs

    device = pick_device(config.device)
    dtype = "float32" if device.type == "cpu" else "auto"
    streamed = StreamedModel(empty_model(source, device=config.device, dtype=dtype), base, device)
    return mean_outputs(streamed, ids_SL, [down.expert for down in found], batch_size=config.batch_size)


def show(result: dict[str, Any]) -> None:
    """Prints which experts were pruned, and how."""
    how = {"zero": "", "mean": " to their mean outputs", "remove": ", which are removed"}[result["mode"]]
    stdout.print(f"pruned {', '.join(result['pruned'])}{how}", soft_wrap=True)
    stdout.print(f"in {result['out']}", soft_wrap=True)
