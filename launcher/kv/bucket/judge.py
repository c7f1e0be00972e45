"""Which leases nobody renews any more, by what is seen of them. Pure: times come in.

The holder of a lease writes an object anew; whoever looks sees that it has changed, and counts from then on by a clock
of its own. No two clocks are compared, nor is the store's. The holder counts from before it wrote, so it knows first.

Leases stand in a ring: each client looks at the one before its own, so that what a job asks of the store grows with its
nodes, and not with their square. While that one is silent it looks at all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

_SILENT_FRACTION = 0.5
_PAUSE_FACTOR = 3.0


@dataclass
class _Sight:
    content: bytes | None
    since_s: float  # at this time it was there already
    until_s: float  # at this time it still was


class Judge:
    """One client's view of the leases."""

    def __init__(self) -> None:
        self._seen: dict[int, _Sight] = {}
        self._last_s: float | None = None

    def begin(self, leases: Mapping[int, float], own: Collection[int], period_s: float, now_s: float) -> list[int]:
        """Which leases to look at now.

        Args:
            leases: the TTL of each, in seconds.
            own: those that this client renews.
            period_s: seconds between two calls, as intended.
        """
        if self._last_s is not None and (late_s := now_s - self._last_s - period_s) > _PAUSE_FACTOR * period_s:
            for seen in self._seen.values():  # this process was stopped: it has seen nothing meanwhile
                seen.since_s += late_s
        self._last_s = now_s
        others = sorted(leases.keys() - set(own))
        self._seen = {lease_id: sight for lease_id, sight in self._seen.items() if lease_id in others}
        if not others:
            return []
        place = max(own, default=0)
        before = max((lease_id for lease_id in others if lease_id < place), default=others[-1])
        sight = self._seen.get(before)
        if sight is not None and now_s - sight.since_s > _SILENT_FRACTION * leases[before]:
            return others
        return [before]

    def note(self, lease_id: int, content: bytes | None, asked_s: float, answered_s: float) -> None:
        """What the holder's object held, by a read that took from `asked_s` to `answered_s`."""
        self._last_s = answered_s
        sight = self._seen.get(lease_id)
        if sight is None or sight.content != content:
            self._seen[lease_id] = _Sight(content, since_s=answered_s, until_s=asked_s)
        else:
            sight.until_s = asked_s

    def ended(self, leases: Mapping[int, float], looked: Collection[int]) -> list[int]:
        """Those of the leases that were just looked at which nobody has renewed for their TTL.

        Each by the read of its own object: with many, or a slow store, the first is read long before the last.
        """
        seen = self._seen
        return [i for i in looked if i in seen and seen[i].until_s - seen[i].since_s > leases[i]]
