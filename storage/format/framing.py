"""What `torch.save` puts around a tensor's bytes, for the next tensor of that dtype and shape. Pure; needs no torch.

Of the zip that it writes only this depends on those bytes: their CRC32, behind them and in the zip's directory, and
half of the serialization id, which is made of the CRC32 of every member, with the CRC32 of that id
(`PyTorchStreamWriter::writeSerializationId` in torch's caffe2/serialize/inline_container.cc). So who has the CRC32 has
the zip, and a CRC32 can be had several times as fast as from `torch.save`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

from storage.format.checksum import crc32
from storage.format.zips import ZIP_ERRORS, OutOfSight, Window, member_start
from storage.stores.buffers import Buffer

DESCRIPTOR = b"PK\x07\x08"
"""How what follows a member's bytes begins; the CRC32 is next."""
_ENTRY = struct.Struct("<4s6H3I3H12x")  # of the zip's directory
_CRC32 = struct.Struct("<I")
_CRC32_IN_ENTRY = 16
_HAS_DESCRIPTOR = 0x8
_NUM_DIGITS = 20  # of each half of the id
_DATA, _IDENTITY = "/data/0", "/.data/serialization_id"


@dataclass(frozen=True)
class Framing:
    """A zip without the tensor's bytes, which are between `head` and the tail.

    `data_places`, `identity_places`: where in the tail the CRC32 of the tensor's bytes and that of the id stand.
    `identity_at`: where in it the id begins. `crcs_before`: of the members before the tensor's bytes, combined.
    """

    head: bytes
    last: bytes
    data_places: tuple[int, ...]
    identity_at: int
    identity_places: tuple[int, ...]
    crcs_before: int
    crcs_after: tuple[int, ...]

    def tail(self, of_data: int) -> bytes:
        """What follows the tensor's bytes in the zip, if their CRC32 is `of_data`."""
        tail = bytearray(self.last)
        for place in self.data_places:
            _CRC32.pack_into(tail, place, of_data)
        combined = _combined((of_data, *self.crcs_after), self.crcs_before)
        half = self.identity_at + _NUM_DIGITS
        tail[half : half + _NUM_DIGITS] = f"{combined:0{_NUM_DIGITS}d}".encode()
        of_identity = crc32(tail[self.identity_at : half + _NUM_DIGITS])
        for place in self.identity_places:
            _CRC32.pack_into(tail, place, of_identity)
        return bytes(tail)


@dataclass(frozen=True)
class EncodedItem:
    """An item ready to be stored: the concatenation of `buffers`.

    The tensor's own memory is among the buffers, uncopied, `raw_offset` bytes from the start; it must not change
    before the item is stored.
    """

    buffers: tuple[Buffer, ...]
    raw_offset: int
    length: int


@dataclass(frozen=True)
class FramedItem:
    """A tensor's item of which all is known but the CRC32 of its bytes. These must not change before it is stored."""

    framing: Framing
    data: memoryview

    @property
    def raw_offset(self) -> int:
        """Where the tensor's bytes begin."""
        return len(self.framing.head)

    @property
    def length(self) -> int:
        """The length of the whole item, in bytes."""
        return len(self.framing.head) + self.data.nbytes + len(self.framing.last)


def framing_of(head: bytes, data: Buffer, tail: bytes) -> Framing | None:
    """The framing of the zip that is `head`, a tensor's bytes and `tail`; None unless it makes the same zip again."""
    try:
        framing = _parsed(head, len(data), tail)
    except (OutOfSight, StopIteration, *ZIP_ERRORS):
        return None
    return framing if framing.tail(crc32(data)) == tail else None


MISREAD_BYTES = 8
"""Of how many of a tensor's first bytes `is_misread` asks."""


def is_misread(data: Buffer) -> bool:
    """Whether torch takes the tensor's bytes for a descriptor, and a number from them into the id."""
    return len(data) >= MISREAD_BYTES and bytes(data[: len(DESCRIPTOR)]) == DESCRIPTOR


def _parsed(head: bytes, size_bytes: int, tail: bytes) -> Framing:
    begin = len(head) + size_bytes
    ends = ((0, memoryview(head)), (begin, memoryview(tail)))
    with zipfile.ZipFile(io.BufferedReader(Window(begin + len(tail), ends))) as archive:
        members, directory = archive.infolist(), archive.start_dir
    data = next(member for member in members if member.filename.endswith(_DATA))
    identity = next(member for member in members if member.filename.endswith(_IDENTITY))
    entries = _entries(tail, directory - begin, len(members))
    identity_at = member_start(memoryview(tail), identity.header_offset - begin)
    behind_identity = identity_at + 2 * _NUM_DIGITS
    if not (
        member_start(memoryview(head), data.header_offset) == len(head)
        and tail.startswith(DESCRIPTOR)
        and tail.startswith(DESCRIPTOR, behind_identity)
        and data.flag_bits & identity.flag_bits & _HAS_DESCRIPTOR
    ):
        raise zipfile.BadZipFile("checksums are elsewhere")
    described = [member for member in members if member.flag_bits & _HAS_DESCRIPTOR and member is not identity]
    described.sort(key=lambda member: member.header_offset)
    place = described.index(data)
    return Framing(
        head=head,
        last=tail,
        data_places=(len(DESCRIPTOR), entries[members.index(data)] + _CRC32_IN_ENTRY),
        identity_at=identity_at,
        identity_places=(behind_identity + len(DESCRIPTOR), entries[members.index(identity)] + _CRC32_IN_ENTRY),
        crcs_before=_combined([member.CRC for member in described[:place]], 0),
        crcs_after=tuple(member.CRC for member in described[place + 1 :]),
    )


def _entries(tail: bytes, at: int, num_members: int) -> list[int]:
    """Where each entry of the directory begins. Raises struct.error, BadZipFile."""
    places = []
    for _ in range(num_members):
        signature, *_, name, extra, comment = _ENTRY.unpack_from(tail, at)
        if signature != b"PK\x01\x02":
            raise zipfile.BadZipFile("no entry of the directory")
        places.append(at)
        at += _ENTRY.size + name + extra + comment
    return places


def _combined(crcs: Sequence[int], combined: int) -> int:
    """As torch combines hashes, in 64 bits (`c10::hash_combine`)."""
    for crc in crcs:
        combined ^= (crc + 0x9E3779B9 + (combined << 6) + (combined >> 2)) & 0xFFFF_FFFF_FFFF_FFFF
    return combined
