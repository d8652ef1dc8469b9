"""Writes a checkpoint that differs from another in chosen places, shard by shard, without a model.

A shard without a change is a second name of the base's file, a changed one is copied by the kernel and edited in the
copy. The base is only ever opened for reading.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Ge

from superexperts.checkpoints.reader import INDEX, KINDS, PIECE, Checkpoint, Entry, as_bytes
from superexperts.core.console import note, progress
from superexperts.core.errors import ModelError, OutputError
from superexperts.core.runs import MANIFEST, write_bytes, write_text

if TYPE_CHECKING:  # torch takes 2 s to import, for which zeros do not wait
    from torch import Tensor

__all__ = ["RECORD", "Change", "NewTensor", "Patch", "Zeros", "carry_along", "link", "patch_shards", "rewrite_shards"]

T = TypeVar("T")

RECORD = "superexperts.json"
"""What was changed, beside the result."""

WEIGHT_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl", ".npz", ".index.json",
)  # fmt: skip
"""Endings of files that hold weights or list them. They are not copied along: they would hold the old values."""

FICLONE = 0x40049409
"""ioctl that shares a file's blocks until one of the two is written to (linux/fs.h)."""
AT_ONCE = 2
"""Shards written at the same time: while one waits for the disk, another is copied."""
BLOCK = 2**23


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
    """New contents of one entry of the base, or of a row of one."""

    entry: Entry
    data: Callable[[], Tensor]
    """Returns the new tensor, in the entry's shape and dtype; called only when the shard is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zeros:
    """A patch that writes zeros."""

    entry: Entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor of a rewritten shard."""

    key: str
    kind: str
    """As `Entry.kind`."""
    shape: tuple[int, ...]
    pieces: tuple[Entry | Tensor, ...]
    """What it is made of, one after the other: entries of the base, or slices of them, and new tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A range of bytes of the base that the result changes or leaves out."""

    key: str
    file: str
    offset: Annotated[int, Ge(0)]
    bytes: Annotated[int, Ge(0)]
    sha256_before: str
    sha256_after: str | None
    """None where they were taken out."""


# ---- shards -------------------------------------------------------------------------------------------------------


def patch_shards(base: Checkpoint, patches: Sequence[Patch | Zeros], out: Path, *, copy: bool) -> list[Change]:
    """Writes all of the base's shards and its index into a folder, each patch's bytes replaced.

    Shards without a patch are linked, or with `copy` copied. `OutputError` where there is no room.
    """
    by_file: dict[str, list[Patch | Zeros]] = {}
    for patch in patches:
        by_file.setdefault(patch.entry.file, []).append(patch)
    rest = [file for file in base.files if file not in by_file]
    linked = not copy and _can_link(base.folder, rest, out)
    check_room(base, out, sum(base.size(file) for file in (by_file if linked else base.files)))

    def patched(file: str) -> list[Change]:
        with _new_file(out / file) as target:
            _clone(base, file, target)
            return [_patch(base, patch, target) for patch in by_file[file]]

    with _disk_errors(out), ThreadPoolExecutor(AT_ONCE) as workers:
        jobs = [workers.submit(patched, file) for file in by_file]
        try:
            for file in rest:
                link(base.folder / file, out / file, copy=not linked)
            if (base.folder / INDEX).is_file():
                write_bytes(out / INDEX, (base.folder / INDEX).read_bytes())
            return [change for changes in _waited(jobs) for change in changes]
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _waited(jobs: Sequence[Future[T]]) -> Iterator[T]:
    """Each shard's result, once it is written."""
    with progress("writing shards", len(jobs)) as bar:
        for job in jobs:
            yield job.result()
            bar()


def _patch(base: Checkpoint, patch: Patch | Zeros, target: int) -> Change:
    entry = patch.entry
    # The hash of the old bytes lets `restore` prove later that it was given the same base.
    before, after, position = digest_of(base, entry), hashlib.sha256(), entry.offset
    for data in _new_bytes(patch):
        after.update(data)
        position = _write(target, data, position)
    return Change(
        key=entry.key,
        file=entry.file,
        offset=entry.offset,
        bytes=entry.nbytes,
        sha256_before=before,
        sha256_after=after.hexdigest(),
    )


def _new_bytes(patch: Patch | Zeros) -> Iterator[memoryview]:
    """What a patch writes, piece by piece."""
    entry = patch.entry
    if isinstance(patch, Zeros):
        zeros = memoryview(bytes(min(PIECE, entry.nbytes)))
        for start in range(0, entry.nbytes, PIECE):
            yield zeros[: entry.nbytes - start]
        return
    tensor = patch.data()
    assert (tensor.shape, tensor.dtype) == (entry.shape, entry.dtype)
    rows = max(1, len(tensor) * PIECE // max(1, entry.nbytes))
    for start in range(0, len(tensor), rows):
        yield as_bytes(tensor[start : start + rows])


def rewrite_shards(base: Checkpoint, shards: Mapping[str, Sequence[NewTensor]], out: Path, *, copy: bool) -> None:
    """Writes shards anew, and links the base's others; the index, where the base has one, names what is there.

    A shard without a tensor is left out.
    """
    rest = [file for file in base.files if file not in shards]
    linked = not copy and _can_link(base.folder, rest, out)
    sizes = {file: sum(_nbytes(tensor) for tensor in tensors) for file, tensors in shards.items()}
    check_room(base, out, sum(sizes.values()) + sum(0 if linked else base.size(file) for file in rest))

    def rewritten(file: str) -> None:
        with _new_file(out / file) as target:
            position = _write(target, _header(shards[file], base.metadata[file]), 0)
            for piece in (piece for tensor in shards[file] for piece in tensor.pieces):
                if isinstance(piece, Entry):
                    copy_range(base.descriptor(piece.file), piece.offset, target, position, piece.nbytes)
                    position += piece.nbytes
                else:
                    position = _write(target, as_bytes(piece), position)

    with _disk_errors(out), ThreadPoolExecutor(AT_ONCE) as workers:
        jobs = [workers.submit(rewritten, file) for file, tensors in shards.items() if tensors]
        try:
            for file in rest:
                link(base.folder / file, out / file, copy=not linked)
            if (base.folder / INDEX).is_file():
                _write_index(base, shards, rest, out)
            list(_waited(jobs))
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _nbytes(tensor: NewTensor) -> int:
    return sum(piece.nbytes for piece in tensor.pieces)


def _header(tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a shard, with its length before it; filled up with spaces so that the tensors begin aligned."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + _nbytes(tensor)
        header[tensor.key] = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_index(base: Checkpoint, shards: Mapping[str, Sequence[NewTensor]], rest: Iterable[str], out: Path) -> None:
    index = json.loads((base.folder / INDEX).read_bytes())
    weight_map = {tensor.key: file for file, tensors in shards.items() for tensor in tensors}
    kept = [entry for file in rest for entry in base.in_file(file)]
    weight_map |= {entry.key: entry.file for entry in kept}
    index["weight_map"] = dict(sorted(weight_map.items()))
    if isinstance(index.get("metadata"), dict):
        sizes = [(tensor.kind, _nbytes(tensor)) for tensors in shards.values() for tensor in tensors]
        sizes += [(entry.kind, entry.nbytes) for entry in kept]
        if "total_size" in index["metadata"]:
            index["metadata"]["total_size"] = sum(nbytes for _, nbytes in sizes)
        if "total_parameters" in index["metadata"]:
            index["metadata"]["total_parameters"] = sum(nbytes // KINDS[kind][1] for kind, nbytes in sizes)
    # Not `write_json`: its metadata may hold anything that was read, such as a NaN.
    write_text(out / INDEX, json.dumps(index, ensure_ascii=False, indent=2) + "\n")


# ---- files --------------------------------------------------------------------------------------------------------


def carry_along(base: Path, out: Path, skip: Sequence[str] = ()) -> list[str]:
    """Copies what belongs to a checkpoint beside its weights (configuration, tokenizer, templates, code, licence) and
    returns the names; `skip` names what the caller writes itself."""
    names = []
    with _disk_errors(out):
        for file in side_files(base):
            name = str(file.relative_to(base))
            if name not in skip:
                (out / name).parent.mkdir(exist_ok=True)
                link(file, out / name, copy=True)
                names.append(name)
    return names


def side_files(base: Path) -> list[Path]:
    """The files of a checkpoint folder except weights and this package's own records."""
    found = [file for file in base.iterdir() if file.is_file()]
    templates = base / "additional_chat_templates"  # transformers' folder for more than one
    found += [file for file in templates.iterdir() if file.is_file()] if templates.is_dir() else []
    left = (MANIFEST, RECORD, "adapter_config.json")  # ours, and what says that weights of an adapter are there
    return sorted(
        file
        for file in found
        if not file.name.startswith(".") and file.name not in left and not file.name.endswith(WEIGHT_FILES)
    )


def link(source: Path, target: Path, *, copy: bool) -> None:
    """Gives a file a second name. A hard link; for a symbolic link, as in the Hub's cache, another symbolic link, so
    that cleaning the cache still frees the space. With `copy`, a copy."""
    if copy:
        with source.open("rb") as opened, _new_file(target) as written:
            _clone_file(opened.fileno(), written)
    elif source.is_symlink():
        target.symlink_to(source.resolve())
    else:
        os.link(source, target)


def _can_link(folder: Path, files: Sequence[str], out: Path) -> bool:
    """Whether a hard link from one folder to the other works, found out by making one."""
    regular = next((folder / file for file in files if not (folder / file).is_symlink()), None)
    if regular is None:
        return True
    probe = out / ".link"
    try:
        os.link(regular, probe)
    except OSError as error:
        note(f"out: no hard links from {folder} ({error.strerror}); unchanged shards are copied")
        return False
    probe.unlink()
    return True


def check_room(base: Checkpoint, out: Path, weights: int) -> None:
    """`OutputError` unless so many bytes of weights, and what goes along with them, have room where a folder is."""
    needed = weights + sum(file.stat().st_size for file in side_files(base.folder))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OutputError(
            (
                f"{needed / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free; make "
                "room or choose another disk"
            ),
            field="out",
        )


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """What the system says of reading and writing, in one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write to {out.parent} ({error.strerror or error}); make room or choose another disk", field="out"
        ) from error


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """Creates a file and opens it. O_EXCL: writing to an existing hard link would change the base."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _clone(base: Checkpoint, file: str, target: int) -> None:
    _clone_file(base.descriptor(file), target)


def _clone_file(source: int, target: int) -> None:
    """Copies a file without its bytes passing through this process: by sharing blocks where the file system can."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(target, FICLONE, source)
        return
    copy_range(source, 0, target, 0, os.fstat(source).st_size)


def copy_range(source: int, offset: int, target: int, position: int, count: int) -> None:
    """Copies bytes from one open file to another in the kernel, or where it cannot, through a buffer."""
    by_kernel = True
    while count:
        done = 0
        if by_kernel:
            try:
                done = os.copy_file_range(source, target, count, offset, position)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                by_kernel = False
        if not by_kernel:
            data = os.pread(source, min(count, BLOCK), offset)
            done = _write(target, data, position) - position
        if not done:
            raise ModelError("a shard became shorter while it was copied; leave it alone meanwhile", field="model")
        offset, position, count = offset + done, position + done, count - done


def _write(target: int, data: Any, position: int) -> int:
    """Writes all of the bytes; returns the position after them."""
    left = memoryview(data)
    while left:
        done = os.pwrite(target, left, position)
        left, position = left[done:], position + done
    return position


def digest_of(checkpoint: Checkpoint, entry: Entry) -> str:
    """SHA-256 of an entry's bytes, read a piece at a time."""
    sha = hashlib.sha256()
    for piece in checkpoint.pieces(entry):
        sha.update(piece)
    return sha.hexdigest()
