"""Reads two checkpoints side by side: for each tensor, or part of one, how much of it differs and by how much.

Bytes are compared in blocks that fit into the caches of the processor. Numbers are computed only for what differs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from superexperts.checkpoints.reader import KINDS, Checkpoint, Entry
from superexperts.core.types import ExpertKey

if TYPE_CHECKING:  # torch takes 2 s to import, and checkpoints that are equal do not need it
    from torch import Tensor

    from superexperts.models.parts import Unit

__all__ = [
    "Difference",
    "Sums",
    "compare_unit",
    "compare_units",
    "count",
    "part",
    "same_bytes",
    "tensor_sums",
    "total",
]

Status = Literal["identical", "changed", "reshaped", "missing in A", "missing in B"]
"""`changed`: the same shape, but other values or another dtype; `reshaped`: another shape."""

THREADS = 2
BLOCK = 2**20
"""Bytes of each side compared at a time: both blocks fit into the cache of a core."""

# libc's memcmp releases Python's lock and needs no array library.
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over two tensors, from which all numbers about their difference are computed; finite values only."""

    elements: int = 0
    changed: int = 0
    """Number of elements with different bits, or with different values if the dtypes differ."""
    aa: float = 0.0
    """Sum of the squares of A; `bb`: of B; `ab`: of the products; `dd`: of the squares of B - A."""
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    max_change: float = 0.0
    not_finite: int = 0
    """Number of changed elements that are infinite or NaN on either side."""

    def __add__(self, other: Sums) -> Sums:
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        both = {name: mine[name] + theirs[name] for name in mine}
        return Sums(**{**both, "max_change": max(self.max_change, other.max_change)})

    def to_json(self) -> dict[str, Any]:
        """The numbers of a comparison; those that need a norm other than 0 are None without one."""
        norms = math.sqrt(self.aa) * math.sqrt(self.bb)
        return {
            "elements": self.elements,
            "changed": self.changed,
            "share_changed": self.changed / self.elements if self.elements else 0.0,
            "relative_norm": math.sqrt(self.dd / self.aa) if self.aa else None,
            "max_change": self.max_change,
            # Rounding can push the cosine of equal tensors slightly past 1.
            "cosine": max(-1.0, min(1.0, self.ab / norms)) if norms else None,
            "not_finite": self.not_finite,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How one unit differs between A and B."""

    unit: Unit
    status: Status
    sums: Sums
    """All zero, except `elements`, if nothing changed or nothing can be compared."""
    bytes: int
    """Bytes of A and B together that were compared."""

    @property
    def expert(self) -> ExpertKey | None:
        """The expert that the unit belongs to; None for a unit of no expert."""
        layer, expert = self.unit.layer, self.unit.expert
        return None if layer is None or expert is None else (layer, expert)

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        unit = self.unit
        sides = {}
        for name, entries in (("a", unit.a), ("b", unit.b)):
            shape = list(entries[0].shape) if len(entries) == 1 else None
            dtype = KINDS[entries[0].kind][0] if entries else None
            sides[name] = {"dtype": dtype, "shape": shape} if entries else None
        where = {"key": unit.key, "layer": unit.layer, "expert": unit.expert, "status": self.status}
        return {**where, **self.sums.to_json(), **sides}


class _Buffers(threading.local):
    """Two blocks for each thread."""

    def __init__(self) -> None:
        blocks = [bytearray(BLOCK) for _ in range(2)]
        self.views = [memoryview(block) for block in blocks]
        self.addresses = [ctypes.addressof(ctypes.c_char.from_buffer(block)) for block in blocks]


_buffers = _Buffers()


def compare_units(a: Checkpoint, b: Checkpoint, units: Sequence[Unit]) -> Iterator[Difference]:
    """The difference of each unit, in the order given."""
    with ThreadPoolExecutor(THREADS) as workers:
        yield from workers.map(lambda unit: compare_unit(a, b, unit), units)


def compare_unit(a: Checkpoint, b: Checkpoint, unit: Unit) -> Difference:
    """Compares the bytes first, and computes numbers only if they differ."""
    untouched = Sums(elements=count(unit.a or unit.b))
    if not unit.a or not unit.b:
        return Difference(unit=unit, status="missing in B" if unit.a else "missing in A", sums=untouched, bytes=0)
    if _shape(unit.a) != _shape(unit.b):
        return Difference(unit=unit, status="reshaped", sums=untouched, bytes=0)
    nbytes = sum(entry.nbytes for entry in (*unit.a, *unit.b))
    if _same_dtype(unit) and same_bytes(a, b, unit.a, unit.b):
        return Difference(unit=unit, status="identical", sums=untouched, bytes=nbytes)
    sums = Sums()
    for one, other in _spans(unit.a, unit.b):
        # In spans of at most BLOCK elements, so that two large tensors are never in memory at once.
        sums += tensor_sums(a.read(one), b.read(other))
    status: Status = "changed" if sums.changed or not _same_dtype(unit) else "identical"
    return Difference(unit=unit, status=status, sums=sums, bytes=nbytes)


def count(entries: Sequence[Entry]) -> int:
    """Number of elements of all pieces."""
    return sum(math.prod(entry.shape) for entry in entries)


def _shape(entries: Sequence[Entry]) -> tuple[int, ...]:
    """The shape of pieces stacked along the first dimension."""
    if len(entries) == 1:
        return entries[0].shape
    return (sum(entry.shape[0] for entry in entries), *entries[0].shape[1:])


def _same_dtype(unit: Unit) -> bool:
    return {entry.kind for entry in unit.a} == {entry.kind for entry in unit.b}


def same_bytes(a: Checkpoint, b: Checkpoint, ones: Sequence[Entry], others: Sequence[Entry]) -> bool:
    """Whether pieces of equal total size hold the same bytes. The same file under two names is not read."""
    for one, other in _spans(ones, others, whole=True):
        if one.offset == other.offset and a.inode(one.file) == b.inode(other.file):
            continue
        for start in range(0, one.nbytes, BLOCK):
            length = min(BLOCK, one.nbytes - start)
            a.read_bytes(one, _buffers.views[0][:length], start)
            b.read_bytes(other, _buffers.views[1][:length], start)
            if _memcmp(*_buffers.addresses, length):
                return False
    return True


def part(entry: Entry, offset: int, nbytes: int) -> Entry:
    """A range of the bytes of an entry, as an entry of dtype uint8."""
    return dataclasses.replace(entry, kind="U8", shape=(nbytes,), offset=offset, nbytes=nbytes)


def _spans(ones: Sequence[Entry], others: Sequence[Entry], *, whole: bool = False) -> Iterator[tuple[Entry, Entry]]:
    """Pairs of flat pieces with the same number of elements that together cover both sides; each has at most BLOCK
    elements unless `whole`."""
    left, right = list(ones), list(others)
    while left and right:
        sizes = [entry.nbytes // entry.itemsize for entry in (left[0], right[0])]
        taken = min(*sizes) if whole else min(*sizes, BLOCK)
        pair = []
        for side, size in ((left, sizes[0]), (right, sizes[1])):
            entry, width = side[0], side[0].itemsize
            pair.append(dataclasses.replace(entry, shape=(taken,), nbytes=taken * width))
            if taken == size:
                side.pop(0)
            else:
                offset, nbytes = entry.offset + taken * width, entry.nbytes - taken * width
                side[0] = dataclasses.replace(entry, shape=(size - taken,), offset=offset, nbytes=nbytes)
        yield pair[0], pair[1]


def tensor_sums(a_N: Tensor, b_N: Tensor) -> Sums:
    """The sums over two tensors with the same number of elements, in float64."""
    import torch  # imported here, because comparing equal files does not need it

    a_N, b_N = a_N.reshape(-1), b_N.reshape(-1)
    if a_N.dtype == b_N.dtype:
        # Bits, not values: 0 and -0, or two NaNs, count as a change, since the files differ.
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a_N.dtype.itemsize]
        differs_N = a_N.view(width) != b_N.view(width)
    else:
        differs_N = a_N.double() != b_N.double()
    # float64: sums of squares over millions of bfloat16 values lose the small differences in float32.
    x_N, y_N = a_N.double(), b_N.double()
    finite_N = x_N.isfinite() & y_N.isfinite()
    not_finite = int((differs_N & ~finite_N).sum())
    if not bool(finite_N.all()):
        x_N, y_N = x_N.where(finite_N, 0), y_N.where(finite_N, 0)
    change_N = y_N - x_N
    return Sums(
        elements=len(a_N),
        changed=int(differs_N.sum()),
        aa=float(x_N @ x_N),
        bb=float(y_N @ y_N),
        ab=float(x_N @ y_N),
        dd=float(change_N @ change_N),
        max_change=float(change_N.abs().max()) if len(a_N) else 0.0,
        not_finite=not_finite,
    )


def total(sums: Iterable[Sums]) -> Sums:
    """The sum of all."""
    return sum(sums, Sums())
