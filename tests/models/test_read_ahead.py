"""Reading experts ahead: their order, the limit on memory, and reuse of memory that is free again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor

from superexperts.models import read_ahead
from superexperts.models.experts import IN_FLIGHT
from superexperts.models.read_ahead import FEWEST, READERS, Key, ReadAhead

SIZE = 8
"""Bytes of an expert here."""


class Desk:
    """Memory that is lent and comes back, and the experts that were read into it: layer and expert as two bytes."""

    def __init__(self, fails: Key | None = None) -> None:
        self.lent: list[Tensor] = []
        self.read: list[Key] = []
        self.fails = fails
        self.lock = threading.Lock()

    def take(self, _: Key) -> dict[str, Tensor]:
        self.lent.append(torch.zeros(SIZE, dtype=torch.uint8))
        return {"down_proj": self.lent[-1]}

    def fill(self, key: Key, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if key == self.fails:
            raise OSError("the disk is gone")
        with self.lock:
            self.read.append(key)
        memory["down_proj"][:2] = torch.tensor(key)
        return {"down_proj": memory["down_proj"][:2]}

    def give(self, memory: Mapping[str, Tensor]) -> None:
        memory["down_proj"].fill_(255)  # what the next one to be read would do
        self.lent = [tensor for tensor in self.lent if tensor is not memory["down_proj"]]


@pytest.fixture
def opened() -> Iterator[Callable[[Desk], ReadAhead]]:
    made = []

    def open_(desk: Desk) -> ReadAhead:
        made.append(ReadAhead(desk.take, desk.fill, desk.give))
        return made[-1]

    yield open_
    for ahead in made:
        ahead.close()


def numbers(found: Iterator[Mapping[str, Tensor]]) -> list[Key]:
    return [tuple(matrices["down_proj"].tolist()) for matrices in found]


def test_the_wanted_ones_come_in_order_and_only_they_are_read(opened: Callable[[Desk], ReadAhead]) -> None:
    desk = Desk()
    ahead = opened(desk)
    for layer in (1, 2):
        expected = [(layer, expert) for expert in (0, 3, 4, *range(9, 60))]
        assert numbers(ahead.get(expected)) == expected
    assert len(desk.read) == len(set(desk.read)) == 2 * 54


def test_the_next_layers_are_read_before_anyone_asks_as_far_as_there_is_room(
    opened: Callable[[Desk], ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD", SIZE * 20)
    desk = Desk()
    ahead = opened(desk)
    first, second = ([(layer, expert) for expert in range(30)] for layer in (1, 2))
    ahead.start(first)
    assert len(desk.lent) == 20
    highest = 0
    for key, matrices in zip(first, ahead.get(first, second), strict=True):
        assert tuple(matrices["down_proj"].tolist()) == key
        highest = max(highest, len(desk.lent))
    assert highest == len(desk.lent) == 20
    # The router wants others: those that were read for nothing are given back, no other is read.
    assert numbers(ahead.get(second[5:7])) == second[5:7]
    assert set(second[5:7]) <= {key for key in desk.read if key[0] == 2} <= set(second[: 20 - (IN_FLIGHT - 1)])
    assert len(desk.lent) == 2


def test_what_is_wanted_no_longer_is_not_waited_for(
    opened: Callable[[Desk], ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that has not begun is dropped; the result of another is ignored, its memory returned at its end."""
    monkeypatch.setattr(read_ahead, "AHEAD", SIZE * 40)
    desk = Desk(fails=(1, 0))
    begun, go_on, fill = threading.Barrier(READERS + 1), threading.Event(), desk.fill

    def slow(key: Key, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if key[1] < READERS:
            begun.wait()
            go_on.wait()
            assert any(memory["down_proj"] is tensor for tensor in desk.lent)
        return fill(key, memory)

    monkeypatch.setattr(desk, "fill", slow)
    ahead = opened(desk)
    ahead.start([(1, expert) for expert in range(40)])
    begun.wait()
    threading.Timer(0.05, go_on.set).start()
    assert numbers(ahead.get([(1, 30)])) == [(1, 30)]
    assert sorted(desk.read) == [(1, 1), (1, 30)]
    assert len(desk.lent) == 1


def test_a_large_expert_still_has_others_read_ahead(
    opened: Callable[[Desk], ReadAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD", 1)
    desk = Desk()
    expected = [(1, expert) for expert in range(40)]
    ahead = opened(desk)
    for key, matrices in zip(expected, ahead.get(expected, [(2, 0), (2, 1), (2, 2), (2, 3)]), strict=True):
        assert tuple(matrices["down_proj"].tolist()) == key
        assert len(desk.lent) <= 8  # a layer of Mixtral's
    ahead.start(expected)
    assert len(desk.lent) == FEWEST == 8


def test_memory_is_let_alone_while_someone_may_compute_with_it(opened: Callable[[Desk], ReadAhead]) -> None:
    ahead = opened(Desk())
    expected = [(1, expert) for expert in range(40)]
    handed: list[Tensor] = []
    for matrices in ahead.get(expected, [(2, expert) for expert in range(40)]):
        handed.append(matrices["down_proj"])
        recent = handed[-IN_FLIGHT:]
        assert [tensor[1].item() for tensor in recent] == [key[1] for key in expected[: len(handed)]][-IN_FLIGHT:]
    # The last ones may be used until the next layer asks.
    assert [tensor[1].item() for tensor in handed[1 - IN_FLIGHT :]] == [key[1] for key in expected[1 - IN_FLIGHT :]]
    next(ahead.get([(2, 0)]))
    assert {tensor[1].item() for tensor in handed} == {255}


def test_what_goes_wrong_while_reading_is_raised_where_the_expert_is_wanted(
    opened: Callable[[Desk], ReadAhead],
) -> None:
    found = opened(Desk(fails=(1, 2))).get([(1, expert) for expert in range(9)])
    assert numbers(next(found) for _ in range(2)) == [(1, 0), (1, 1)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_what_several_batches_want_is_read_once_and_kept_until_the_last(opened: Callable[[Desk], ReadAhead]) -> None:
    desk = Desk()
    ahead = opened(desk)
    first, second, last = ([(1, expert) for expert in experts] for experts in ((0, 2, 3), (1, 2, 9), (2, 9, 12)))
    ahead.start([(1, expert) for expert in range(5)])  # the fourth is not needed after all
    assert numbers(ahead.get(first, again=True)) == first
    assert numbers(ahead.get(second, again=True)) == second
    assert not any(tensor[0].item() == 255 for tensor in desk.lent)
    assert numbers(ahead.get(last, [(2, 0)])) == last
    assert numbers(ahead.get([(2, 0)])) == [(2, 0)]
    assert sorted(desk.read) == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (1, 9), (1, 12), (2, 0)]
    assert len(desk.lent) == 1  # the last one, which may be in use
