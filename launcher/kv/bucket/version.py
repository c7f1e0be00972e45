"""One version of the store as bytes: its keys and leases, who wrote it, and what it has changed. Pure."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import KVUnavailable
from launcher.kv.base import Entry, WatchEvent
from launcher.kv.bucket.ops import Result
from launcher.kv.state import State

LOG = "log/"
_SUM = b',"crc32":'
TOMBSTONE = b""
"""What an old version's object holds: its name stays taken, so that nobody can write that version again."""


def version_name(number: int) -> str:
    """The object that holds a version."""
    return f"{LOG}{number:016d}"


def number_of(name: str) -> int:
    """The version that an object holds, by its name; 0 of another object."""
    digits = name.removeprefix(LOG)
    return int(digits) if name.startswith(LOG) and digits.isdecimal() else 0


@dataclass(frozen=True)
class Version:
    """The store after `events`, which its author `nonce` has added to version `number` - 1.

    Attributes:
        granted: the wishes that are in it, and what came of each of their changes.
        recent: all wishes that are in it or in a version before, and must not be granted again: until which version
            somebody might.
    """

    number: int
    nonce: str
    state: State
    events: tuple[WatchEvent, ...]
    granted: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)
    recent: Mapping[str, int] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON in UTF-8, whose last field is the CRC32 of what it is without that."""
        told = {
            "number": self.number,
            "nonce": self.nonce,
            "state": self.state.dump(),
            "events": [
                {"key": event.key, "revision": event.revision, "entry": _told(event.entry)} for event in self.events
            ],
            "granted": self.granted,
            "recent": self.recent,
        }
        body = json.dumps(told, separators=(",", ":")).encode()
        return body[:-1] + _SUM + b"%d}" % zlib.crc32(body)

    @classmethod
    def from_bytes(cls, number: int, content: bytes) -> Version:
        """Read a version.

        Raises:
            KVUnavailable: the object holds something else.
        """
        try:
            told = json.loads(content)
            body = content.rpartition(_SUM)[0] + b"}"
            if told["crc32"] != zlib.crc32(body):  # one bit would go into all later versions
                raise ValueError("its checksum does not match")
            if told["number"] != number:
                raise ValueError(f"it says that it is version {told['number']}")
            events = tuple(WatchEvent(e["key"], _entry(e["entry"]), int(e["revision"])) for e in told["events"])
            granted = {str(name): tuple(map(_result, results)) for name, results in told["granted"].items()}
            recent = {str(name): int(until) for name, until in told["recent"].items()}
            return cls(number, str(told["nonce"]), State.load(told["state"]), events, granted, recent)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KVUnavailable(f"{version_name(number)} is no version of a store: {error!r}") from error


def _result(told: Any) -> Result:
    if told is None or isinstance(told, bool):
        return told
    revision, created = told
    return int(revision), int(created)


def _told(entry: Entry | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    value = base64.b64encode(entry.value).decode()
    return {"key": entry.key, "value": value, "revision": entry.revision, "create_revision": entry.create_revision}


def _entry(told: dict[str, Any] | None) -> Entry | None:
    if told is None:
        return None
    value = base64.b64decode(told["value"], validate=True)
    return Entry(str(told["key"]), value, int(told["revision"]), int(told["create_revision"]))
