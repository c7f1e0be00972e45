"""What happened to a job, a line for each thing that a person would want to know. Pure: events in, lines out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from launcher.wording import Event, describe_failure, describe_fields, describe_root_cause

_ROUTINE = {
    "workers_started",
    "workers_stopped",
    "workers_yielded",
    "checkpoint_staged",
    "checkpoint_committed",
    "checkpoint_not_newest",
    "restored",
}
"""Happens at every round or every few steps and is told by the rounds; `report --json` counts them."""


def timeline(events: Iterable[Event], began_ts: float) -> list[str]:
    """Lines with the seconds since `began_ts`. What several nodes tell alike is told once, repeats are counted."""
    lines: list[str] = []
    last, repeats = "", 0
    seen: set[str] = set()
    for event in events:
        if event["event"] in _ROUTINE:
            continue
        if gone := event.get("node_lost") or event.get("node_left"):
            if gone in seen:
                continue
            seen.add(gone)
        told = _tell(event)
        if told == last:
            repeats += 1
            lines[-1] = f"{lines[-1].removesuffix(f' (x{repeats - 1})')} (x{repeats})"
            continue
        last, repeats = told, 1
        lines.append(f"{float(event['ts']) - began_ts:9.1f} s  {told}")
    return lines


def _tell(event: Event) -> str:
    """One event; an unknown one is told with its fields."""
    node = event.get("node", "")
    match event["event"]:
        case "node_joined":
            return f"{node} joins with {event.get('slots')} slots"
        case "node_lost":
            return f"node {event.get('node_lost')} {event.get('reason')}"
        case "node_left":
            return f"node {event.get('node_left')} left"
        case "round_formed":
            return _round(event)
        case "first_step":
            return f"generation {event.get('generation')} trains: step {event.get('step')}"
        case "stop_requested":
            return f"workers are asked to stop at a step boundary: {event.get('reason')}"
        case "worker_failed":
            return describe_failure(event)
        case "root_cause":
            return f"root cause: {describe_root_cause(event)}"
        case "finished":
            return f"the job is over: {event.get('outcome')}"
    fields = describe_fields(event)
    return f"{node}: {event['event']}{' ' if fields else ''}{fields}"


def _round(event: Event) -> str:
    participants: list[dict[str, Any]] = list(event.get("participants") or ())
    nodes = ", ".join(str(p.get("node_id")) for p in participants)
    mesh = event.get("mesh") or {}
    axes = " x ".join(f"{axis} {mesh[axis]}" for axis in ("replicate", "shard", "expert") if axis in mesh)
    return (
        f"generation {event.get('generation')} ({event.get('reason')}): {event.get('world_size')} ranks on {nodes}"
        + (f"; mesh {axes}" if axes else "")
    )
