"""How an object is divided for a multipart upload. Pure."""

from __future__ import annotations

NUM_PARTS_MAX = 10_000  # S3's limit; R2 wants all parts but the last to be equal as well
_MIB = 1024 * 1024


def part_size_bytes(size_bytes: int, wanted_bytes: int) -> int:
    """The size of every part but the last: `wanted_bytes`, or more in whole MiB where the parts would be too many."""
    least = -(-size_bytes // NUM_PARTS_MAX)
    return max(wanted_bytes, -(-least // _MIB) * _MIB)
