"""What a server answers to listings, checked field by field, and all pages of one: with an end. Pure.

An answer that lacks something is an error, and never an empty page: a listing that is cut short makes a run look new.
A server that never stops must not fill this process's memory.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from storage.errors import Denied

LISTING_SIZE_BYTES_MAX = 256 * 1024 * 1024
"""The most that all pages of a listing may hold of names and what is told with each: some 700,000 objects of ours."""
NUM_PAGES_MAX = 10_000
"""The most pages of a listing. A page may be empty: servers look through so many deleted names at a time."""
_ROW_SIZE_BYTES = 256

T = TypeVar("T")


class Paged(Protocol):
    """One page. `token` asks for the next one; None on the last."""

    @property
    def token(self) -> object | None: ...

    @property
    def names(self) -> list[str]: ...


P = TypeVar("P", bound=Paged)


@dataclass(frozen=True)
class Page:
    """One page of a listing: (key, size in bytes, etag, when) and common prefixes; `token` asks for the next one."""

    objects: tuple[tuple[str, int, str, float | None], ...]
    folders: tuple[str, ...]
    token: str | None

    @property
    def names(self) -> list[str]:
        """All names on this page."""
        return [*(name for name, *_ in self.objects), *self.folders]


@dataclass(frozen=True)
class UploadsPage:
    """One page of unfinished uploads: (key, id, when begun)."""

    rows: tuple[tuple[str, str, float], ...]
    token: tuple[str, str] | None

    @property
    def names(self) -> list[str]:
        """All names on this page."""
        return [name for name, *_ in self.rows]


def all_pages(what: str, fetch: Callable[[object | None], P]) -> list[P]:
    """Every page of the listing `what`; `fetch` gets the one that a token asks for. Raises Denied if it has no end."""
    pages: list[P] = []
    tokens: set[object] = set()
    token: object | None = None
    size_bytes = 0
    while True:
        pages.append(fetch(token))
        size_bytes += sum(len(name) + _ROW_SIZE_BYTES for name in pages[-1].names)
        token = pages[-1].token
        if token is None:
            return pages
        size_bytes += len(str(token))
        if token in tokens:
            raise Denied(f"{what}: the server goes in a circle: it names the same next page twice")
        tokens.add(token)
        if size_bytes > LISTING_SIZE_BYTES_MAX or len(pages) >= NUM_PAGES_MAX:
            num_names = sum(len(page.names) for page in pages)
            raise Denied(f"{what}: there is no end to it, after {num_names} names on {len(pages)} pages")


def page_of(answer: Mapping[str, Any], prefix: str) -> Page:
    """From ListObjectsV2's answer, as botocore reads it. Raises ValueError."""
    is_truncated = needed(answer, "IsTruncated", bool)
    return Page(
        tuple(_object(row, prefix) for row in answer.get("Contents", [])),
        tuple(_named(row, "Prefix", prefix) for row in answer.get("CommonPrefixes", [])),
        needed(answer, "NextContinuationToken", str) if is_truncated else None,
    )


def uploads_of(answer: Mapping[str, Any], prefix: str) -> UploadsPage:
    """From ListMultipartUploads' answer, as botocore reads it. Raises ValueError."""
    is_truncated = needed(answer, "IsTruncated", bool)
    return UploadsPage(
        tuple(_upload(row, prefix) for row in answer.get("Uploads", [])),
        (needed(answer, "NextKeyMarker", str), str(answer.get("NextUploadIdMarker", ""))) if is_truncated else None,
    )


def needed(answer: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return a field that the answer must have. Raises ValueError where it lacks."""
    value = answer.get(name)
    if not isinstance(value, kind) or value == "":
        raise ValueError(f"it has no {name}")
    return value


def _named(row: Mapping[str, Any], name: str, prefix: str) -> str:
    """A name of a listing. Raises ValueError for one that was not asked for."""
    value = needed(row, name, str)
    if not value.startswith(prefix):
        raise ValueError(f"it names {value[:100]!r}, which was not asked for")
    return value


def _object(row: Mapping[str, Any], prefix: str) -> tuple[str, int, str, float | None]:
    """Name, size, etag and time; some servers tell no etag."""
    size_bytes, when = needed(row, "Size", int), row.get("LastModified")
    if size_bytes < 0:
        raise ValueError(f"it has a Size of {size_bytes}")
    unix_s = when.timestamp() if isinstance(when, datetime.datetime) else None
    return _named(row, "Key", prefix), size_bytes, str(row.get("ETag", "")), unix_s


def _upload(row: Mapping[str, Any], prefix: str) -> tuple[str, str, float]:
    when = needed(row, "Initiated", datetime.datetime)
    return _named(row, "Key", prefix), needed(row, "UploadId", str), when.timestamp()
