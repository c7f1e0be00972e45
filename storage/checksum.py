"""CRC32C of byte ranges, and the blocks that a data item is checked by.

An item (one `torch.save` zip) is cut into blocks of equal, power-of-two size, counted from the item's first byte,
so that the zip's own framing is covered too. Each block has a CRC32C: whoever reads part of an item reads whole
blocks, verifies them, and keeps the bytes it wanted. The block size grows with the item (a 512th of it, from 16 KiB
up to 8 MiB), which bounds both costs at once: a reader fetches at most two blocks (0.4 %) more than it wants of an
item, and an item's checksums take at most 2 KiB below 4 GiB.
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np
from isal import isal_zlib

from storage.errors import Corrupt
from storage.objects import Buffer

BLOCK_SIZE_BYTES_MIN = 16 * 1024
BLOCK_SIZE_BYTES_MAX = 8 * 1024 * 1024
_BLOCKS_PER_ITEM = 512
_CACHED_SIZE_BYTES = 256 * 1024
_CASTAGNOLI = 0x82F63B78  # CRC32C's polynomial, bits reversed
_ZLIB = 0xEDB88320  # CRC32's


def crc32c(buffer: Buffer, crc: int = 0) -> int:
    """CRC32C (Castagnoli) of `buffer`, continued from `crc`."""
    # google_crc32c takes bytes or arrays, but refuses writable memoryviews
    return int(google_crc32c.extend(crc, np.frombuffer(buffer, np.uint8))) if len(buffer) else crc


def crc32(buffer: Buffer, crc: int = 0) -> int:
    """zlib's CRC32 of `buffer`, the checksum of zips, continued from `crc`; several times as fast as zlib makes it."""
    return int(isal_zlib.crc32(buffer, crc))


def combine(first: int, second: int, second_length_bytes: int) -> int:
    """CRC32C of two pieces laid end to end, from the CRC of each: a block may be read in parts that end in any order.

    The rule is zlib's `crc32_combine`: a CRC is a polynomial over GF(2), and what follows a piece multiplies it by x
    for each further bit.
    """
    return _multiply(_shift(second_length_bytes, _CASTAGNOLI), first, _CASTAGNOLI) ^ second


def combine_crc32(first: int, second: int, second_length_bytes: int) -> int:
    """The same of zlib's CRC32, the checksum of zips."""
    return _multiply(_shift(second_length_bytes, _ZLIB), first, _ZLIB) ^ second


@functools.lru_cache(maxsize=1024)
def _shift(length_bytes: int, polynomial: int) -> int:
    """x to the power of 8 * `length_bytes`, modulo the polynomial."""
    power, square, left = 1 << 31, 1 << 30, 8 * length_bytes
    while left:
        if left & 1:
            power = _multiply(square, power, polynomial)
        square, left = _multiply(square, square, polynomial), left >> 1
    return power


def _multiply(a: int, b: int, polynomial: int) -> int:
    """The product of two polynomials modulo a third one; the highest bit is the coefficient of 1."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (polynomial if b & 1 else 0)
    return product


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
            # both while the bytes are in the processor's cache
            taken = view[at : at + min(size_bytes - filled, _CACHED_SIZE_BYTES)]
            whole, crc = crc32c(taken, whole), crc32c(taken, crc)
            at += taken.nbytes
            filled += taken.nbytes
            if filled == size_bytes:
                crcs.append(crc)
                crc, filled = 0, 0
    return whole, [*crcs, crc] if filled else crcs


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
