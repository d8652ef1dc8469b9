"""Experts read by threads before they are needed, so that the disk works while the model computes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from superexperts.models.experts import IN_FLIGHT

__all__ = ["AHEAD", "ReadAhead"]

READERS = 2
AHEAD = 2**29
"""Reading ahead continues while less than this many bytes of experts are in memory: about what a disk delivers in the
half second that an attention layer may take."""
FEWEST = IN_FLIGHT + READERS
"""Experts in memory at least, not counting those kept for later batches: all that may be in use, and one per reader.
That is a whole layer of Mixtral, which has eight large experts."""

Key = tuple[int, int]
"""Layer and expert."""
Matrices = Mapping[str, Tensor]
"""An expert's matrices, or memory for them, by the names of the bank's parameters."""


class ReadAhead:
    """Reads experts in the order in which they will be used.

    `take` gives memory for an expert, `fill` reads the expert into it on another thread, `give` takes the memory back.
    """

    def __init__(
        self,
        take: Callable[[Key], Matrices],
        fill: Callable[[Key, Matrices], Matrices],
        give: Callable[[Matrices], None],
    ) -> None:
        self._take, self._fill, self._give = take, fill, give
        self._readers = ThreadPoolExecutor(max_workers=READERS)
        self._coming: dict[Key, tuple[Matrices, Future[Matrices]]] = {}
        self._used: collections.deque[Matrices] = collections.deque()
        """The experts handed out last; some thread may still be computing with them."""
        self._kept: dict[Key, tuple[Matrices, Future[Matrices]]] = {}
        """Experts that were handed out and that a later batch needs again."""

    def get(self, needed: Sequence[Key], then: Sequence[Key] = (), *, again: bool = False) -> Iterator[Matrices]:
        """Yields the needed experts in order, as `models.experts.Weights` asks; then reads `then` while there is room.

        With `again`, a later call will need experts of this layer, so their memory is kept. A call ends the use
        of everything that an earlier call yielded.
        """
        while self._used:
            self._give(self._used.popleft())
        if not again:
            self._drop(needed)
        todo = collections.deque(key for key in (*needed, *then) if key not in self._coming | self._kept)
        for key in needed:
            self._read(todo)
            memory, read = (self._kept if key in self._kept else self._coming).pop(key)
            if again:
                self._kept[key] = memory, read
            else:
                self._used.append(memory)
            yield read.result()
            if len(self._used) == IN_FLIGHT:
                self._give(self._used.popleft())
        self._read(todo)

    def start(self, likely: Sequence[Key]) -> None:
        """Reads what is likely to be needed next, as long as there is room."""
        self._read(collections.deque(likely))

    def close(self) -> None:
        """Ends the threads; what they have read is dropped."""
        self._readers.shutdown(cancel_futures=True)

    def _drop(self, needed: Sequence[Key]) -> None:
        """Gives back the memory of experts that are not needed after all."""
        unneeded = [held.pop(key) for held in (self._coming, self._kept) for key in held.keys() - set(needed)]
        for _, read in unneeded:
            read.cancel()  # unless it has begun
        wait([read for _, read in unneeded])  # errors do not matter: the results are not used
        for memory, _ in unneeded:
            self._give(memory)

    def _read(self, todo: collections.deque[Key]) -> None:
        """Begins to read as many as there is room for."""
        # Kept experts count for the bytes but not for the number: else a large layer could leave no room to read
        # anything.
        moving = [*self._used, *(memory for memory, _ in self._coming.values())]
        count = len(moving)
        nbytes = sum(map(_nbytes, [*moving, *(memory for memory, _ in self._kept.values())]))
        while todo and (count < FEWEST or nbytes < AHEAD):
            key = todo.popleft()
            memory = self._take(key)
            self._coming[key] = memory, self._readers.submit(self._fill, key, memory)
            count, nbytes = count + 1, nbytes + _nbytes(memory)


def _nbytes(memory: Matrices) -> int:
    return sum(tensor.nbytes for tensor in memory.values())
