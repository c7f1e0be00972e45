"""What the holder of a lease writes anew from time to time: something new each time, and what it tells beside. Pure."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

BEAT = "beat/"


def beat_name(lease_id: int) -> str:
    """The object that the holder of a lease writes."""
    return f"{BEAT}{lease_id:x}"


def beat_content(nonce: str, told: Mapping[str, bytes]) -> bytes:
    """`nonce`: nobody has given it before. `told`: by key."""
    fields = {key: base64.b64encode(value).decode() for key, value in told.items()}
    return f"{nonce} {json.dumps(fields)}".encode()


def told_in(content: bytes) -> dict[str, bytes]:
    """What a beat tells beside; nothing, if it is none."""
    try:
        fields = json.loads(content.partition(b" ")[2])
        return {str(key): base64.b64decode(value, validate=True) for key, value in fields.items()}
    except (ValueError, TypeError, AttributeError):
        return {}
