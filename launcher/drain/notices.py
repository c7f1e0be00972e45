"""What a watcher says: this machine goes, and when. Pure."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from launcher.drain.draining import DrainSource

_FAR_S = 86400.0


@dataclass(frozen=True)
class Notice:
    """`within_s`: seconds until the machine is gone; None where nobody says. Not final: a mere hint, told and not
    followed."""

    detail: str
    within_s: float | None = None
    source: DrainSource = DrainSource.NOTICE
    is_final: bool = True


def believed(left_s: float) -> float | None:
    """The seconds that are left, None for what is over, more than a day ahead, or no number."""
    return left_s if 0 < left_s <= _FAR_S else None


def seconds_left(when: datetime.datetime, now_unix_s: float) -> float | None:
    """Seconds until `when` (UTC, where it names no zone).

    None for a time that is over or more than a day ahead: then this machine's clock and the writer's disagree, and a
    grace that is known is better than none.
    """
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return believed(when.timestamp() - now_unix_s)
