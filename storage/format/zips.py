"""The zips that `torch.save` writes, as far as their checksums and places go. Needs no torch."""

from __future__ import annotations

import io
import struct
import threading
import zipfile
from collections.abc import Sequence

from typing_extensions import Buffer as Writable

from storage.errors import Corrupt
from storage.format.checksum import combine_crc32, crc32
from storage.stores.objects import Buffer

ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError)
"""What reading a damaged one raises."""
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class OutOfSight(Exception):
    """What was asked for is in no known part of the file."""


class Window(io.RawIOBase):
    """A file of `length` bytes of which only the parts (start, bytes) are known; nothing of them is copied."""

    def __init__(self, length: int, parts: Sequence[tuple[int, memoryview]]) -> None:
        super().__init__()
        self._length = length
        self._parts = parts
        self._at = 0

    def view(self, start: int, size_bytes: int) -> memoryview | None:
        """Those bytes, if one part has all of them."""
        for begin, part in self._parts:
            if begin <= start and start + size_bytes <= begin + part.nbytes:
                return part[start - begin : start - begin + size_bytes]
        return None

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As a file's. Raises ValueError for a place before the file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Writable) -> int:
        """As a file's, up to the end of a part. Raises OutOfSight."""
        target = memoryview(buffer).cast("B")
        if self._at >= self._length or not target.nbytes:
            return 0
        for begin, part in self._parts:
            if begin <= self._at < begin + part.nbytes:
                found = part[self._at - begin :][: target.nbytes]
                target[: found.nbytes] = found
                self._at += found.nbytes
                return found.nbytes
        raise OutOfSight


class RunningSum:
    """The CRC32 of the bytes [start, stop) of a zip, from parts that come in any order and from any thread.

    `crc32`: what it must be; 0 means that the writer had switched checksums off.
    """

    def __init__(self, start: int, stop: int, crc32: int, name: str) -> None:
        self._start = start
        self._stop = stop
        self._crc32 = crc32
        self._name = name
        self._lock = threading.Lock()
        self._parts: dict[int, tuple[int, int]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every byte has come."""
        return sum(size for size, _ in self._parts.values()) == self._stop - self._start

    def add(self, at: int, data: memoryview) -> None:
        """The bytes of the zip from `at` on; the same ones once more take the place of the first."""
        low, high = max(at, self._start), min(at + data.nbytes, self._stop)
        if low >= high:
            return
        crc = crc32(data[low - at : high - at])
        with self._lock:
            self._parts[low] = high - low, crc

    def check(self) -> None:
        """When every byte has come. Raises Corrupt unless they are what was written."""
        assert self.is_complete, "bytes were planned without their checksum"
        if self._crc32 and self._joined() != self._crc32:
            raise Corrupt(f"{self._name} is damaged: checksum of its tensor does not match")

    def _joined(self) -> int:
        crc = 0
        for _, (size, of_part) in sorted(self._parts.items()):
            crc = combine_crc32(crc, of_part, size)
        return crc


def check_zip(data: Buffer, name: str) -> None:
    """Verify the CRC32 that the zip holds for each of its members; stock DCP items have no other checksum.

    A CRC of 0 means that the writer had switched checksums off; nothing is verified then.

    Raises:
        Corrupt: a member differs from its checksum, or `data` is no zip.
    """
    view = memoryview(data)
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(view.nbytes, ((0, view),)))) as archive:
            for member in archive.infolist():
                start = member_start(view, member.header_offset)
                body = view[start : start + member.file_size]
                if member.CRC and crc32(body) != member.CRC:
                    raise Corrupt(f"{name} is damaged: checksum of {member.filename} does not match")
    except ZIP_ERRORS as error:
        raise Corrupt(f"{name} is damaged: {error}") from None


def member_start(data: memoryview, header_offset: int) -> int:
    """Where a stored member's bytes begin. Raises BadZipFile, struct.error."""
    fields = _LOCAL_HEADER.unpack_from(data, header_offset)
    if fields[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no member where the directory says")
    return int(header_offset + _LOCAL_HEADER.size + fields[9] + fields[10])
