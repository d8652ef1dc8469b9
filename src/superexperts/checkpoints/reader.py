"""A safetensors checkpoint without a model: what its shards hold and where, one tensor or one expert's slice of it.

A checkpoint may come from anywhere, so nothing in it is trusted: names of shards stay in the folder, headers must
describe exactly the bytes that are there, and a pickle is never opened. Headers are checked
here: safetensors' own check imports NumPy, which makes a small `prune` a third slower (docs/decisions/19).
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

if TYPE_CHECKING:  # importing torch takes 2 s, and code that only moves bytes does not need it
    import torch
    from torch import Tensor

__all__ = ["INDEX", "KINDS", "SINGLE", "SPARE", "Checkpoint", "Entry", "as_bytes"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SPARE = 2 * BLOCK
"""Extra bytes that `read_in_place` needs in its memory, so that it can read whole blocks at both ends."""

MAX_HEADER = 100_000_000
"""Bytes of a header that the format allows."""

MAX_NAME = 250
"""Characters of a shard's name: file systems take 255 bytes."""

MAX_ELEMENTS = 2**48
"""Of one tensor: 500 TB in bfloat16."""

PIECE = 2**20
"""Bytes read at a time from a tensor that is never held in memory as a whole."""

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
"""dtype name in a safetensors header -> (name in torch, bytes per element)."""


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
    """Its first byte in the file, header included."""
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The kind as a torch dtype."""
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
    whatever is wrong with the files, about `field`: the setting that named the folder. Reading may be done by several
    threads.
    """

    def __init__(self, folder: Path, field: str = "model") -> None:
        self.folder, self.field = folder, field
        weight_map = self._weight_map()
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
                for entry in self._opened(file):
                    if entry.key in self._entries:
                        raise self._refused(file, f"holds {entry.key!r}, as does {self._entries[entry.key].file}")
                    self._entries[entry.key] = entry
            if weight_map is not None:
                self._check_index(weight_map)
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
            self.read_bytes(entry, as_bytes(target))

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
        """An entry's bytes, `PIECE` at a time. Each piece overwrites the one before, so copy what you keep."""
        memory = memoryview(bytearray(min(PIECE, entry.nbytes)))
        for start in range(0, entry.nbytes, PIECE):
            piece = memory[: entry.nbytes - start]
            self.read_bytes(entry, piece, start)
            yield piece

    def read_bytes(self, entry: Entry, target: memoryview, start: int = 0) -> None:
        """Fills memory with the entry's bytes from number `start` on."""
        shard = self._open[entry.file]
        self._count(entry, lambda: shard.read_into(target, entry.offset + start), len(target))

    def _count(self, entry: Entry, read: Callable[[], int], expected: int) -> None:
        """Reads `expected` bytes and counts them; a failure becomes one line."""
        try:
            found = read()
        except OSError as error:
            raise self._refused(entry.file, f"cannot be read at {entry.key!r} ({_short(error)})") from error
        if found < expected:
            raise self._refused(entry.file, f"ends inside {entry.key!r}")
        with self._lock:
            self.bytes_read += found

    # ---- what the files must be ----

    def _refused(self, file: str, why: str) -> ModelError:
        return ModelError(f"{str(self.folder / file)!r} {why}; fetch the checkpoint again", field=self.field)

    def _opened(self, file: str) -> list[Entry]:
        """Opens a shard; returns what it holds, in the order of the bytes. Every byte belongs to one tensor."""
        if not (self.folder / file).is_file():  # opening a named pipe would block
            raise self._refused(file, "cannot be read (no such file)")
        try:
            self._open[file] = ShardFile(self.folder / file)
        except OSError as error:
            raise self._refused(file, f"cannot be read ({_short(error)})") from error
        size, length = self.size(file), int.from_bytes(os.pread(self.descriptor(file), 8, 0), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise self._refused(file, f"has {size} bytes and no header of safetensors")
        try:
            header = _object(os.pread(self.descriptor(file), length, 8))
        except (ValueError, RecursionError) as error:
            raise self._refused(file, f"has a header that cannot be read ({_short(error)})") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._refused(file, "has a header that is wrong at '__metadata__'")
        self.metadata[file] = metadata
        entries = [self._entry(key, said, 8 + length, file) for key, said in header.items()]
        entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
        end = 8 + length
        for entry in entries:
            if entry.offset != end:
                raise self._refused(file, f"has a header whose tensors overlap or leave gaps at {entry.key!r}")
            end += entry.nbytes
        if end != size:
            what = "is cut off" if end > size else "holds more bytes than its header says"
            raise self._refused(file, f"{what} ({size} bytes, not {end})")
        return entries

    def _entry(self, key: str, said: Any, start: int, file: str) -> Entry:
        wrong = f"has a header that is wrong at {key[:200]!r}"
        if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._refused(file, wrong)
        shape, offsets, kind = said["shape"], said["data_offsets"], said["dtype"]
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
                raise self._refused(file, wrong)
        if not isinstance(kind, str) or kind not in KINDS:
            raise self._refused(file, f"holds {key[:200]!r} in {str(kind)[:40]!r}, which is not read here")
        if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
            raise self._refused(file, wrong)  # with a dimension of 0 the bytes are none, yet no tensor has such a shape
        nbytes = math.prod(shape) * KINDS[kind][1]
        if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
            raise self._refused(file, wrong)
        return Entry(key=key, file=file, kind=kind, shape=tuple(shape), offset=start + offsets[0], nbytes=nbytes)

    def _weight_map(self) -> dict[str, str] | None:
        """The index: key -> shard; None for a checkpoint of one file."""
        self._check_settings()
        if not (self.folder / INDEX).is_file():
            if (self.folder / SINGLE).is_file():
                return None
            shards = len(list(self.folder.glob("*.safetensors")))
            if shards:
                raise ModelError(
                    f"{str(self.folder)!r} has {shards} .safetensors files, but no {INDEX} that says which tensors are "
                    "in which; fetch it with the checkpoint",
                    field=self.field,
                )
            raise ModelError(
                f"{str(self.folder)!r} has neither {SINGLE} nor {INDEX} (pickles are not read); convert it first",
                field=self.field,
            )
        try:
            index = _object((self.folder / INDEX).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise self._refused(INDEX, f"is not a readable JSON object ({_short(error)})") from error
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise self._refused(INDEX, "has no weight_map")
        names: set[str] = set()
        for key, file in weight_map.items():
            if not isinstance(file, str) or file not in names:
                self._check_name(key, file)
                names.add(file)
        if (self.folder / SINGLE).is_file() and names != {SINGLE}:
            raise ModelError(
                f"{str(self.folder)!r} has {SINGLE} and {INDEX}; transformers reads the first alone, so move one away",
                field=self.field,
            )
        return weight_map

    def _check_name(self, key: str, file: Any) -> None:
        """An index must name files of its folder, not paths. The file itself may be a link, as in the Hub's cache."""
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file or len(file) > MAX_NAME:
            raise self._refused(INDEX, f"says that {key!r} is in {str(file)[:80]!r}, outside its folder")
        if not file.endswith(".safetensors"):
            raise self._refused(INDEX, f"says that {key!r} is in {file[:80]!r}, which is not a safetensors file")

    def _check_settings(self) -> None:
        """Transformers reads the weights from another file where config.json names one."""
        try:
            settings = json.loads((self.folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return  # whoever needs it says what is wrong with it
        if isinstance(settings, dict) and settings.get("transformers_weights") is not None:
            raise self._refused("config.json", "names another file for the weights, which is not read here")

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        """The index and the shards must say the same."""
        for key, file in weight_map.items():
            if key not in self._entries or self._entries[key].file != file:
                raise self._refused(INDEX, f"says that {key!r} is in {file!r}, where it is not")
        for key, entry in self._entries.items():
            if key not in weight_map:
                raise self._refused(entry.file, f"holds {key!r}, which the index does not name")


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, as they stand in a shard; its own memory where it is contiguous."""
    import torch  # here, as said above

    return memoryview(cast(Any, tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


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
