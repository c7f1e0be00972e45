"""Items on their way into an object: encoded and checksummed while the bytes before them are sent already.

How long an item is, is known before its bytes are, and so is where each lies in its object.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Generator, Sequence

from storage.format.checksum import BlockCrcs, bites, block_size_bytes, crc32
from storage.format.framing import EncodedItem, FramedItem


class Encoding:
    """The bytes of one item, made from front to back as they are asked for, each of them once. Thread-safe."""

    def __init__(self, item: EncodedItem | FramedItem) -> None:
        self.length = item.length
        self.raw_offset = item.raw_offset
        self.crcs = BlockCrcs(block_size_bytes(item.length))
        """The checksums of all that has been asked for."""
        self._lock = threading.Lock()
        self._made: list[memoryview] = []
        self._made_bytes = 0
        self._failure: Exception | None = None
        self._course = self._framed(item) if isinstance(item, FramedItem) else self._encoded(item)

    def views(self, start: int, stop: int) -> list[memoryview]:
        """Bytes [start, stop) of the item; nothing is copied."""
        while self._make_some(stop):
            pass  # a bite at a time, so that who wants less has it as soon as it is made
        found, at, made = [], 0, list(self._made)
        for view in made:
            found.append(view[max(0, start - at) : max(0, stop - at)])
            at += view.nbytes
        return [view for view in found if view.nbytes]

    def _make_some(self, stop: int) -> bool:
        """Make the next bytes, unless all before `stop` are there."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._made_bytes >= stop:
                return False
            try:
                self._made_bytes += next(self._course)
                if self._made_bytes >= self.length:
                    self._course.close()  # its frame and this object hold each other, and with them the item's memory
            except Exception as error:
                self._failure = error
                raise
            return True

    def _encoded(self, item: EncodedItem) -> Generator[int, None, None]:
        """Take the next bytes into the checksums; returns their length."""
        for buffer in item.buffers:
            self._made.append(memoryview(buffer).cast("B"))
            for bite in bites(self._made[-1]):
                self.crcs.add(bite)
                yield bite.nbytes

    def _framed(self, item: FramedItem) -> Generator[int, None, None]:
        self._made += [memoryview(item.framing.head), item.data]
        self.crcs.add(self._made[0])
        yield len(item.framing.head)
        of_data = 0
        for bite in bites(item.data):
            of_data = crc32(bite, of_data)
            self.crcs.add(bite)  # out of the cache, this time
            yield bite.nbytes
        tail = memoryview(item.framing.tail(of_data))
        self._made.append(tail)
        self.crcs.add(tail)
        yield tail.nbytes


class ObjectContent:
    """Items that lie one after the other in an object."""

    def __init__(self, items: Sequence[Encoding]) -> None:
        self.items = items
        self.offsets = list(itertools.accumulate((item.length for item in items), initial=0))

    @property
    def size_bytes(self) -> int:
        """Length of the whole object."""
        return self.offsets[-1]

    def fetch(self, offset: int, length: int) -> list[memoryview]:
        """See `storage.stores.objects.Fetch`."""
        found: list[memoryview] = []
        for number in range(bisect.bisect_right(self.offsets, offset) - 1, len(self.items)):
            start = self.offsets[number]
            if start >= offset + length:
                break
            found += self.items[number].views(
                max(0, offset - start), min(self.items[number].length, offset + length - start)
            )
        return found
