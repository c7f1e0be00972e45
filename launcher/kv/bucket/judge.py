"""Which leases nobody renews any more, by what is seen of them. Pure: times come in.

The holder of a lease writes an object anew; whoever looks sees that it has changed, and counts from then on by a clock
of its own. No two clocks are compared, nor is the store's. The holder counts from before it wrote, so it knows first.

Leases stand in a ring: each client looks at the one before its own, so that what a job asks of the store grows with its
nodes, and not with their square. While that one is silent it looks at all of them. One that was never renewed stands in
nobody's way: its holder may be none that looks at others (who asks for a drain, say), so the one before it is looked at
as well; and so is it where one cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_SILENT_FRACTION = 0.5
_NUM_LOOKED_MAX = 128
_MARGIN_S = 0.02


@dataclass
class _Sight:
    content: bytes | None
    since_s: float  # at this time it was there already
    until_s: float  # at this time it still was


class Judge:
    """One client's view of the leases."""

    def __init__(self) -> None:
        self._seen: dict[int, _Sight] = {}
        self._looked: list[int] = []

    def begin(self, leases: Mapping[int, float], own: Collection[int], now_s: float) -> list[int]:
        """Which leases to look at now: the nearest before this client's own first.

        Args:
            leases: the TTL of each, in seconds.
            own: those that this client renews.
        """
        others = sorted(leases.keys() - set(own))
        # Who has not looked for long begins anew: this process was stopped, or it has looked at another meanwhile. That
        # the same is there again proves nothing then: an old renewal may have landed once more, after newer ones.
        self._seen = {
            lease_id: sight
            for lease_id, sight in self._seen.items()
            if lease_id in others and now_s - sight.until_s <= _SILENT_FRACTION * leases[lease_id]
        }
        place = max(leases.keys() & set(own), default=0)
        ring = [i for i in reversed(others) if i < place] + [i for i in reversed(others) if i > place]
        num = 0
        for before in ring:
            num += 1
            sight = self._seen.get(before)
            if sight is None:
                if before not in self._looked:
                    break  # else it could not be read
            elif now_s - sight.since_s > _SILENT_FRACTION * leases[before]:
                num = _NUM_LOOKED_MAX
                break
            elif sight.content is not None:
                break
        self._looked = ring[:num]
        return self._looked

    def note(self, lease_id: int, content: bytes | None, asked_s: float, answered_s: float) -> None:
        """What the holder's object held, by a read that took from `asked_s` to `answered_s`."""
        sight = self._seen.get(lease_id)
        if sight is None or sight.content != content:
            self._seen[lease_id] = _Sight(content, since_s=answered_s, until_s=asked_s)
        else:
            sight.until_s = asked_s

    def due_s(self, leases: Mapping[int, float]) -> float:
        """When a lease that is silent for long may be found ended: sooner than at the next look, perhaps."""
        silent = [
            sight.since_s + leases[lease_id]
            for lease_id, sight in self._seen.items()
            if lease_id in leases and sight.until_s - sight.since_s > _SILENT_FRACTION * leases[lease_id]
        ]
        return min(silent, default=math.inf) + _MARGIN_S

    def ended(self, leases: Mapping[int, float], looked: Collection[int]) -> list[int]:
        """Those of the leases that were just looked at which nobody has renewed for their TTL.

        Each by the read of its own object: with many, or a slow store, the first is read long before the last.
        """
        seen = self._seen
        return [i for i in looked if i in seen and seen[i].until_s - seen[i].since_s > leases[i]]
