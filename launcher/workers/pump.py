"""Carries a job's output to the console, and goes on when that is gone.

`python -I -S pump.py NOTICE_FD IN_FD:OUT_FD:NAME ...` reads each IN until nobody holds its other end any more. What OUT
does not take (a reader that has gone, as in `| head`; a full disk) is dropped, and told on NOTICE by a line each time
that this begins. A process of its own: it outlives an agent that is killed until the workers' last words are through,
and a slow console keeps nobody waiting but those who write to it.
"""

from __future__ import annotations

import errno
import os
import select
import sys

_CHUNK_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Stream:
    def __init__(self, source: int, target: int, name: str) -> None:
        self._source, self._target, self._name = source, target, name
        self._gone = False
        self._full = False

    def carry(self, notice: int) -> bool:
        """Carry one piece on; returns False at the end of the stream."""
        data = os.read(self._source, _CHUNK_BYTES)
        if data and not self._gone:
            try:
                self._write(data)
                self._full = False
            except OSError as error:
                if not self._full:
                    _tell(notice, f"{self._name}: {error.strerror}")
                self._full = error.errno in _FULL  # there may be room again
                self._gone = not self._full
        return bool(data)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._target, data) :]
            except BlockingIOError:
                select.select([], [self._target], [])


def _tell(notice: int, text: str) -> None:
    try:
        os.write(notice, f"{text}\n".encode())
    except OSError:
        return  # the agent is gone as well


def main(argv: list[str]) -> None:
    """Carry all streams until every source has ended."""
    notice = int(argv[1])
    poll = select.poll()
    streams: dict[int, _Stream] = {}
    for told in argv[2:]:
        source, target, name = told.split(":")
        streams[int(source)] = _Stream(int(source), int(target), name)
        poll.register(int(source), select.POLLIN)
    while streams:
        for fd, _ in poll.poll():
            if not streams[fd].carry(notice):
                poll.unregister(fd)
                del streams[fd]


if __name__ == "__main__":
    main(sys.argv)
