"""The zips that `torch.save` writes, as far as their checksums and places go. Needs no torch."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from storage.errors import Corrupt
from storage.objects import Buffer

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def check_zip(data: Buffer, name: str) -> None:
    """Verify the CRC32 that the zip holds for each of its members; stock DCP items have no other checksum.

    A CRC of 0 means that the writer had switched checksums off; nothing is verified then.

    Raises:
        Corrupt: a member differs from its checksum, or `data` is no zip.
    """
    view = memoryview(data)
    try:
        with zipfile.ZipFile(io.BytesIO(view)) as archive:
            for member in archive.infolist():
                start = member_start(view, member.header_offset)
                body = view[start : start + member.file_size]
                if member.CRC and zlib.crc32(body) != member.CRC:
                    raise Corrupt(f"{name} is damaged: checksum of {member.filename} does not match")
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise Corrupt(f"{name} is damaged: {error}") from None


def member_start(data: memoryview, header_offset: int) -> int:
    """Where a stored member's bytes begin. Raises BadZipFile, struct.error."""
    fields = _LOCAL_HEADER.unpack_from(data, header_offset)
    if fields[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no member where the directory says")
    return int(header_offset + _LOCAL_HEADER.size + fields[9] + fields[10])
