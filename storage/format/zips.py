"""The zips that `torch.save` writes, as far as their checksums and places go. Needs no torch."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Sequence

from typing_extensions import Buffer as Writable

from storage.errors import Corrupt
from storage.format.checksum import crc32

ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError)
"""What reading a damaged one raises."""
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")

Parts = Sequence[tuple[int, memoryview]]
"""Some parts of a file: where each begins, and its bytes."""


class OutOfSight(Exception):
    """What was asked for is in no known part of the file."""


class Window(io.RawIOBase):
    """A file of `length` bytes of which only the parts (start, bytes) are known; nothing of them is copied."""

    def __init__(self, length: int, parts: Parts) -> None:
        super().__init__()
        self._length = length
        self._parts = parts
        self._at = 0

    def view(self, start: int, size_bytes: int) -> memoryview | None:
        """The bytes [start, start + size_bytes), without a copy; None unless one part has all of them."""
        for begin, part in self._parts:
            if begin <= start and start + size_bytes <= begin + part.nbytes:
                return part[start - begin : start - begin + size_bytes]
        return None

    def readable(self) -> bool:
        """Whether the file can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether `seek` works: always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, as in any file. Raises ValueError for a place before the file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a place before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Writable) -> int:
        """Read as from any file, but at most up to the end of a part. Raises OutOfSight where no part is."""
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


def check_zip(parts: Parts, name: str) -> bool:
    """Verify the CRC32 that a zip holds for each of its members; stock DCP items have no other checksum.

    `parts` make up the zip, in order. Returns whether every member has a CRC32: 0 means that the writer had switched
    checksums off, and nothing is verified then.

    Raises:
        Corrupt: a member differs from its checksum, or this is no zip.
    """
    window = Window(parts[-1][0] + parts[-1][1].nbytes, parts)
    is_summed = True
    try:
        file = io.BufferedReader(window)
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                header = window.view(member.header_offset, _LOCAL_HEADER.size)
                if header is None:
                    file.seek(member.header_offset)
                    header = memoryview(file.read(_LOCAL_HEADER.size))
                start = member.header_offset + member_start(header, 0)
                is_summed &= bool(member.CRC)
                if member.CRC and _crc32_of(parts, start, start + member.file_size) != member.CRC:
                    raise Corrupt(f"{name} is damaged: checksum of {member.filename} does not match")
    except ZIP_ERRORS as error:
        raise Corrupt(f"{name} is damaged: {error}") from None
    return is_summed


def _crc32_of(parts: Parts, start: int, stop: int) -> int:
    crc = 0
    for begin, part in parts:
        low, high = max(start, begin), min(stop, begin + part.nbytes)
        if low < high:
            crc = crc32(part[low - begin : high - begin], crc)
    return crc


def member_start(data: memoryview, header_offset: int) -> int:
    """Where a stored member's bytes begin. Raises BadZipFile, struct.error."""
    fields = _LOCAL_HEADER.unpack_from(data, header_offset)
    if fields[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no member where the directory says")
    return int(header_offset + _LOCAL_HEADER.size + fields[9] + fields[10])
