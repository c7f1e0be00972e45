"""Events and lists in words, a line each. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_NAMED = 4
_MAX_CHARS = 300

Event = Mapping[str, Any]
"""One line of `events.jsonl`."""


def describe_failure(event: Event) -> str:
    """A `worker_failed` event in one line."""
    code = event.get("exit_code")
    how = f"signal {-code}" if isinstance(code, int) and code < 0 else f"exit code {code}"
    message = f": {event['message']}" if event.get("message") else ""
    return f"rank {event.get('rank')} on {event.get('node')} failed with {how}{message}"


def describe_root_cause(event: Event) -> str:
    """A `root_cause` event in one line."""
    place = f" at {event['place']}" if event.get("place") else ""
    failed = describe_failure({**event, "node": event.get("node_failed")})
    return f"{failed}{place} ({event.get('failure_class')}, host {event.get('host')})"


def describe_fields(event: Event) -> str:
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
