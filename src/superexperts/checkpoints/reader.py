"""A safetensors checkpoint without a model: what its shards hold and where, one tensor or one expert's slice of it.

A checkpoint may come from anywhere, so nothing in it is trusted: names of shards stay in the folder, headers must
describe exactly the bytes that are there, and a pickle is never opened.
Format: https://huggingface.co/docs/safetensors (8 bytes of length, a JSON header, the tensors without gaps).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from superexperts.checkpoints.shard_file import BLOCK, ShardFile
from superexperts.core.errors import ModelError

if TYPE_CHECKING:  # torch takes 2 s to import, for which what only moves bytes does not wait
    import torch
    from torch import Tensor

__all__ = ["INDEX", "KINDS", "SINGLE", "SPARE", "Checkpoint", "Entry", "as_bytes"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SPARE = 2 * BLOCK
"""Bytes that memory to read in place has more than what is read."""

MAX_HEADER = 100_000_000
"""Bytes of a header that the format allows."""

MAX_NAME = 250
"""Characters of a shard's name: file systems take 255 bytes."""

MAX_ELEMENTS = 2**48
"""Of one tensor: 500 TB in bfloat16."""

PIECE = 2**20
"""Bytes of a tensor that are read at a time where it is not to be in memory."""

KINDS = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Kinds of numbers by their name in a header -> torch's name for the dtype, and bytes of an element."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint."""

    key: str
    file: str
    """Name of its shard."""
    kind: str
    """Its dtype as the header names it, one of `KINDS`."""
    shape: tuple[int, ...]
    offset: int
    """Its first byte in the shard."""
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The kind, as torch's."""
        import torch  # here, as said above

        return cast("torch.dtype", getattr(torch, KINDS[self.kind][0]))

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return KINDS[self.kind][1]

    def row(self, index: int) -> Entry:
        """The slice [index] of the first dimension, which lies in one piece."""
        size = self.nbytes // self.shape[0]
        return dataclasses.replace(self, shape=self.shape[1:], offset=self.offset + index * size, nbytes=size)


class Checkpoint(Mapping[str, Entry]):
    """The tensors of a checkpoint folder by key, in the order of the shards; a context that closes its files.

    One `model.safetensors`, or the shards that `model.safetensors.index.json` names. `ModelError` in one line for
    whatever is wrong with the files. Reading may be done by several threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weight_map = _weight_map(folder)
        self.files = (SINGLE,) if weight_map is None else tuple(sorted(set(weight_map.values())))
        self.metadata: dict[str, dict[str, str]] = {}
        """Per shard what its header says beside the tensors."""
        self._entries: dict[str, Entry] = {}
        self._open: dict[str, ShardFile] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Of tensors, so far."""
        try:
            for file in self.files:
                self._open[file] = _opened(folder, file)
                entries, self.metadata[file] = _header(self._open[file].descriptor, folder, file)
                for entry in entries:
                    if entry.key in self._entries:
                        raise _refused(folder, file, f"holds {entry.key!r}, as does {self._entries[entry.key].file}")
                    self._entries[entry.key] = entry
            if weight_map is not None:
                _check_index(folder, weight_map, self._entries)
        except BaseException:
            self.close()
            raise

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards."""
        while self._open:
            self._open.popitem()[1].close()

    def size(self, file: str) -> int:
        """Bytes of a shard."""
        return os.fstat(self._open[file].descriptor).st_size

    def inode(self, file: str) -> tuple[int, int]:
        """(device, inode) of a shard: two names of the same file have the same."""
        stat = os.fstat(self._open[file].descriptor)
        return stat.st_dev, stat.st_ino

    def descriptor(self, file: str) -> int:
        """A shard's open file, to be read by offsets only."""
        return self._open[file].descriptor

    def header(self, file: str) -> bytes:
        """A shard's bytes before its first tensor."""
        length = int.from_bytes(os.pread(self._open[file].descriptor, 8, 0), "little")
        return os.pread(self._open[file].descriptor, 8 + length, 0)

    def in_file(self, file: str) -> list[Entry]:
        """A shard's tensors in the order of their bytes."""
        return [entry for entry in self.values() if entry.file == file]

    def read(self, entry: Entry) -> Tensor:
        """The tensor, on the CPU in its own dtype."""
        import torch  # here, as said above

        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(entry, tensor)
        return tensor

    def read_into(self, entry: Entry, target: Tensor) -> None:
        """Reads into a contiguous CPU tensor of the entry's shape and dtype."""
        assert (target.shape, target.dtype) == (entry.shape, entry.dtype)
        assert target.is_contiguous()
        if entry.nbytes:
            self._read(entry, as_bytes(target), 0)

    def read_in_place(self, entries: Sequence[Entry], memory: Tensor) -> Tensor | None:
        """Reads entries that follow each other in a shard without a copy on the way; -> their bytes within `memory`,
        uint8 [their bytes + SPARE], which begins with a page. None where they do not follow each other, or where an
        odd header puts them so that no tensor can begin there."""
        first, size = entries[0], sum(entry.nbytes for entry in entries)
        follows = ((one.file, one.offset + one.nbytes) == (two.file, two.offset) for one, two in pairwise(entries))
        if not all(follows) or first.offset % first.itemsize:
            return None
        shard = self._open[first.file]
        self._count(first, lambda: shard.read_in_place(as_bytes(memory), first.offset, size), size)
        start = first.offset % BLOCK
        return memory[start : start + size]

    def pieces(self, entry: Entry) -> Iterator[memoryview]:
        """An entry's bytes, which are never all in memory: piece by piece, each in the last one's place."""
        memory = memoryview(bytearray(min(PIECE, entry.nbytes)))
        for start in range(0, entry.nbytes, PIECE):
            piece = memory[: entry.nbytes - start]
            self._read(entry, piece, start)
            yield piece

    def _read(self, entry: Entry, target: memoryview, start: int) -> None:
        shard = self._open[entry.file]
        self._count(entry, lambda: shard.read_into(target, entry.offset + start), len(target))

    def _count(self, entry: Entry, read: Callable[[], int], wanted: int) -> None:
        """Reads, and says in one line what does not go well."""
        try:
            found = read()
        except OSError as error:
            raise _refused(self.folder, entry.file, f"cannot be read at {entry.key!r} ({_short(error)})") from error
        if found < wanted:
            raise _refused(self.folder, entry.file, f"ends inside {entry.key!r}")
        with self._lock:
            self.bytes_read += found


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, as they stand in a shard; its own memory where it is contiguous."""
    import torch  # here, as said above

    return memoryview(cast(Any, tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _refused(folder: Path, file: str, why: str) -> ModelError:
    return ModelError(f"{str(folder / file)!r} {why}; fetch the checkpoint again", field="model")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index: key -> shard; None for a checkpoint of one file."""
    _check_settings(folder)
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return None
        raise ModelError(
            f"{str(folder)!r} has neither {SINGLE} nor {INDEX} (pickles are not read); convert it first", field="model"
        )
    try:
        index = _object((folder / INDEX).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(folder, INDEX, f"is not a readable JSON object ({_short(error)})") from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refused(folder, INDEX, "has no weight_map")
    good: set[str] = set()
    for key, file in weight_map.items():
        if isinstance(file, str) and file in good:
            continue
        # A name, not a path: an index must not lead out of its folder. What a name leads to may be a link, as it is in
        # the Hub's cache.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file or len(file) > MAX_NAME:
            raise _refused(folder, INDEX, f"says that {key!r} is in {str(file)[:80]!r}, outside its folder")
        if not file.endswith(".safetensors"):
            raise _refused(folder, INDEX, f"says that {key!r} is in {file[:80]!r}, which is not a safetensors file")
        good.add(file)
    if (folder / SINGLE).is_file() and good != {SINGLE}:
        raise ModelError(
            f"{str(folder)!r} has {SINGLE} and {INDEX}; transformers reads the first alone, so move one away",
            field="model",
        )
    return weight_map


def _check_settings(folder: Path) -> None:
    """Transformers reads the weights from another file where config.json names one."""
    try:
        settings = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # whoever needs it says what is wrong with it
    if isinstance(settings, dict) and settings.get("transformers_weights") is not None:
        raise _refused(folder, "config.json", "names another file for the weights, which is not read here")


def _check_index(folder: Path, weight_map: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    """The index and the shards must say the same."""
    for key, file in weight_map.items():
        if key not in entries or entries[key].file != file:
            raise _refused(folder, INDEX, f"says that {key!r} is in {file!r}, where it is not")
    for key, entry in entries.items():
        if key not in weight_map:
            raise _refused(folder, entry.file, f"holds {key!r}, which the index does not name")


def _opened(folder: Path, file: str) -> ShardFile:
    if not (folder / file).is_file():  # a pipe would be waited for
        raise _refused(folder, file, "cannot be read (no such file)")
    try:
        return ShardFile(folder / file)
    except OSError as error:
        raise _refused(folder, file, f"cannot be read ({_short(error)})") from error


def _header(descriptor: int, folder: Path, file: str) -> tuple[list[Entry], dict[str, str]]:
    """What a shard holds, in the order of the bytes, and its metadata; every byte belongs to one tensor."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise _refused(folder, file, f"has {size} bytes and no header of safetensors")
    start = 8 + length
    try:
        header = _object(os.pread(descriptor, length, 8))
    except (ValueError, RecursionError) as error:
        raise _refused(folder, file, f"has a header that cannot be read ({_short(error)})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused(folder, file, "has a header that is wrong at '__metadata__'")
    entries = [_entry(key, said, start, folder, file) for key, said in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = start
    for entry in entries:
        if entry.offset != end:
            raise _refused(folder, file, f"has a header whose tensors overlap or leave gaps at {entry.key!r}")
        end += entry.nbytes
    if end != size:
        what = "is cut off" if end > size else "holds more bytes than its header says"
        raise _refused(folder, file, f"{what} ({size} bytes, not {end})")
    return entries, metadata


def _entry(key: str, said: Any, start: int, folder: Path, file: str) -> Entry:
    wrong = _refused(folder, file, f"has a header that is wrong at {key[:200]!r}")
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong
    shape, offsets = said["shape"], said["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise wrong
    if not isinstance(said["dtype"], str) or said["dtype"] not in KINDS:
        raise _refused(folder, file, f"holds {key[:200]!r} in {str(said['dtype'])[:40]!r}, which is not read here")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise wrong  # with a dimension of 0 the bytes are none, yet no tensor has such a shape
    nbytes = math.prod(shape) * KINDS[said["dtype"]][1]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise wrong
    kind = str(said["dtype"])
    return Entry(key=key, file=file, kind=kind, shape=tuple(shape), offset=start + offsets[0], nbytes=nbytes)


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object without a name given twice; `ValueError` otherwise."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(found)
        if len(names) < len(found):
            raise ValueError("a name is given twice")
        return names

    parsed = json.loads(text.decode(), object_pairs_hook=pairs)
    if not isinstance(parsed, dict):
        raise ValueError("not an object")
    if b"\\ud" in text.lower():  # half a character, perhaps, which no other reader takes
        json.dumps(parsed, ensure_ascii=False).encode()
    return parsed


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
