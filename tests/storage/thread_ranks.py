"""Ranks that are threads of this process, with collectives that hang where one of them is lost."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from storage.ranks.agreement import AgreeingGroup


class PeerLost(RuntimeError):
    """What a collective of gloo's would raise."""


class Meeting:
    """Where the ranks of a world meet: a collective returns on a rank once all have come to it.

    Until `end` those hang that wait for a rank which does not come; then they fail.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._changed = threading.Condition()
        self._told: dict[int, dict[int, bytes]] = defaultdict(dict)
        self._num_calls: dict[int, int] = defaultdict(int)
        self._is_ended = False

    def exchange(self, rank: int, data: bytes) -> list[bytes]:
        """Every rank's `data`, by rank."""
        with self._changed:
            number = self._num_calls[rank]
            self._num_calls[rank] += 1
            told = self._told[number]
            told[rank] = data
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(told) == self.world_size or self._is_ended)
            if len(told) < self.world_size:
                raise PeerLost(f"rank {rank} waits for a rank that is gone")
            return [told[each] for each in range(self.world_size)]

    def end(self) -> None:
        """Let everybody go who waits."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def waiting(self, rank: int) -> bool:
        """Whether that rank waits for others in a collective."""
        with self._changed:
            return 0 < len(self._told[self._num_calls[rank] - 1]) < self.world_size


class ThreadGroup(AgreeingGroup):
    """One rank's side of a `Meeting`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(alone=True)
        self._meeting = meeting
        self.rank, self.world_size = rank, meeting.world_size

    def broadcast(self, data: bytes | None) -> bytes:
        return self._meeting.exchange(self.rank, data or b"")[0]

    def gather(self, data: bytes) -> list[bytes] | None:
        told = self._meeting.exchange(self.rank, data)
        return told if self.is_coordinator else None

    def begin_all_gather(self, data: bytes) -> Callable[[], list[bytes]]:
        return lambda: self._meeting.exchange(self.rank, data)

    @property
    def is_waiting(self) -> bool:
        """Whether this rank waits for others."""
        return self._meeting.waiting(self.rank)

    def any(self, flag: bool) -> bool:
        return any(told == b"1" for told in self._meeting.exchange(self.rank, b"1" if flag else b"0"))
