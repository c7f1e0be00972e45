"""One version of the store as bytes: its keys and leases, who wrote it, and what it has changed. Pure."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any

from launcher.errors import KVUnavailable
from launcher.kv.base import Entry, WatchEvent
from launcher.kv.state import State

LOG = "log/"
BEAT = "beat/"
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


def beat_name(lease_id: int) -> str:
    """The object that the holder of a lease writes."""
    return f"{BEAT}{lease_id:x}"


@dataclass(frozen=True)
class Version:
    """The store after `events`, which its author `nonce` has added to version `number` - 1."""

    number: int
    nonce: str
    state: State
    events: tuple[WatchEvent, ...]

    def to_bytes(self) -> bytes:
        """JSON in UTF-8, whose last field is the CRC32 of what it is without that."""
        told = {
            "number": self.number,
            "nonce": self.nonce,
            "state": self.state.dump(),
            "events": [
                {"key": event.key, "revision": event.revision, "entry": _told(event.entry)} for event in self.events
            ],
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
            return cls(number, str(told["nonce"]), State.load(told["state"]), events)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KVUnavailable(f"{version_name(number)} is no version of a store: {error!r}") from error


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
