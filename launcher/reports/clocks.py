"""Whether clocks were set while their nodes ran, and by how much those of nodes differ. Pure.

Each event has its time by two clocks of its node, of which nobody sets the second (`launcher.events`): so `steady` sees
that somebody has set the first, and undoes it. By how much clocks of several nodes differ is concluded from what must
have come before what.

A node joins before the round that names it, starts its workers after it, and stops them before the next. So each round
bounds how far a node's clock is off that of the node that led it. A clock within its bounds counts as right; any other
is moved as little as they allow, which is less than the time from a node's word to the leader's.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.events import EventName, EventRecord

_TOLERANCE_S = 0.05
"""Differences below this prove nothing: threads that run beside one another write in any order."""

_SET_S = 0.25
"""A clock that goes wrong by less from one event to the next was not set: reading two clocks takes a moment."""
_DOUBTFUL_S = 2.0
"""Rounds that contradict each other by less prove nothing either: a leader writes of a round after nodes know of it."""

_BOOT_S_MAX = 1e10

Bounds = tuple[float, float]
"""What has to be added to one node's time stamps to have another's: at least and at most."""


@dataclass(frozen=True)
class ClockJump:
    """A node's clock was set while the node ran: forward by so many seconds, or back where they are negative."""

    node: str
    ts: float
    """When the first event after it was, by the times that `steady` gives."""
    seconds: float


def steady(events: Sequence[EventRecord]) -> tuple[list[EventRecord], tuple[ClockJump, ...]]:
    """The events as if nobody had set a clock while its node ran, and where somebody did.

    A node's times are by what its clock said for most of its events.
    """
    readings: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for i, event in enumerate(events):
        if (boot_s := _boot_s(event)) is not None:
            readings[str(event.get("node", ""))].append((boot_s, i))
    moved, jumps = list(events), list[ClockJump]()
    for node, of_node in sorted(readings.items()):
        times = [(boot_s, float(events[i]["ts"]) - boot_s, i) for boot_s, i in sorted(of_node)]
        pieces = _pieces(times)
        ahead_s = [statistics.median(ahead for _, ahead, _ in piece) for piece in pieces]
        right_s = ahead_s[max(range(len(pieces)), key=lambda p: len(pieces[p]))]
        for piece, wrong_s in zip(pieces, ahead_s, strict=True):
            for _, _, i in piece:
                moved[i] = _moved(events[i], right_s - wrong_s)
        for (before_s, after_s), piece in zip(itertools.pairwise(ahead_s), pieces[1:], strict=True):
            jumps.append(ClockJump(node, float(moved[piece[0][2]]["ts"]), after_s - before_s))
    return moved, tuple(sorted(jumps, key=lambda jump: (jump.ts, jump.node)))


def _boot_s(event: EventRecord) -> float | None:
    found = event.get("boot_s")
    is_one = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found < _BOOT_S_MAX
    return float(found) if is_one and found is not None else None


def _pieces(times: Sequence[tuple[float, float, int]]) -> list[list[tuple[float, float, int]]]:
    """Cut one node's events, in order, where its clock was set; each tells by how much that is ahead of the other."""
    pieces: list[list[tuple[float, float, int]]] = []
    for one in times:
        if not pieces or abs(one[1] - pieces[-1][-1][1]) > _SET_S:
            pieces.append([])
        pieces[-1].append(one)
    return pieces


def doubtful(events: Sequence[EventRecord]) -> list[tuple[str, str]]:
    """Pairs of nodes whose clocks cannot be set right: what one round says of them contradicts another."""
    return sorted(
        (leader, node)
        for leader, of_leader in _bounds(events).items()
        for node, (least, most) in of_leader.items()
        if leader < node and least > most + _DOUBTFUL_S
    )


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
    times = {key: event[key] for key in ("ts", "step_ts") if isinstance(event.get(key), int | float)}
    return {**event, **{key: float(ts) + seconds for key, ts in times.items()}}


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
