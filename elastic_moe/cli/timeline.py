"""What happened to a job, a line for each thing that a person would want to know. Pure: events in, lines out."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any

from launcher import EventName, EventRecord
from launcher.reports import describe_failure, describe_fields, describe_root_cause

_ROUTINE = {
    EventName.WORKERS_STARTED,
    EventName.WORKERS_STOPPED,
    EventName.WORKERS_DONE,
    EventName.WORKERS_YIELDED,
    EventName.CHECKPOINT_STAGED,
    EventName.CHECKPOINT_COMMITTED,
    EventName.CHECKPOINT_NOT_NEWEST,
    EventName.CHECKPOINT_WAITED,
    EventName.RESTORED,
    EventName.PROGRESS,
}
"""Happens at every round or every few steps and is told by the rounds; `report --json` counts them."""


def timeline(events: Iterable[EventRecord], began_ts: float) -> list[str]:
    """Lines with date and time, and the seconds since `began_ts`.

    What several nodes tell alike is told once, repeats are counted.
    """
    lines: list[str] = []
    last, repeats = "", 0
    seen: set[object] = set()
    for event in events:
        if event["event"] in _ROUTINE:
            continue
        if event["event"] == EventName.ROUND_FORMED:
            seen = {once for once in seen if not isinstance(once, int)}  # numbers begin anew in a store that is new
        once = event.get("node_lost") or event.get("node_left") or event.get("peer")
        once = event.get("generation") if event["event"] == EventName.FIRST_STEP else once
        if once is not None:
            if once in seen:
                continue
            seen.add(once)
        told = _tell(event)
        if told == last:
            repeats += 1
            lines[-1] = f"{lines[-1].removesuffix(f' (x{repeats - 1})')} (x{repeats})"
            continue
        last, repeats = told, 1
        lines.append(f"{moment(float(event['ts']))} {float(event['ts']) - began_ts:9.1f} s  {told}")
    return lines


def moment(ts: float) -> str:
    """Date and time in the reader's time zone, with its offset."""
    return datetime.datetime.fromtimestamp(ts).astimezone().isoformat(timespec="seconds")


def _tell(event: EventRecord) -> str:
    """One event; an unknown one is told with its fields."""
    node = event.get("node", "")
    match event["event"]:
        case EventName.NODE_JOINED:
            return f"{node} joins with {event.get('slots')} slots"
        case EventName.NODE_LOST:
            return f"node {event.get('node_lost')} {event.get('reason')}"
        case EventName.NODE_LEFT:
            return f"node {event.get('node_left')} left"
        case EventName.ROUND_FORMED:
            return _round(event)
        case EventName.FIRST_STEP:
            return f"generation {event.get('generation')} trains: step {event.get('step')}"
        case EventName.STOP_REQUESTED:
            return f"workers are asked to stop at a step boundary: {event.get('reason')}"
        case EventName.WORKER_FAILED:
            return describe_failure(event)
        case EventName.NODE_ENDED:
            code = event.get("exit_code")
            return f"{node} ends: {event.get('reason')}" + ("" if code is None else f" (exit code {code})")
        case EventName.PEER_LOST:
            return f"{node} finds node {event.get('peer')} lost: {event.get('reason')}"
        case EventName.STEPS_RESTARTED:
            return f"{node}: goes back from step {event.get('reached')} to step {event.get('step')}"
        case EventName.STORE_UNREACHABLE:
            return f"{node} has lost the store: {event.get('reason')}"
        case EventName.STORE_BACK:
            return f"{node} has the store again, after {event.get('seconds')} s"
        case EventName.CHECKPOINT_STORE_AWAY:
            away = f"{event.get('url')} has not answered for {event.get('seconds')} s: {event.get('reason')}"
            return f"rank {event.get('rank')} on {node}: {away}"
        case EventName.CHECKPOINT_STORE_BACK:
            return (
                f"rank {event.get('rank')} on {node}: {event.get('url')} answers again, after {event.get('seconds')} s"
            )
        case EventName.ROOT_CAUSE:
            return f"root cause: {describe_root_cause(event)}"
        case EventName.FINISHED:
            return f"the job is over: {event.get('outcome')}"
    fields = describe_fields(event)
    return f"{node}: {event['event']}{' ' if fields else ''}{fields}"


def _round(event: EventRecord) -> str:
    participants: list[dict[str, Any]] = list(event.get("participants") or ())
    nodes = ", ".join(str(p.get("node_id")) for p in participants)
    mesh = event.get("mesh") or {}
    axes = " x ".join(f"{axis} {mesh[axis]}" for axis in ("replicate", "shard", "expert") if axis in mesh)
    return (
        f"generation {event.get('generation')} ({event.get('reason')}): {event.get('world_size')} ranks on {nodes}"
        + (f"; mesh {axes}" if axes else "")
    )
