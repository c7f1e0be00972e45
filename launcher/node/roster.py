"""What the leader makes of what is on the board: who departed how, who is awaited, and when what began.

Times are the caller's monotonic clock's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from launcher.kv.base import Entry, WatchEvent
from launcher.node.board import LEASE_ENDED, Board, Departure, News, NodeGone, NodeSeen, RoundSeen
from launcher.rounds.membership import View, breakage
from launcher.rounds.records import LEFT, LEFT_AT_ONCE, Node


class Roster:
    """All nodes and the round, as the leader sees them, or whoever looks on."""

    def __init__(
        self,
        lineage: str,
        now_s: float,
        *,
        board: Board | None = None,
        grace_s: float = 0.0,
        departed: Mapping[str, str] | None = None,
    ) -> None:
        """`board`: somebody else's, who passes on its `News`; else this roster has one of its own.

        `grace_s`: for so long participants that the first listing does not show are awaited, before they count as lost;
        except those whose going is known (`departed`: node -> how).
        """
        self.board = board or Board()
        self._lineage = lineage
        self._departed = dict(departed or {})
        self._fell: dict[str, int] = {}
        self._grace_s = grace_s
        self._awaited: frozenset[str] | None = None  # not listed yet
        self._awaited_until_s = 0.0
        self._nodes_changed_s = self._formed_s = self._broken_s = now_s
        self._reported_s = -math.inf
        self._drained_s = now_s if any(how.startswith(LEFT) for how in self._departed.values()) else -math.inf
        self._was_broken = True

    @property
    def nodes(self) -> dict[str, Node]:
        """The live records."""
        return self.board.nodes

    @property
    def awaited(self) -> frozenset[str]:
        """Participants that may still come back."""
        return self._awaited or frozenset()

    @property
    def is_listed(self) -> bool:
        """Whether a whole listing was learnt."""
        return self._awaited is not None

    def view(self) -> View:
        """What `membership.decide` wants to know, as of now: it does not change with this roster."""
        return View(
            nodes=tuple(self.board.nodes.values()),
            round=self.board.round,
            nodes_changed_s=self._nodes_changed_s,
            formed_s=self._formed_s,
            broken_s=self._broken_s,
            lineage=self._lineage,
            departed=dict(self._departed),
            fell=dict(self._fell),
            awaited=self.awaited,
            awaited_until_s=self._awaited_until_s,
            leader=self.board.leader,
            drained_s=self._drained_s,
            reported_s=self._reported_s,
        )

    # --- for those who only look on

    def replace(self, entries: Iterable[Entry], now_s: float) -> None:
        """Learn a whole listing."""
        self.take(self.board.replace(entries), now_s, listed=True)
        self.settle(now_s)

    def apply(self, changes: Iterable[WatchEvent], now_s: float) -> None:
        """Learn changes in the order in which the store made them."""
        self.take(self.board.apply(changes), now_s)
        self.settle(now_s)

    # --- for the leader

    def take(self, news: Iterable[News], now_s: float, *, listed: bool = False) -> list[Departure]:
        """Learn what is new on the board; `listed`: it is a whole listing. Who has departed with that."""
        gone = []
        for one in news:
            match one:
                case NodeSeen():
                    self._note_node(one, now_s)
                case NodeGone(node):
                    gone.append(self._note_gone(node, now_s))
                case RoundSeen(current, before):
                    if current and (before is None or current.generation != before.generation):
                        self._formed_s = now_s
        if listed and self._awaited is None:
            gone += self._await_the_absent(now_s)
        return gone

    def presume_lost(self, node_id: str, reason: str) -> bool:
        """Note why a node's record is about to go; False if it is gone or leaves of its own accord."""
        node = self.board.nodes.get(node_id)
        if node is None or node.reason == LEFT:
            return False
        self._departed[node_id] = f"lost: {reason}"
        return True

    def give_up(self, node_id: str, reason: str) -> list[Departure]:
        """An awaited node will not come back."""
        if node_id not in self.awaited:
            return []
        self._awaited = self.awaited - {node_id}
        self._departed[node_id] = f"lost: {reason}"
        return [Departure(node_id, self._departed[node_id])]

    def settle(self, now_s: float) -> list[Departure]:
        """Note what time has changed: when the round broke, and who was awaited for too long."""
        overdue: list[Departure] = []
        if self.awaited and now_s >= self._awaited_until_s:
            overdue = [Departure(n, "lost: its record is gone") for n in sorted(self.awaited)]
            self._departed.update((gone.node_id, gone.how) for gone in overdue)
            self._awaited = frozenset()
        broken = self.board.round is None or breakage(self.view()) is not None
        if broken and not self._was_broken:
            self._broken_s = now_s
        self._was_broken = broken
        return overdue

    def _await_the_absent(self, now_s: float) -> list[Departure]:
        current = self.board.round
        absent = [p.node_id for p in current.participants if p.node_id not in self.nodes] if current else []
        self._awaited = frozenset(n for n in absent if n not in self._departed)
        self._awaited_until_s = now_s + self._grace_s
        return [Departure(n, self._departed[n]) for n in absent if n in self._departed]

    def _note_node(self, seen: NodeSeen, now_s: float) -> None:
        node, before = seen.node, seen.before
        if before is None:
            self._nodes_changed_s = now_s
            self._departed.pop(node.node_id, None)
            self._awaited = self._awaited and self._awaited - {node.node_id}
        if node.draining and not (before and before.draining):
            self._drained_s = now_s
        if not set(node.cannot_reach) <= set(before.cannot_reach if before else ()):
            self._reported_s = now_s
        if node.failure is None:
            self._fell.pop(node.node_id, None)
        else:
            self._fell.setdefault(node.node_id, seen.revision)

    def _note_gone(self, node: Node, now_s: float) -> Departure:
        self._fell.pop(node.node_id, None)
        self._nodes_changed_s = now_s
        how = (LEFT if node.yielded else LEFT_AT_ONCE) if node.reason == LEFT else LEASE_ENDED
        return Departure(node.node_id, self._departed.setdefault(node.node_id, how), node.lease_ttl_s)
