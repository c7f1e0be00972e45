"""How an object is divided for a multipart upload. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

NUM_PARTS_MAX = 10_000  # S3's limit; R2 wants all parts but the last to be equal as well
_MIB = 1024 * 1024
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def part_size_bytes(size_bytes: int, wanted_bytes: int) -> int:
    """The size of every part but the last: `wanted_bytes`, or more in whole MiB where the parts would be too many."""
    least = -(-size_bytes // NUM_PARTS_MAX)
    return max(wanted_bytes, -(-least // _MIB) * _MIB)


def multipart_etag(part_etags: Sequence[str]) -> str | None:
    """What S3 answers for the whole: the MD5 of the parts' MD5s; None where the parts' etags are something else."""
    digests = [match[1] for etag in part_etags if (match := _MD5.fullmatch(etag))]
    if len(digests) != len(part_etags):
        return None
    return f'"{hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False).hexdigest()}-{len(digests)}"'
