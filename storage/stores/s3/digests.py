"""Checksums that go along with what is put, where a bucket wants one: Object Lock does of every put. Pure."""

from __future__ import annotations

import base64
import functools
import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from awscrt import checksums

Algorithm = Literal["md5", "crc32", "crc32c", "sha256"]


@dataclass(frozen=True)
class Sent:
    """A part that was put: its etag, as the server wrote it, and its checksum if one went along."""

    etag: str
    digest: str = ""


def headers_of(algorithm: Algorithm, found: str) -> dict[str, str]:
    """The headers that the checksum of a body goes in. Some servers look for the algorithm's name alone."""
    if algorithm == "md5":
        return {"Content-MD5": found}
    return {f"x-amz-checksum-{algorithm}": found, "x-amz-sdk-checksum-algorithm": algorithm.upper()}


def digest(algorithm: Algorithm, views: Sequence[memoryview]) -> str:
    """The checksum of the views, laid end to end, as the header holds it: base 64, of numbers highest byte first."""
    if algorithm in ("crc32", "crc32c"):
        add: Callable[[Any, int], int] = getattr(checksums, algorithm)
        return _text(struct.pack(">I", functools.reduce(lambda crc, view: add(view, crc), views, 0)))
    total = hashlib.sha256() if algorithm == "sha256" else hashlib.md5(usedforsecurity=False)
    for view in views:
        total.update(view)
    return _text(total.digest())


def upload_arguments(algorithm: Algorithm | None) -> dict[str, str]:
    """What beginning an upload in parts has to say of their checksums. Content-MD5 is each part's own affair."""
    return {} if algorithm in (None, "md5") else {"ChecksumAlgorithm": str(algorithm).upper()}


def part_arguments(algorithm: Algorithm | None, part: Sent) -> dict[str, str]:
    """What ending an upload has to say of a part: an upload that was begun with an algorithm wants its checksum."""
    return {} if algorithm in (None, "md5") else {f"Checksum{str(algorithm).upper()}": part.digest}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
