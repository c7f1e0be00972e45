"""When nodes or workers had no answer from a store. Pure: events in, outages out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from launcher.events import EventName, EventRecord
from launcher.reports.causes import Outage, StoreKind

_AWAY = {EventName.STORE_UNREACHABLE: StoreKind.JOB, EventName.CHECKPOINT_STORE_AWAY: StoreKind.CHECKPOINTS}
_UNKNOWN_S = 60.0
_BACK = {EventName.STORE_BACK: StoreKind.JOB, EventName.CHECKPOINT_STORE_BACK: StoreKind.CHECKPOINTS}


@dataclass(frozen=True)
class Silence:
    """One node's or worker's own account of such a time."""

    store: StoreKind
    where: str
    node: str
    reason: str
    began_ts: float
    ended_ts: float | None


def silences(ordered: Iterable[EventRecord]) -> list[Silence]:
    """The silences that nodes and workers tell of, in the order in which they began."""
    found: list[Silence] = []
    under_way: dict[tuple[object, ...], int] = {}
    for event in ordered:
        name, ts, seconds = event["event"], float(event["ts"]), float(event.get("seconds", 0.0))
        store = _AWAY.get(name) or _BACK.get(name)
        if store is None:
            continue
        who: tuple[object, ...] = (
            store,
            event.get("node"),
            event.get("rank"),
            event.get("url"),
            event.get("generation"),
        )
        who = who if store is StoreKind.CHECKPOINTS else who[:2]  # a worker that was started anew is another one
        if name in _AWAY:
            under_way[who] = len(found)
            told = str(event.get("reason", "")), ts - seconds, None
            found.append(Silence(store, str(event.get("url", "")), str(event.get("node", "")), *told))
        elif (index := under_way.pop(who, None)) is not None:
            before = found[index]
            began_ts = min(before.began_ts, ts - seconds) if seconds else before.began_ts
            found[index] = Silence(before.store, before.where, before.node, before.reason, began_ts, ts)
    return sorted(found, key=lambda silence: silence.began_ts)


def outages(found: Sequence[Silence]) -> tuple[Outage, ...]:
    """Join the silences of each store that overlap. An outage whose end nobody told has none."""
    made: list[Outage] = []
    for (store, where), of_store in itertools.groupby(
        sorted(found, key=lambda s: (s.store, s.where)), key=lambda s: (s.store, s.where)
    ):
        for together in _overlapping(of_store):
            ends = [s.ended_ts for s in together if s.ended_ts is not None]
            made.append(
                Outage(
                    store=store,
                    where=where,
                    nodes=tuple(dict.fromkeys(s.node for s in together)),
                    reason=together[0].reason,
                    began_ts=together[0].began_ts,
                    ended_ts=max(ends, default=None),
                )
            )
    return tuple(sorted(made, key=lambda outage: outage.began_ts))


def _overlapping(of_store: Iterable[Silence]) -> Iterator[list[Silence]]:
    together: list[Silence] = []
    over_by = -math.inf
    for silence in of_store:
        if together and silence.began_ts > over_by:
            yield together
            together = []
            over_by = -math.inf
        together.append(silence)
        over_by = max(over_by, _over_by(silence))
    if together:
        yield together


def _over_by(silence: Silence) -> float:
    """Until when a silence reaches. If whoever told it died before its end, others are likely to have told the rest."""
    return silence.began_ts + _UNKNOWN_S if silence.ended_ts is None else silence.ended_ts
