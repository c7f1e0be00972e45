"""A node's engine with its store, driven by hand: each task is carried out when the test says so, and in its way."""

from __future__ import annotations

from collections import deque

from launcher.kv.state import State
from launcher.node.effects import Delete, Effect, Follow, Get, Grant, Put, Report, Revoke, Task
from launcher.node.engine import NodeEngine
from launcher.node.events import Answered, Event, Granted, LeaseSeen, LeasesSeen, Listed, Started, Tick, Unanswered
from launcher.rounds.membership import Rules
from launcher.rounds.records import Node, Status

TTL_S = 600.0


class Driven:
    """One engine. Time stands still unless a test moves it; leases are renewed unless a test says otherwise."""

    def __init__(self, store: State | None = None, name: str = "a", host: str = "") -> None:
        self.store = store or State()
        self.now_s = 0.0
        self.name = name
        node = Node(node_id=name, host=host or name, address="127.0.0.1", port=1, slots=1)
        self.engine = NodeEngine(node, Rules(), lease_ttl_s=TTL_S, lineage=name)
        self.tasks: deque[Task] = deque()
        self.effects: list[Effect] = []
        self.seen: dict[int, LeaseSeen] = {}

    def feed(self, event: Event) -> None:
        effects = self.engine.step(event, self.now_s)
        self.effects += effects
        self.tasks += [effect for effect in effects if isinstance(effect, Task)]

    def started(self) -> Driven:
        self.feed(Started())
        self.settle()
        return self

    # --- the store

    def apply(self, task: Task) -> Event:
        """Carry a task out."""
        match task:
            case Grant(ttl_s=ttl_s):
                lease_id = self.store.grant(ttl_s, self.now_s)
                self.seen[lease_id] = LeaseSeen(lease_id, self.now_s + ttl_s)
                return Granted(task, ttl_s, self.seen[lease_id])
            case Get(key=key):
                return Answered(task, self.store.get(key))
            case Put(key=key, value=value, if_revision=revision, lease_id=lease_id):
                return Answered(task, self.store.put(key, value, revision, lease_id or None))
            case Delete(key=key, if_revision=revision):
                self.store.delete(key, revision)
            case Revoke(lease_id=lease_id):
                self.store.revoke(lease_id)
        return Answered(task)

    def next(self, kind: type[Task]) -> Task:
        """The next task, which must be of this kind; it is not carried out yet."""
        task = self.tasks.popleft()
        assert isinstance(task, kind), task
        return task

    def carry_out(self, kind: type[Task]) -> None:
        """Carry the next task out, and answer it."""
        self.feed(self.apply(self.next(kind)))

    def give_up(self, kind: type[Task]) -> Task:
        """Do not answer the next task. It may be carried out later."""
        task = self.next(kind)
        self.feed(Unanswered(task, "no answer"))
        return task

    def settle(self) -> None:
        """Carry out what there is to do for this node's own record."""
        while self.tasks and self.tasks[0].lane.name == "RECORD":
            self.carry_out(Task)

    def pass_time(self, seconds: float) -> None:
        """Let time pass; leases are renewed meanwhile."""
        self.now_s += seconds
        renewed = tuple(LeaseSeen(n, self.now_s + TTL_S) for n, seen in self.seen.items() if not seen.lost)
        self.feed(LeasesSeen(renewed))
        self.feed(Tick())

    # --- what is seen of it

    def record(self) -> Node | None:
        """The node's record in the store."""
        entry = self.store.get(f"nodes/{self.name}")
        return Node.from_json(entry.value, entry.create_revision) if entry else None

    def status(self) -> Status | None:
        found = self.record()
        return found.status if found else None

    def listen(self) -> None:
        """Bring what the last `Follow` asks for, as a listing."""
        follow = [effect for effect in self.effects if isinstance(effect, Follow)][-1]
        self.feed(Listed(follow.number, self.store.list(follow.prefix).entries))

    def reports(self) -> list[str]:
        return [effect.event.value for effect in self.effects if isinstance(effect, Report)]
