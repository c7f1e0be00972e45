"""A job of members in one process, each with a way to the store that can be cut."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launcher.coordination.member import Member
from launcher.errors import KVError, KVUnavailable
from launcher.health.liveness import LivenessListener
from launcher.kv.memory import Hub, MemoryKV
from launcher.node.board import LEADER, NODES, run_prefix
from launcher.rounds.membership import Rules
from launcher.rounds.records import Node, Round, Status
from tests.cluster import until

LEASE_TTL_S = 30.0
"""No test waits for one to end: this process may stand still for seconds on a busy machine."""
WAIT_S = 60.0


class Told:
    """Collects events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


class CuttableKV(MemoryKV):
    """A client whose way to the store can be cut."""

    cut = False
    broken = False
    num_refused = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("put", "list") and self.broken:
            self.num_refused += 1
            raise KVError("user name is empty")
        if name in ("get", "put", "list", "delete", "watch", "lease") and self.cut:
            raise KVUnavailable("cut off")
        return super().__getattribute__(name)


class Job:
    def __init__(self, rules: Rules) -> None:
        self.hub = Hub()
        self.rules = rules
        self.members: dict[str, Member] = {}
        self.clients: dict[str, CuttableKV] = {}
        self.told = Told()
        self.bells: list[LivenessListener] = []

    def start(self, name: str) -> Member:
        kv = CuttableKV(self.hub)
        self.bells.append(LivenessListener("127.0.0.1"))
        self.bells[-1].start()
        node = Node(node_id=name, host=name, address="127.0.0.1", port=self.bells[-1].port, slots=1)
        planner = lambda slots, previous: None  # noqa: E731
        member = Member(kv, "test", node, self.rules, planner, self.told, lease_ttl_s=LEASE_TTL_S)
        member.start()
        self.clients[name], self.members[name] = kv, member
        return member

    def start_led(self, leader: str, *others: str) -> None:
        """Start the leader, and the others once it leads: who registers first need not be who comes to lead.

        The first round waits for all of them, however long a busy machine takes to start them.
        """
        self.rules = dataclasses.replace(self.rules, max_nodes=1 + len(others), last_call_s=60.0)
        first = self.start(leader)
        until(f"{leader} leads", lambda: first._engine.leader, WAIT_S)
        for name in others:
            self.start(name)

    def from_now_on(self, **rules: Any) -> None:
        """Change rules, also for who leads: what was to be done before had all the time that it took."""
        self.rules = dataclasses.replace(self.rules, **rules)
        for member in self.members.values():
            member._engine.rules = self.rules
            if (leader := member._engine.leader) is not None:
                leader._rules = self.rules

    def join(self, *names: str) -> Round:
        """The named nodes join the next round, which is the same for all."""
        with ThreadPoolExecutor(len(names)) as pool:
            rounds = list(pool.map(self._join, names))
        assert len(set(rounds)) == 1
        return rounds[0]

    def _join(self, name: str) -> Round:
        member = self.members[name]
        return member.join(member.wait_round(WAIT_S).generation, WAIT_S)

    def nodes(self) -> dict[str, Node]:
        """The records in the store."""
        entries = self.hub.list(f"{run_prefix('test')}{NODES}").entries
        return {n.node_id: n for n in (Node.from_json(e.value, e.create_revision) for e in entries)}

    def has_told(self, *names: str) -> None:
        """Wait until the job has told these events, and no others of their kinds, in this order.

        Whoever writes a round tells of it once the store has answered, when all others may know of it.
        """

        def told() -> list[str]:
            return [name for name in self.told.names() if name in names]

        until(f"{names} are told", lambda: len(told()) >= len(names), WAIT_S)
        assert told() == list(names)

    def leader(self) -> str:
        """Who leads, by the store; "" if nobody does."""
        entry = self.hub.get(f"{run_prefix('test')}{LEADER}")
        return entry.value.decode().partition(" ")[0] if entry else ""

    def stop_workers(self, *names: str) -> None:
        for name in names:
            self.members[name].announce(Status.READY, reason="stopped")


def broken(member: Member, generation: int) -> str:
    return until("the round is broken", lambda: member.broken(generation), WAIT_S).reason
