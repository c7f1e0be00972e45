"""What a watcher says of the end of this machine. Pure."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from launcher.drain.draining import DrainSource

_FAR_S = 86400.0


@dataclass(frozen=True)
class Notice:
    """The news that this machine is about to go."""

    detail: str
    """Where the news comes from, in words."""
    within_s: float | None = None
    """The seconds until the machine is gone; None where nobody says."""
    source: DrainSource = DrainSource.NOTICE
    is_final: bool = True
    """False for a mere hint, which is told and not followed."""


def believed(left_s: float) -> float | None:
    """Return the seconds that are left, or None for what is over, more than a day ahead, or no number."""
    return left_s if 0 < left_s <= _FAR_S else None


def seconds_left(when: datetime.datetime, now_unix_s: float) -> float | None:
    """Count the seconds until `when` (UTC, where it names no zone).

    Returns None for a time that is over or more than a day ahead: then this machine's clock and the writer's disagree,
    and a grace that is known is better than none.
    """
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return believed(when.timestamp() - now_unix_s)
