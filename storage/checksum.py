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
from collections.abc import Sequence

from awscrt import checksums
from isal import isal_zlib

from storage.errors import Corrupt
from storage.objects import Buffer

BLOCK_SIZE_BYTES_MIN = 16 * 1024
BLOCK_SIZE_BYTES_MAX = 8 * 1024 * 1024
_BLOCKS_PER_ITEM = 512


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
    """The same of zlib's CRC32, the checksum of zips."""
    return int(checksums.combine_crc32(first, second, second_length_bytes))


def block_size_bytes(item_length_bytes: int) -> int:
    """The block size of an item of that length; see the module's docstring."""
    share = max(1, -(-item_length_bytes // _BLOCKS_PER_ITEM))
    return min(max(1 << (share - 1).bit_length(), BLOCK_SIZE_BYTES_MIN), BLOCK_SIZE_BYTES_MAX)


def item_crcs(buffers: Sequence[Buffer], size_bytes: int) -> tuple[int, list[int]]:
    """CRC32C of the concatenation of `buffers`, and of every block of `size_bytes` of it; the last may be shorter."""
    crcs: list[int] = []
    whole, crc, filled = 0, 0, 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        at = 0
        while at < view.nbytes:
            taken = view[at : at + size_bytes - filled]
            crc = crc32c(taken, crc)
            at += taken.nbytes
            filled += taken.nbytes
            if filled == size_bytes:
                crcs.append(crc)
                whole = combine_crc32c(whole, crc, filled)
                crc, filled = 0, 0
    return (combine_crc32c(whole, crc, filled), [*crcs, crc]) if filled else (whole, crcs)


def pack_crcs(crcs: Sequence[int]) -> str:
    """Base64 of the CRCs as little-endian 32-bit words: how the manifest holds them."""
    return base64.b64encode(struct.pack(f"<{len(crcs)}I", *crcs)).decode("ascii")


def unpack_crcs(text: str) -> tuple[int, ...]:
    """What `pack_crcs` packed. Raises Corrupt."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Corrupt(f"not a list of checksums: {error}") from None
    if len(raw) % 4:
        raise Corrupt("not a list of checksums: length is no multiple of 4")
    return struct.unpack(f"<{len(raw) // 4}I", raw)
