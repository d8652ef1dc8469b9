"""The command `restore`: undoes what superexperts.json records, after proving that the base is the original one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from superexperts.checkpoints.provenance import Record, base_files
from superexperts.checkpoints.reader import Checkpoint, Entry, as_bytes
from superexperts.checkpoints.source import ModelSource, resolve
from superexperts.checkpoints.writer import RECORD, Change, carry_along, digest_of, patch_shards
from superexperts.core.console import note, stdout
from superexperts.core.errors import DataError, Field, OutputError
from superexperts.core.runs import completed, fingerprint, new_folder, write_bytes, write_manifest
from superexperts.core.settings import Switch
from superexperts.core.types import ExpertSet
from superexperts.surgery.differences import THREADS, part, same_bytes

if TYPE_CHECKING:  # torch is not needed to undo mode `zero`, and takes seconds to import
    from torch import Tensor

__all__ = ["RestoreConfig", "run", "show"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """Undo the changes that superexperts.json records, and write the files of the base again, bit for bit.

    Example: superexperts restore runs/pruned --out runs/restored
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Checkpoint with a superexperts.json, as prune writes it."""
    base: str | None = None
    """The checkpoint it was made from; default: the one named in superexperts.json."""
    revision: str | None = None
    """Branch, tag or commit of the base on the Hub; default: the one named in superexperts.json."""
    out: Path = Path("runs/restored")
    """Folder to write."""
    copy: Switch = False
    """Copy the shards instead of linking to them (hard links, or symbolic ones into the Hub's cache)."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""
    overwrite: Switch = False
    """Replace a finished result of other settings or files in --out; the old one stays until the new one is whole."""
    json: Switch = False
    """Print the result as JSON."""


def run(config: RestoreConfig) -> dict[str, Any]:
    """Proves that the base is the one that the folder was made from, and writes the files of the base.

    The proof: headers and small files have the recorded hashes, and so have the bytes that were changed; every other
    byte is compared with the folder.
    """
    started = time.monotonic()
    record = Record.read(config.folder)
    # The recorded revision belongs to the recorded base, so it is not used with another one.
    given = config.base is not None or config.revision is not None
    base = resolve(
        config.base or record.model,
        config.revision if given else record.revision,
        trust_remote_code=config.trust_remote_code,
        field="base",
    )
    for taken, name in ((base.folder, "base"), (config.folder, "folder")):
        if config.out.resolve() == taken.resolve():
            raise OutputError(f"{config.out} is ", Field(name), " itself; choose another folder", field="out")
    inputs = {
        "model": base.fingerprint,
        "folder": fingerprint(config.folder),
        "options": {"copy": str(config.copy)},
    }
    result = {"out": str(config.out), "undone": record.mode, "experts": list(record.experts), "base": base.name}
    if completed(config.out, "restore", inputs, overwrite=config.overwrite):
        note(f"restore: {config.out} is up to date, nothing to do")
        return result
    with Checkpoint(base.folder, "base") as original, Checkpoint(config.folder, "folder") as edited:
        _check_base(record, original, edited, base)
        with new_folder(config.out, "restore", synced=False) as temporary:
            # The built-in model belongs to the installed package: a link to it would break with the next upgrade.
            patch_shards(original, [], temporary, copy=config.copy or base.name == "pocket")
            carry_along(base.folder, temporary)
            if (base.folder / RECORD).is_file():  # the base was itself made by editing
                write_bytes(temporary / RECORD, (base.folder / RECORD).read_bytes())
            outputs = sorted(file.name for file in temporary.iterdir())
            write_manifest(temporary, "restore", inputs, outputs, time.monotonic() - started)
    return result


def _check_base(record: Record, original: Checkpoint, edited: Checkpoint, base: ModelSource) -> None:
    """`DataError` unless the base is, bit for bit, the checkpoint that the edited folder was made from."""
    advice = ("give the checkpoint that the folder was made from as ", Field("base"))
    found = base_files(original, original.folder)
    for name in sorted(found.keys() | record.files.keys()):
        if found.get(name) != record.files.get(name):
            raise DataError(f"{name!a} of {base.name!a} is not the recorded file; ", *advice, field="base")
    for change in record.changes:
        entry = original.get(change.key)
        if entry is None or entry.file != change.file or not _within(entry, change) or (
            digest_of(original, part(entry, change.offset, change.bytes)) != change.sha256_before
        ):  # fmt: skip
            raise DataError(f"{change.key!a} of {base.name!a} differs from the record; ", *advice, field="base")
    if not record.changes:
        raise DataError(
            f"{edited.folder} was written from a loaded model, so unchanged bytes cannot be compared; use the base "
            "itself",
            field="folder",
        )
    pairs = _moved(record, original, edited, base) if record.mode == "remove" else _kept(record, original, edited)
    with ThreadPoolExecutor(THREADS) as workers:
        for key, same in workers.map(lambda pair: (pair[0], _same(original, edited, *pair[1:])), pairs):
            if not same:
                workers.shutdown(cancel_futures=True)
                raise DataError(
                    f"{edited.folder} and {base.name!a} differ in {key!a}, which prune did not change; one of the "
                    "two was edited since",
                    field="folder",
                )


def _within(entry: Entry, change: Change) -> bool:
    return entry.offset <= change.offset and change.offset + change.bytes <= entry.offset + entry.nbytes


Pair = tuple[str, "Entry | Tensor | None", Entry | None]
"""A key, a piece of it in the base, and the same piece in the edited checkpoint; None where one is missing."""


def _kept(record: Record, original: Checkpoint, edited: Checkpoint) -> Iterator[Pair]:
    """The unchanged pieces of the base, paired with the same places in the edited checkpoint."""
    for entry in original.values():
        position, end = entry.offset, entry.offset + entry.nbytes
        spans = sorted((change.offset, change.bytes) for change in record.changes if change.key == entry.key)
        # The gaps between the changed ranges are what must be equal; the last span closes the final gap.
        for offset, nbytes in [*spans, (end, 0)]:
            if offset > position or edited.get(entry.key) != entry:
                piece = part(entry, position, offset - position)
                yield entry.key, piece, piece if edited.get(entry.key) == entry else None
            position = offset + nbytes


def _moved(record: Record, original: Checkpoint, edited: Checkpoint, base: ModelSource) -> Iterator[Pair]:
    """The pieces of the base that stayed after `remove`, paired with their new places."""
    # Imported here, so that undoing mode `zero` does not wait for transformers.
    from superexperts.surgery.remove import plan_removal

    experts = ExpertSet.parse(",".join(record.experts)).experts
    removal = plan_removal(base, original, experts)
    for tensor in (tensor for tensors in removal.shards.values() for tensor in tensors):
        moved = edited.get(tensor.key)
        if moved is None or (moved.shape, moved.kind) != (tensor.shape, tensor.kind):
            yield tensor.key, None, None
            continue
        position = moved.offset
        for piece in tensor.pieces:
            yield tensor.key, piece, part(moved, position, piece.nbytes)
            position += piece.nbytes
    for entry in (entry for file in original.files if file not in removal.shards for entry in original.in_file(file)):
        yield entry.key, entry, entry if edited.get(entry.key) == entry else None


def _same(original: Checkpoint, edited: Checkpoint, one: Entry | Tensor | None, other: Entry | None) -> bool:
    if one is None or other is None:
        return False
    if isinstance(one, Entry):
        return same_bytes(original, edited, [one], [other])
    return as_bytes(one) == as_bytes(edited.read(other))


def show(result: dict[str, Any]) -> None:
    """Prints what was undone, and for which base."""
    stdout.print(f"undone: {result['undone']}; the files of {result['base']}", soft_wrap=True, markup=False)
    stdout.print(f"in {result['out']}", soft_wrap=True)
