"""Ranks of one machine wait for each other by pipes.

A barrier of gloo goes through threads of its own on each side, and each of these waits for a core that the ranks
compute on, now and then for milliseconds. A byte in a pipe wakes the one thread that waits for it.
"""

from __future__ import annotations

import os
import select
import stat
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

_NUM_NUMBERS = 256  # of barriers, in a byte
_POLL_MS_MAX = (1 << 31) - 1  # poll(2) takes no more: 24 days
_NONE = -1
_with_pipes: weakref.WeakSet[Inbox | PipeBarrier] = weakref.WeakSet()


class PeerGone(RuntimeError):
    """A rank has ended, or does not come: as a collective of torch's raises a RuntimeError."""


class PipeEnd(NamedTuple):
    """Where other processes of the machine find the writing end of a pipe."""

    fd: int
    inode: int

    def open(self, pid: int) -> int:
        """A descriptor of one's own for what process `pid` has there. Raises OSError: it is not to be had."""
        # On another machine another process may have these numbers: nothing is waited for, and nothing else written to.
        fd = os.open(f"/proc/{pid}/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        found = os.fstat(fd)
        if not stat.S_ISFIFO(found.st_mode) or found.st_ino != self.inode:
            os.close(fd)
            raise FileNotFoundError(f"descriptor {self.fd} of process {pid} is no pipe of its mailbox")
        return fd


class Inbox:
    """The pipes by which others tell a rank that they have come: one by round of a barrier. Raises OSError."""

    def __init__(self, num_ranks: int) -> None:
        self.reading: list[int] = []
        self.ends: list[PipeEnd] = []
        self._closing: list[Callable[[], object]] = []
        self._letting_go: list[Callable[[], object]] = []
        for _ in distances(num_ranks):
            reading, writing = os.pipe2(os.O_CLOEXEC)
            self._letting_go.append(weakref.finalize(self, os.close, reading))
            self._closing.append(weakref.finalize(self, os.close, writing))
            self.reading.append(reading)
            self.ends.append(PipeEnd(writing, os.fstat(writing).st_ino))
        _with_pipes.add(self)

    def close_ends(self) -> None:
        """Leave the writing to those who have opened it: a pipe ends once they are gone."""
        for close in self._closing:
            close()

    def let_go(self) -> None:
        """Close all of it; what is asked of it from here on fails."""
        self.close_ends()
        for close in self._letting_go:
            close()
        self.reading = [_NONE] * len(self.reading)


def distances(num_ranks: int) -> list[int]:
    """By round: so far ahead is the rank that is told then, and so far behind the one that tells."""
    return [1 << turn for turn in range((num_ranks - 1).bit_length())]


class PipeBarrier:
    """A dissemination barrier (Hensgen, Finkel and Manber, 1988): in round k each rank tells the one 2^k ahead.

    What a rank has written before it comes the others see after they have met, for the kernel orders what goes by a
    pipe. For one thread.

    Args:
        rank: this one's.
        names: of all ranks, as an error is to call them.
        inbox: this rank's.
        told: by round, the descriptor by which the rank ahead is told; they are the barrier's from here on.
        timeout_s: for so long a rank is waited for that does not come.
    """

    def __init__(self, rank: int, names: Sequence[str], inbox: Inbox, told: Sequence[int], timeout_s: float) -> None:
        self._inbox = inbox
        self._told = told
        self._timeout_s = timeout_s
        self._num_met = 0
        self._ahead = [names[(rank + distance) % len(names)] for distance in distances(len(names))]
        self._behind = [names[(rank - distance) % len(names)] for distance in distances(len(names))]
        self._polls = [select.poll() for _ in inbox.reading]
        for poll, fd in zip(self._polls, inbox.reading, strict=True):
            poll.register(fd, select.POLLIN)
        self._letting_go: list[Callable[[], object]] = [weakref.finalize(self, os.close, fd) for fd in told]
        _with_pipes.add(self)

    def let_go(self) -> None:
        """Close the ends of others' pipes; what is asked of it from here on fails."""
        for close in self._letting_go:
            close()
        self._told = [_NONE] * len(self._told)

    def wait(self) -> None:
        """Return once all ranks have come. Raises PeerGone."""
        self._num_met += 1
        for turn in range(len(self._told)):
            self._tell(turn)
            self._hear(turn)

    def _tell(self, turn: int) -> None:
        try:
            os.write(self._told[turn], bytes((self._num_met % _NUM_NUMBERS,)))
        except OSError as error:
            raise PeerGone(f"{self._ahead[turn]} cannot be told: {error}") from error

    def _hear(self, turn: int) -> None:
        name = self._behind[turn]
        poll = self._polls[turn]
        # After a signal Python waits for the rest of the time; where this process was stopped for long there is none,
        # and it has not looked at what has come meanwhile.
        if not poll.poll(min(self._timeout_s * 1000, _POLL_MS_MAX)) and not poll.poll(0):
            raise PeerGone(f"{name} does not answer within {self._timeout_s:g} s")
        number = os.read(self._inbox.reading[turn], 1)
        if not number:
            raise PeerGone(f"{name} has closed its connection")
        if number[0] != self._num_met % _NUM_NUMBERS:
            raise RuntimeError(f"{name} is at another exchange: an error has kept one of these ranks from some before")


def _let_go_of_all() -> None:
    """A process that a rank forks is none of the group, and would keep its pipes from ending with the rank."""
    for one in list(_with_pipes):
        one.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)
