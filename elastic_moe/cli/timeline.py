"""Tells what happened to a job, a line for each thing that a person would want to know. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from launcher import EventName, EventRecord
from launcher.reports import sentence

_ROUTINE = {
    EventName.WORKERS_STARTED,
    EventName.WORKERS_STOPPED,
    EventName.WORKERS_DONE,
    EventName.WORKERS_YIELDED,
    EventName.CHECKPOINT_STAGED,
    EventName.CHECKPOINT_COMMITTED,
    EventName.CHECKPOINT_NOT_NEWEST,
    EventName.CHECKPOINT_COPY_WAITED,
    EventName.CHECKPOINT_WAITED,
    EventName.RESTORED,
    EventName.PROGRESS,
}
"""Events of every round or every few steps, of which the rounds tell enough; `report --json` counts them."""


def timeline(events: Iterable[EventRecord], began_ts: float) -> list[str]:
    """Make a line of each event, with date and time, and the seconds since `began_ts`.

    What several nodes say alike is said once, and repeats are counted.
    """
    lines: list[str] = []
    last, repeats = "", 0
    seen_nodes: set[object] = set()
    seen_generations: set[object] = set()
    for event in events:
        if event["event"] in _ROUTINE:
            continue
        if event["event"] == EventName.ROUND_FORMED:
            seen_generations.clear()  # numbers begin anew in a store that is new
        once = event.get("node_lost") or event.get("node_left") or event.get("peer")
        is_first = event["event"] == EventName.FIRST_STEP
        once, seen = (event.get("generation"), seen_generations) if is_first else (once, seen_nodes)
        if once is not None:
            if once in seen:
                continue
            seen.add(once)
        told = sentence(event)
        if told == last:
            repeats += 1
            lines[-1] = f"{lines[-1].removesuffix(f' (x{repeats - 1})')} (x{repeats})"
            continue
        last, repeats = told, 1
        lines.append(f"{moment(float(event['ts']))} {float(event['ts']) - began_ts:9.1f} s  {told}")
    return lines


def moment(ts: float) -> str:
    """Write a time (epoch seconds) as date and time in the reader's time zone, with its offset."""
    return datetime.datetime.fromtimestamp(ts).astimezone().isoformat(timespec="seconds")
