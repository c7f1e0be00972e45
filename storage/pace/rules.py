"""What a script may say of when to save: after steps, after time, or as often as it pays. Pure."""

from __future__ import annotations

import enum
import math
import numbers
import re
from dataclasses import dataclass
from datetime import timedelta

from storage.errors import UsageError

Every = int | str | timedelta
"""A number of steps; a time, as a timedelta or as text ("30s", "5min"); or "auto"."""

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


class Tier(enum.StrEnum):
    """Where a save goes."""

    STORE = "store"
    RAM = "ram"
    """It stays in its node's memory, and in a peer's."""


class Backlog(enum.StrEnum):
    """What becomes of a save that is due while the memory for its copy still holds earlier ones."""

    WAIT = "wait"
    """The training waits, for as long as a save may wait at all, and then goes on without it."""
    SKIP = "skip"
    """It is left out."""
    REPLACE = "replace"
    """It takes the place of one that is copied and has not begun to be stored; it is left out where there is none."""


@dataclass(frozen=True)
class EverySteps:
    """A save whenever the steps have passed a multiple of `steps`."""

    steps: int


@dataclass(frozen=True)
class EverySeconds:
    """A save when so much time has gone since the last one began."""

    seconds: float


@dataclass(frozen=True)
class Continuously:
    """A save once the last one has ended, and not before it pays (see `storage.pace.cost.interval_s`)."""


Rule = EverySteps | EverySeconds | Continuously


def parse_every(value: object, name: str = "every", *, allows_auto: bool = True) -> Rule:
    """The rule that `value`, an `Every`, says. Raises UsageError, which calls it `name`."""
    if not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) >= 1:
        return EverySteps(int(value))
    if isinstance(value, timedelta) and value > timedelta(0):
        return EverySeconds(value.total_seconds())
    if value == "auto" and allows_auto:
        return Continuously()
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None and 0 < (seconds := float(match[1]) * _SECONDS[match[2]]) < math.inf:
        return EverySeconds(seconds)
    shown = " ".join(repr(value).split())[:60]
    or_auto = ', or "auto"' if allows_auto else ""
    raise UsageError(
        f'{name} is {shown}; it must be a number of steps, at least 1, or a time such as "30s" or "5min"{or_auto}'
    )


def parse_backlog(value: object) -> Backlog:
    """The policy that `value` names. Raises UsageError."""
    try:
        return Backlog(value)  # type: ignore[arg-type]
    except ValueError:
        known = ", ".join(repr(policy.value) for policy in Backlog)
        raise UsageError(f"backlog is {value!r}; it must be one of {known}") from None
