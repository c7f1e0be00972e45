"""Where the time goes between a lost node and the next step. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.demo.records import Record
from launcher import EventName

_AFTER = (
    ("noticed", EventName.NODE_LOST),
    ("state kept", EventName.LIVE_STATE_CAPTURED),
    ("workers ended", EventName.WORKERS_STOPPED),
    ("round formed", EventName.ROUND_FORMED),
    ("workers started", EventName.WORKERS_STARTED),
    ("state restored", EventName.RESTORED),
)
"""What has been done when the last event of that name has come."""


def phases(events: Sequence[Record], lost_ts: float, stepped_ts: float) -> dict[str, float]:
    """Seconds by phase, in order; they add up to the time from `lost_ts` to the next step at `stepped_ts`.

    A phase of which nothing was told is a part of the next one.
    """
    found, since_ts = {}, lost_ts
    for name, event in _AFTER:
        told = [each["ts"] for each in events if each["event"] == event and since_ts <= each["ts"] <= stepped_ts]
        if told:
            found[name] = round(max(told) - since_ts, 3)
            since_ts = max(told)
    found["first step"] = round(stepped_ts - since_ts, 3)
    return found
