"""Ranks of one machine wait for each other by pipes, and hear of one that is gone."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import select
import stat
import threading
from collections.abc import Callable

import pytest

from elastic_moe.parallel.barrier import Inbox, PeerGone, PipeBarrier, PipeEnd, distances

TIMEOUT_S = 60.0


def barriers(num_ranks: int, timeout_s: float = TIMEOUT_S) -> list[PipeBarrier]:
    """Of all ranks of a group, which are threads here."""
    inboxes = [Inbox(num_ranks) for _ in range(num_ranks)]
    names = [f"rank {rank}" for rank in range(num_ranks)]
    found = []
    for rank, inbox in enumerate(inboxes):
        ahead = [inboxes[(rank + distance) % num_ranks] for distance in distances(num_ranks)]
        told = [other.ends[turn].open(os.getpid()) for turn, other in enumerate(ahead)]
        found.append(PipeBarrier(rank, names, inbox, told, timeout_s))
    for inbox in inboxes:
        inbox.close_ends()
    return found


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8, 13])
def test_nobody_goes_on_before_all_have_come(num_ranks: int) -> None:
    come, missing, draw = [0] * num_ranks, list[str](), random.Random(num_ranks)
    late = [draw.randrange(num_ranks) for _ in range(300)]

    def work(rank: int, barrier: PipeBarrier) -> None:
        for turn, who in enumerate(late):
            if rank == who:
                sum(range(2000))
            come[rank] = turn + 1
            barrier.wait()
            missing.extend(f"turn {turn}: rank {rank} saw {seen}" for seen in come if seen not in (turn + 1, turn + 2))

    in_threads([lambda r=rank, b=barrier: work(r, b) for rank, barrier in enumerate(barriers(num_ranks))])
    assert come == [len(late)] * num_ranks
    assert not missing


def in_threads(calls: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a rank still waits"


def test_a_rank_that_is_gone_is_named() -> None:
    mine, other = barriers(2)
    del other
    gc.collect()
    with pytest.raises(PeerGone, match="rank 1 cannot be told"):
        mine.wait()


def test_a_rank_that_goes_while_it_is_waited_for_is_named() -> None:
    mine, *others = barriers(3)
    told = list[str]()

    def wait() -> None:
        try:
            mine.wait()
        except PeerGone as error:
            told.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert others[0]._polls[0].poll(TIMEOUT_S * 1000), "it has told the one ahead"
    others[1]._num_met = 1
    others[1]._tell(0)  # the one behind has come; in the next round the one before it is waited for
    others.clear()
    gc.collect()
    waiting.join(TIMEOUT_S)
    assert told and told[0] in ("rank 1 has closed its connection", "rank 2 cannot be told: [Errno 32] Broken pipe")


def test_a_rank_that_does_not_come_is_waited_for_so_long() -> None:
    mine, _other = barriers(2, timeout_s=0.05)
    with pytest.raises(PeerGone, match=r"rank 1 does not answer within 0\.05 s"):
        mine.wait()


def test_ranks_that_are_not_at_the_same_exchange_find_out() -> None:
    mine, other = barriers(2)
    other._num_met = 2  # this one was kept from its first
    other._tell(0)
    with pytest.raises(RuntimeError, match="rank 1 is at another exchange"):
        mine.wait()


def test_what_has_come_while_a_rank_was_stopped_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is handled after longer than the wait: Python takes the time for over without another look."""

    class Interrupted:
        def __init__(self, poll: select.poll) -> None:
            self.poll_now, self.num_asked = poll.poll, 0

        def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
            self.num_asked += 1
            return [] if self.num_asked == 1 else self.poll_now(timeout_ms)

    mine, other = barriers(2)
    monkeypatch.setattr(mine, "_polls", [Interrupted(poll) for poll in mine._polls])
    other._num_met = 1
    other._tell(0)
    mine.wait()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_a_rank_forks_keeps_no_pipe_from_ending() -> None:
    """Nor does it speak for the rank."""
    found = barriers(3)
    inodes = {os.fstat(fd).st_ino for barrier in found for fd in barrier._inbox.reading}
    pid = os.fork()
    if not pid:
        told = 0
        for barrier in found:
            try:
                barrier.wait()
            except PeerGone:
                told += 1
        os._exit(num_open(inodes) + 3 - told)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    in_threads([barrier.wait for barrier in found])


def test_only_that_very_pipe_is_written_to() -> None:
    inbox, (reading, writing) = Inbox(2), os.pipe()
    (end,) = inbox.ends
    try:
        os.close(end.open(os.getpid()))
        for strange in (PipeEnd(writing, end.inode), PipeEnd(end.fd, end.inode + 1), PipeEnd(end.fd + 1000, end.inode)):
            with pytest.raises(OSError):
                strange.open(os.getpid())
    finally:
        os.close(reading)
        os.close(writing)


def test_nothing_stays_open() -> None:
    found = barriers(5)
    inodes = {os.fstat(fd).st_ino for barrier in found for fd in barrier._inbox.reading}
    assert len(inodes) == 5 * 3, "by round"
    assert num_open(inodes) == 5 * 3 * 2, "one to hear by and one to tell by"
    del found
    gc.collect()
    assert num_open(inodes) == 0


def num_open(inodes: set[int]) -> int:
    """How many ends of these pipes are open; what else is in this process comes and goes."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the list itself, say
            status = os.stat(f"/proc/self/fd/{name}")
            found += stat.S_ISFIFO(status.st_mode) and status.st_ino in inodes
    return found
