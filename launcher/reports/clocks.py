"""By how much the clocks of nodes differ, concluded from what must have come before what. Pure.

A node joins before the round that names it, starts its workers after it, and stops them before the next. So each round
bounds how far a node's clock is off that of the node that led it. A clock within its bounds counts as right; any other
is moved as little as they allow, which is less than the time from a node's word to the leader's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from launcher.events import EventName, EventRecord

_TOLERANCE_S = 0.05
"""Differences below this prove nothing: threads that run beside one another write in any order."""

Bounds = tuple[float, float]
"""What has to be added to one node's time stamps to have another's: at least and at most."""


def offsets(events: Sequence[EventRecord]) -> dict[str, float]:
    """Node -> the seconds to add to its time stamps; nodes whose clocks agree with the first leader's are left out."""
    bounds = _bounds(events)
    first = next((str(e.get("node", "")) for e in events if e["event"] == EventName.ROUND_FORMED), "")
    known = {first: 0.0}
    reached = [first]
    for leader in reached:  # grows meanwhile
        for other, (least, most) in sorted(bounds.get(leader, {}).items()):
            if other not in known and least <= most + _TOLERANCE_S:
                known[other] = known[leader] + min(max(0.0, least), max(most, least))
                reached.append(other)
    return {node: offset for node, offset in known.items() if abs(offset) > _TOLERANCE_S}


def set_right(events: Sequence[EventRecord], by_node: Mapping[str, float]) -> list[EventRecord]:
    """The events with these seconds added to the times of each node, in order."""
    moved = [_moved(event, by_node.get(str(event.get("node", "")), 0.0)) for event in events]
    return sorted(moved, key=lambda event: float(event["ts"]))


def _moved(event: EventRecord, seconds: float) -> EventRecord:
    if not seconds:
        return event
    return {**event, **{key: float(event[key]) + seconds for key in ("ts", "step_ts") if key in event}}


def _bounds(events: Sequence[EventRecord]) -> dict[str, dict[str, Bounds]]:
    """Bounds for each pair of nodes, in both directions, as far as rounds tell."""
    found: dict[str, dict[str, Bounds]] = defaultdict(dict)
    for leader, node, least, most in _told(events):
        for a, b, low, high in ((leader, node, least, most), (node, leader, -most, -least)):
            before = found[a].get(b, (-math.inf, math.inf))
            found[a][b] = max(before[0], low), min(before[1], high)
    return found


def _told(events: Sequence[EventRecord]) -> Iterator[tuple[str, str, float, float]]:
    """Yield leader, node, and the least and the most that may be added to the node's time stamps."""
    joined: dict[str, float] = {}
    started: dict[tuple[object, str], float] = {}
    stopped: dict[tuple[object, str], float] = {}
    for event in events:
        node, ts = str(event.get("node", "")), float(event["ts"])
        match event["event"]:
            case EventName.NODE_JOINED:
                joined.setdefault(node, ts)
            case EventName.WORKERS_STARTED:
                started[event.get("generation"), node] = ts
            case EventName.WORKERS_STOPPED:
                stopped[event.get("generation"), node] = ts
    before: dict[str, object] = {}
    for event in sorted(
        (e for e in events if e["event"] == EventName.ROUND_FORMED), key=lambda e: int(e["generation"])
    ):
        leader, formed_ts = str(event.get("node", "")), float(event["ts"])
        for participant in event.get("participants", ()):
            node, generation = participant["node_id"], event["generation"]
            if node == leader:
                continue
            if node in joined and node not in before:
                yield leader, node, -math.inf, formed_ts - joined[node]
            if (last := before.get(node)) is not None and (last, node) in stopped:
                yield leader, node, -math.inf, formed_ts - stopped[last, node]
            if (generation, node) in started:
                yield leader, node, formed_ts - started[generation, node], math.inf
            before[node] = generation
