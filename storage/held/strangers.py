"""Who has connected and has not shown yet that he knows the token: few, and one who is silent goes for one who comes.

Whoever comes may be anybody, and may stay without a word. Where there are too many, the oldest of the host that has the
most has to go, once it has had its time: a host that opens a thousand connections loses its own, and others' stay.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

C = TypeVar("C")


@dataclass
class Strangers(Generic[C]):
    """The connections, oldest first. Pure: its owner has a lock, and closes them.

    Args:
        limit: how many there are at most.
        grace_s: how long each may take, though others wait.
    """

    limit: int
    grace_s: float
    _since: dict[C, tuple[str, float]] = field(default_factory=dict)

    def wait_s(self, now_s: float) -> float:
        """How long from now on the next one has to wait at most; 0 if it may be taken in."""
        if len(self._since) < self.limit:
            return 0.0
        return max(0.0, self._since[self._next_to_go()][1] + self.grace_s - now_s)

    def take_in(self, connection: C, host: str, now_s: float) -> C | None:
        """Take one in that need not wait; returns the one to be closed for it, if one is."""
        gone = self._next_to_go() if len(self._since) >= self.limit else None
        if gone is not None:
            self.leave(gone)
        self._since[connection] = host, now_s
        return gone

    def leave(self, connection: C) -> None:
        """It is no stranger any more, or it is closed. Harmless where it was gone."""
        self._since.pop(connection, None)

    def _next_to_go(self) -> C:
        ((host, _),) = Counter(of for of, _ in self._since.values()).most_common(1)
        return next(connection for connection, (of, _) in self._since.items() if of == host)
