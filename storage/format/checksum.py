"""CRC32C of byte ranges, and the blocks that a data item is checked by.

An item (one `torch.save` zip) is cut into blocks of equal, power-of-two size, counted from the item's first byte,
so that the zip's own framing is covered too. Each block has a CRC32C: whoever reads part of an item reads whole
blocks, verifies them, and keeps the bytes it wanted. The block size grows with the item (a 512th of it, from 16 KiB
up to 8 MiB), which bounds both costs at once: a reader fetches at most two blocks (0.4 %) more than it wants of an
item, and an item's checksums take at most 2 KiB below 4 GiB.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Sequence

from awscrt import checksums
from isal import isal_zlib

from storage.errors import Corrupt
from storage.stores.buffers import Buffer

BLOCK_SIZE_BYTES_MIN = 16 * 1024
BLOCK_SIZE_BYTES_MAX = 8 * 1024 * 1024
_BLOCKS_PER_ITEM = 512
CACHED_SIZE_BYTES = 256 * 1024
"""Of what a processor's core still has in its cache when it is read again at once."""


def crc32c(buffer: Buffer, crc: int = 0) -> int:
    """CRC32C (Castagnoli) of `buffer`, continued from `crc`. Other threads run meanwhile."""
    return int(checksums.crc32c(buffer, crc))


def crc32(buffer: Buffer, crc: int = 0) -> int:
    """zlib's CRC32 of `buffer`, the checksum of zips, continued from `crc`; several times as fast as zlib makes it."""
    return int(isal_zlib.crc32(buffer, crc))


def combine_crc32c(first: int, second: int, second_length_bytes: int) -> int:
    """CRC32C of two pieces laid end to end, from that of each: a block may be read in parts that end in any order."""
    return int(checksums.combine_crc32c(first, second, second_length_bytes))


def combine_crc32(first: int, second: int, second_length_bytes: int) -> int:
    """zlib's CRC32, the checksum of zips, of two pieces laid end to end, from that of each."""
    return int(checksums.combine_crc32(first, second, second_length_bytes))


def block_size_bytes(item_length_bytes: int) -> int:
    """The block size of an item of that length; see the module's docstring."""
    share = max(1, -(-item_length_bytes // _BLOCKS_PER_ITEM))
    return min(max(1 << (share - 1).bit_length(), BLOCK_SIZE_BYTES_MIN), BLOCK_SIZE_BYTES_MAX)


class BlockCrcs:
    """CRC32C of bytes that are added one after the other, and of every block of `size_bytes` of them.

    The last block may be shorter.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._ended: list[int] = []
        self._ended_whole = 0
        self._open, self._open_bytes = 0, 0

    @property
    def blocks(self) -> list[int]:
        """The CRC32C of every block so far, the open one included."""
        return [*self._ended, self._open] if self._open_bytes else list(self._ended)

    @property
    def whole(self) -> int:
        """The CRC32C of all bytes so far."""
        return combine_crc32c(self._ended_whole, self._open, self._open_bytes)

    def add(self, data: memoryview) -> None:
        """Continue with the bytes that come next."""
        at = 0
        while at < data.nbytes:
            taken = data[at : at + self.size_bytes - self._open_bytes]
            self._open = crc32c(taken, self._open)
            self._open_bytes += taken.nbytes
            at += taken.nbytes
            if self._open_bytes == self.size_bytes:
                self._ended_whole = self.whole
                self._ended.append(self._open)
                self._open, self._open_bytes = 0, 0


def bites(data: memoryview) -> Iterator[memoryview]:
    """The data, in pieces that fit into a core's cache: who takes two checksums of them reads memory once."""
    return (data[at : at + CACHED_SIZE_BYTES] for at in range(0, data.nbytes, CACHED_SIZE_BYTES))


def pack_crcs(crcs: Sequence[int]) -> str:
    """Base64 of the CRCs as little-endian 32-bit words: how the manifest holds them."""
    return base64.b64encode(struct.pack(f"<{len(crcs)}I", *crcs)).decode("ascii")


def unpack_crcs(text: str) -> tuple[int, ...]:
    """The CRCs that `pack_crcs` has packed. Raises Corrupt if `text` is no such list."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Corrupt(f"not a list of checksums: {error}") from None
    if len(raw) % 4:
        raise Corrupt("not a list of checksums: length is no multiple of 4")
    return struct.unpack(f"<{len(raw) // 4}I", raw)
