"""What the bytes of an item must be. A `Verifier` for each kind: blocks of ours, a stock zip, a streamed stock zip.

Places are bytes of the item's object. Parts come in any order and from any thread; one that comes again takes the place
of what came before, as whoever met damage reads it once more.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from storage.errors import Corrupt
from storage.format.checksum import combine_crc32, combine_crc32c, crc32, crc32c
from storage.format.columns import Ints
from storage.format.zips import Parts, check_zip


class Verifier(Protocol):
    """Compares bytes of one object with their checksums."""

    is_joint: bool
    """Whether only all bytes together can be judged: then `take` must be given every one, and `check` has the answer.
    Else `take` has it for whole blocks."""

    @property
    def is_complete(self) -> bool:
        """Whether all bytes have come that a judgement needs."""

    def take(self, at: int, data: memoryview) -> None:
        """The bytes of the object from `at` on. Raises Corrupt if it can be told by now that some are damaged."""

    def check(self) -> None:
        """Raise Corrupt unless what has come is what was written; to be asked once it is complete."""


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Blocks that follow each other without gaps: where each starts, ascending, where the last stops, its CRC32C."""

    starts: Ints | range
    stop: int
    crcs: npt.NDArray[np.uint32]

    def within(self, start: int, stop: int) -> tuple[int, list[int], list[int]]:
        """The blocks that have bytes in [start, stop): the first one's number, their edges, their CRC32C."""
        first = bisect.bisect_right(self.starts, start) - 1
        last = bisect.bisect_left(self.starts, stop)
        end = self.starts[last] if last < len(self.starts) else self.stop
        return first, [*map(int, self.starts[first:last]), int(end)], self.crcs[first:last].tolist()


_joining = threading.Lock()  # a few numbers at a time, and only of blocks that lie in several parts


class BlockVerifier:
    """Blocks of ours, each with a CRC32C. A block that lies in several parts is judged with the last of them."""

    is_joint = False
    is_complete = True

    def __init__(self, key: str, sums: BlockSums) -> None:
        self._key = key
        self._sums = sums
        self._fragments: dict[int, dict[int, tuple[int, int]]] = {}

    def take(self, at: int, data: memoryview) -> None:
        """See `Verifier.take`."""
        stop = at + data.nbytes
        first, edges, crcs = self._sums.within(at, stop)
        if (edges[0], edges[-1]) == (at, stop):  # as most are, of memory that is read at tens of GB/s
            found = [crc32c(data[begin - at : end - at]) for begin, end in itertools.pairwise(edges)]
            if found == crcs:
                return
        damaged = []
        for number, expected in enumerate(crcs):
            begin, end = edges[number], edges[number + 1]
            low, high = max(begin, at), min(end, stop)
            crc: int | None = crc32c(data[low - at : high - at])
            if (low, high) != (begin, end):
                crc = self._joined(first + number, (begin, end), (low, high), crc)
            if crc not in (None, expected):
                damaged.append(begin)
        if damaged:
            more = f", nor do those of {len(damaged) - 1} more blocks behind it" if damaged[1:] else ""
            raise Corrupt(f"{self._key} is damaged: checksum at byte {damaged[0]} does not match{more}", self._key)

    def check(self) -> None:
        """Do nothing: `take` has judged every block."""

    def _joined(self, number: int, block: tuple[int, int], fragment: tuple[int, int], crc: int | None) -> int | None:
        """The CRC32C of a block of which a fragment has come; None until the others have."""
        assert crc is not None
        at, stop = block
        with _joining:
            fragments = self._fragments.setdefault(number, {})
            fragments[fragment[0]] = fragment[1] - fragment[0], crc
            whole = 0
            while at in fragments:
                length, of_fragment = fragments[at]
                whole = combine_crc32c(whole, of_fragment, length)
                at += length
            return whole if at == stop else None


class ZipVerifier:
    """A zip as stock DCP stores them, of bytes [start, stop): each of its members has a CRC32, told at its end.

    It is judged in memory: at once where it comes in one part, else (`is_joint`) when all parts are there, which are
    held until then.
    """

    def __init__(self, key: str, start: int, stop: int, *, is_joint: bool) -> None:
        self.is_joint = is_joint
        self._key = key
        self._start = start
        self._stop = stop
        self._lock = threading.Lock()
        self._parts: dict[int, memoryview] = {}

    @property
    def is_complete(self) -> bool:
        """See `Verifier.is_complete`."""
        with self._lock:
            size_bytes = sum(part.nbytes for part in self._parts.values())
        return not self.is_joint or size_bytes == self._stop - self._start

    def take(self, at: int, data: memoryview) -> None:
        """See `Verifier.take`. The memory of a part of several must stay what it is until all are judged."""
        if self.is_joint:
            with self._lock:
                self._parts[at - self._start] = data
        else:
            self._judge([(0, data)])

    def check(self) -> None:
        """See `Verifier.check`."""
        if self.is_joint:
            self._judge(sorted(self._parts.items()))

    def _judge(self, parts: Parts) -> None:
        from storage.format.values import check_sense  # needs torch

        name = f"{self._key} at byte {self._start}"
        try:
            if not check_zip(parts, name):
                check_sense(b"".join(part for _, part in parts), name)
        except Corrupt as error:
            raise Corrupt(str(error), self._key) from None


class StreamedZipVerifier:
    """A long zip of stock DCP of which it is known where its tensor's bytes [start, stop) lie: they are summed as they
    pass. `crc32`: what their CRC32 must be; 0 means that the writer had switched checksums off.
    """

    is_joint = True

    def __init__(self, key: str, start: int, stop: int, crc32: int) -> None:
        self._key = key
        self._start = start
        self._stop = stop
        self._crc32 = crc32
        self._lock = threading.Lock()
        self._parts: dict[int, tuple[int, int]] = {}

    @property
    def is_complete(self) -> bool:
        """See `Verifier.is_complete`."""
        with self._lock:
            return sum(size for size, _ in self._parts.values()) == self._stop - self._start

    def take(self, at: int, data: memoryview) -> None:
        """See `Verifier.take`."""
        low, high = max(at, self._start), min(at + data.nbytes, self._stop)
        if low < high:
            crc = crc32(data[low - at : high - at])
            with self._lock:
                self._parts[low] = high - low, crc

    def check(self) -> None:
        """See `Verifier.check`."""
        assert self.is_complete, "bytes were planned without their checksum"
        crc = 0
        for _, (size, of_part) in sorted(self._parts.items()):
            crc = combine_crc32(crc, of_part, size)
        if self._crc32 not in (0, crc):
            raise Corrupt(f"{self._key} is damaged: checksum of its tensor does not match", self._key)


class ObjectVerifier:
    """Several items of one object, each judged by its own verifier as soon as all of its bytes have passed."""

    is_joint = True

    def __init__(self, verifiers: Sequence[tuple[int, int, Verifier]]) -> None:
        """`verifiers` are of the items at bytes [start, stop), in the order of their places."""
        self._verifiers = verifiers
        self._left = dict.fromkeys(range(len(verifiers)))

    @property
    def is_complete(self) -> bool:
        """See `Verifier.is_complete`."""
        return not self._left

    def take(self, at: int, data: memoryview) -> None:
        """See `Verifier.take`."""
        end = at + data.nbytes
        first = bisect.bisect_right(self._verifiers, at, key=lambda row: row[1])
        last = bisect.bisect_left(self._verifiers, end, key=lambda row: row[0])
        for number in range(first, last):
            start, stop, verifier = self._verifiers[number]
            low, high = max(start, at), min(stop, end)
            verifier.take(low, data[low - at : high - at])
            if verifier.is_complete:
                verifier.check()
                self._left.pop(number, None)

    def check(self) -> None:
        """Do nothing: `take` has judged every item whose bytes have all come."""
