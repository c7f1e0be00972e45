"""A copy of another node's part on its way in: made, and compared, piece by piece, however large it is."""

from __future__ import annotations

import os

import pytest

from storage.arena.slot import Slot
from storage.errors import Corrupt
from storage.held import copy_buffer
from storage.held.copy_buffer import CopyBuffer
from tests.storage.held_cases import Anonymous, Staged

BITE = 4096


class Counted(Anonymous):
    """Memory that notes which of it was made."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.made: list[tuple[int, int]] = []

    def populate(self, begin: int, stop: int) -> None:
        self.made.append((begin, stop))


@pytest.fixture(autouse=True)
def small_bites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_buffer, "_BITE_BYTES", BITE)


def buffer_of(memory: list[Counted]) -> tuple[CopyBuffer, bytes]:
    """A buffer, and the bytes that belong into it."""
    part = Staged(20).part(0)

    def allocate(size_bytes: int) -> Counted:
        memory.append(Counted(size_bytes))
        return memory[0]

    data = b"".join(bytes(piece) for held in part.objects.values() for piece in held.pieces)
    return CopyBuffer(part.papers, "b", allocate), data


def test_no_more_is_made_than_what_comes_next() -> None:
    memory: list[Counted] = []
    buffer, data = buffer_of(memory)
    at = 0
    for view in buffer.bites():
        assert memory[0].made[-1] == (at, at + view.nbytes)
        assert view.nbytes <= BITE
        view[:] = data[at : at + view.nbytes]
        at += view.nbytes
    assert at == len(data) > 10 * BITE
    part = buffer.part()
    assert b"".join(bytes(piece) for held in part.objects.values() for piece in held.pieces) == data


@pytest.mark.parametrize("at", [0, 10 * BITE, -1])
def test_what_is_wrong_is_found_with_the_block_that_it_is_in(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory: list[Counted] = []
    buffer, data = buffer_of(memory)
    wrong = bytearray(data)
    wrong[at] ^= 1
    came = 0

    def take_all() -> None:
        nonlocal came
        for view in buffer.bites():
            view[:] = wrong[came : came + view.nbytes]
            came += view.nbytes

    with pytest.raises(Corrupt, match="does not match"):
        take_all()


def test_memory_that_is_made_later_keeps_what_is_there_and_is_sealed_from_the_beginning() -> None:
    slot = Slot.create_empty(3 * BITE)
    slot.populate(0, BITE)
    slot.memory[:BITE] = b"x" * BITE
    slot.populate(100, 3 * BITE)
    assert bytes(slot.memory[: BITE + 1]) == b"x" * BITE + bytes(1)
    with pytest.raises(PermissionError):
        os.ftruncate(slot.fd, BITE)
    slot.close()
