"""Which names objects may have. Pure.

Keys are relative to the store's root, with `/` between parts; they never leave the root.
"""

from __future__ import annotations

import re

from storage.errors import Denied

PROBE_PREFIX = ".probe-"
"""Prefix of the names that a back end may put for a moment below its root, to find out what the server honours."""

_PROBE = re.compile(r"\.probe-[0-9a-f]{32}")
_BAD_PART = re.compile(r"^$|^\.\.?$|[\x00-\x1f\x7f\\]")


def check_key(key: str) -> str:
    """Return `key` if it is a relative name that stays under the root, else raise Denied."""
    if any(_BAD_PART.search(part) for part in key.split("/")):
        raise Denied(f"refused object name {key!r}: it must be relative, without empty, '.' or '..' parts")
    return key


def check_prefix(prefix: str) -> str:
    """Like `check_key` for the start of a key: the last part may be empty or unfinished."""
    head, _, tail = prefix.rpartition("/")
    if head:
        check_key(head)
    if prefix.startswith("/") or tail == "..":
        raise Denied(f"refused prefix {prefix!r}: it must be relative")
    return prefix


def is_probe_name(name: str) -> bool:
    """Whether a back end's probe would have put `name`."""
    return _PROBE.fullmatch(name) is not None
