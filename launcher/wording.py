"""Events and lists in words, a line each. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from launcher.events import EventRecord

JOB_IS_OVER = "the job is over"
"""Why a node ends that has nothing to tell of its own end."""
_MAX_NAMED = 4
_MAX_CHARS = 300


def describe_failure(event: EventRecord) -> str:
    """A `worker_failed` event in one line."""
    message = f": {event['message']}" if event.get("message") else ""
    return f"rank {event.get('rank')} on {event.get('node')} {describe_end(event.get('exit_code'))}{message}"


def describe_end(code: object) -> str:
    """How a process ended, in words; `code` as Popen has it."""
    if not isinstance(code, int) or code >= 0:
        return f"failed with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"


def _spot(place: str) -> str:
    """The line of the program in what `failures.place_of` says; "" where that only repeats how the process ended."""
    return place.partition(" at ")[2] or (place if ":" in place else "")


def describe_root_cause(event: EventRecord) -> str:
    """A `root_cause` event in one line."""
    spot = _spot(str(event.get("place") or ""))
    place = f" at {spot}" if spot else ""
    failed = describe_failure({**event, "node": event.get("node_failed")})
    return f"{failed}{place} ({event.get('failure_class')}, host {event.get('host')})"


def describe_fields(event: EventRecord) -> str:
    """An event's own fields in one line, the long ones left out."""
    common = ("ts", "run_id", "node", "generation", "event")
    return " ".join(f"{k}={v}" for k, v in event.items() if k not in common and not isinstance(v, dict | list))


def name_some(things: Sequence[str], separator: str = ", ") -> str:
    """A list for a record that every node reads: the first few, cut to a length, and how many more there are.

    Nodes give a round's reason as their own and the leader joins theirs into the next: in full, that of a large job
    would outgrow what etcd takes.
    """
    named = [thing if len(thing) <= _MAX_CHARS else f"{thing[:_MAX_CHARS]}..." for thing in things[:_MAX_NAMED]]
    more = [f"and {len(things) - _MAX_NAMED} more"] if len(things) > _MAX_NAMED else []
    return separator.join([*named, *more])
