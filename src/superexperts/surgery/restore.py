"""Undoes what superexperts.json records: the base's own files again, once it is proved that they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from superexperts.checkpoints.provenance import Record, base_files
from superexperts.checkpoints.reader import Checkpoint, Entry, as_bytes
from superexperts.checkpoints.source import ModelSource, resolve
from superexperts.checkpoints.writer import RECORD, Change, carry_along, digest_of, patch_shards
from superexperts.core.config_surgery import RestoreConfig
from superexperts.core.console import note
from superexperts.core.errors import DataError, Field, OutputError
from superexperts.core.runs import completed, fingerprint, new_folder, write_bytes, write_manifest
from superexperts.core.types import ExpertSet
from superexperts.surgery.differences import THREADS, part, same_bytes

if TYPE_CHECKING:  # as in `surgery`
    from torch import Tensor

__all__ = ["run"]


def run(config: RestoreConfig) -> dict[str, Any]:
    """The command: proves that the base is the one that the folder was made from, and writes its files.

    The proof: headers and small files have the recorded hashes, and so have the bytes that were changed; every other
    byte is compared with the folder's.
    """
    started = time.monotonic()
    record = Record.read(config.folder)
    own = config.base is not None or config.revision is not None
    base = resolve(
        config.base or record.model,
        config.revision if own else record.revision,
        trust_remote_code=config.trust_remote_code,
        field="base",
    )
    folder = base.folder
    for taken, name in ((folder, "the base"), (config.folder, "folder")):
        if config.out.resolve() == taken.resolve():
            raise OutputError(f"{config.out} is {name} itself; choose another folder", field="out")
    inputs = {
        "model": base.fingerprint,
        "folder": fingerprint(config.folder),
        "options": {"copy": str(config.copy)},
    }
    result = {"out": str(config.out), "undone": record.mode, "experts": list(record.experts), "base": base.name}
    if completed(config.out, "restore", inputs):
        note(f"restore: {config.out} is up to date, nothing to do")
        return result
    with Checkpoint(folder) as original, Checkpoint(config.folder) as edited:
        _check_base(record, original, edited, base)
        with new_folder(config.out, "restore", synced=False) as temporary:
            patch_shards(original, [], temporary, copy=config.copy or base.name == "pocket")
            carry_along(folder, temporary)
            if (folder / RECORD).is_file():  # the base was itself made by editing
                write_bytes(temporary / RECORD, (folder / RECORD).read_bytes())
            outputs = sorted(file.name for file in temporary.iterdir())
            write_manifest(temporary, "restore", inputs, outputs, time.monotonic() - started)
    return result


def _check_base(record: Record, original: Checkpoint, edited: Checkpoint, base: ModelSource) -> None:
    """`DataError` unless the base is bit for bit what the record's folder was made from."""
    advice = ("give the very checkpoint that it was made from as ", Field("base"))
    found = base_files(original, original.folder)
    for name in sorted(found.keys() | record.files.keys()):
        if found.get(name) != record.files.get(name):
            raise DataError(f"{name!a} of {base.name!a} is not the one that was changed; ", *advice, field="base")
    for change in record.changes:
        entry = original.get(change.key)
        if entry is None or entry.file != change.file or not _within(entry, change) or (
            digest_of(original, part(entry, change.offset, change.bytes)) != change.sha256_before
        ):  # fmt: skip
            raise DataError(f"{change.key!a} of {base.name!a} is not what it was; ", *advice, field="base")
    if not record.changes:
        raise DataError(
            (
                f"{edited.folder} was written from a loaded model, not from shards, so nothing tells what "
                "stayed; take the base itself"
            ),
            field="folder",
        )
    pairs = _moved(record, original, edited, base) if record.mode == "remove" else _kept(record, original, edited)
    with ThreadPoolExecutor(THREADS) as workers:
        for key, same in workers.map(lambda pair: (pair[0], _same(original, edited, *pair[1:])), pairs):
            if not same:
                workers.shutdown(cancel_futures=True)
                two = f"{edited.folder} and {base.name!a}"
                raise DataError(
                    f"{two} differ in {key!a}, which was not changed; one of the two was edited since", field="folder"
                )


def _within(entry: Entry, change: Change) -> bool:
    return entry.offset <= change.offset and change.offset + change.bytes <= entry.offset + entry.nbytes


Pair = tuple[str, "Entry | Tensor | None", Entry | None]
"""A key, a piece of the base under it, and where that is now; None where it is not."""


def _kept(record: Record, original: Checkpoint, edited: Checkpoint) -> Iterator[Pair]:
    """What of the base was not changed, with itself in the edited checkpoint, where it has the same place."""
    for entry in original.values():
        position, end = entry.offset, entry.offset + entry.nbytes
        spans = sorted((change.offset, change.bytes) for change in record.changes if change.key == entry.key)
        for offset, nbytes in [*spans, (end, 0)]:
            if offset > position or edited.get(entry.key) != entry:
                piece = part(entry, position, offset - position)
                yield entry.key, piece, piece if edited.get(entry.key) == entry else None
            position = offset + nbytes


def _moved(record: Record, original: Checkpoint, edited: Checkpoint, base: ModelSource) -> Iterator[Pair]:
    """The same where experts were removed: the pieces that stayed, and where they went."""
    from superexperts.surgery.remove import (
        plan_removal,  # here, so that what was only zeroed does not wait for transformers
    )

    experts = ExpertSet.parse(",".join(record.experts)).experts
    removal = plan_removal(base, original, experts)
    for tensor in (tensor for tensors in removal.shards.values() for tensor in tensors):
        there = edited.get(tensor.key)
        if there is None or (there.shape, there.kind) != (tensor.shape, tensor.kind):
            yield tensor.key, None, None
            continue
        position = there.offset
        for piece in tensor.pieces:
            yield tensor.key, piece, part(there, position, piece.nbytes)
            position += piece.nbytes
    for entry in (entry for file in original.files if file not in removal.shards for entry in original.in_file(file)):
        yield entry.key, entry, entry if edited.get(entry.key) == entry else None


def _same(original: Checkpoint, edited: Checkpoint, one: Entry | Tensor | None, other: Entry | None) -> bool:
    if one is None or other is None:
        return False
    if isinstance(one, Entry):
        return same_bytes(original, edited, [one], [other])
    return as_bytes(one) == as_bytes(edited.read(other))
