"""What servers say of an object's version, and how that is written. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

WEAK = "W/"
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def bare(etag: str) -> str:
    """Without its quotes, which some servers leave out in some places, and without the mark of a weak one."""
    return etag.removeprefix(WEAK).strip('"')


def marked(etag: str) -> str:
    """Without its quotes, but with the mark of a weak one, which no server lets match."""
    return (WEAK if etag.startswith(WEAK) else "") + bare(etag)


def multipart_etag(part_etags: Sequence[str]) -> str | None:
    """What S3 answers for the whole: the MD5 of the parts' MD5s; None where the parts' etags are something else."""
    digests = [match[1] for etag in part_etags if (match := _MD5.fullmatch(etag))]
    if len(digests) != len(part_etags):
        return None
    return f'"{hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False).hexdigest()}-{len(digests)}"'
