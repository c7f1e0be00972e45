"""Objects far away, under virtual time: slow, lost, doubled, late and ambiguous requests, and listings that lag."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launcher.errors import KVUnavailable
from launcher.kv.bucket.ops import Op, carry_out
from launcher.kv.bucket.register import Create, Names, Overwrite, Read, Request, Together
from launcher.kv.bucket.version import LOG, Version, number_of, version_name
from launcher.kv.state import State

if TYPE_CHECKING:
    from tests.sim.world import World

TIMEOUT_S = 3.0
LAG_S = 5.0
AGAIN_S = 60.0
"""So much later what was sent once may arrive a second time."""


class SimObjects:
    """One bucket. A request is carried out a while after it was sent, and heard of another while later."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(f"objects {world.seed}")
        self._objects: dict[str, bytes] = {}
        self._listings: deque[tuple[float, list[str]]] = deque()
        self.fault = self._random.choice([0.0, 0.005, 0.02])
        """How often a request meets each kind of fault."""
        self.latency_s = self._random.choice([0.001, 0.01, 0.05])
        self.newest = 0

    def ask(self, request: Request, is_open: Callable[[], bool], tell: Callable[[Any], None]) -> None:
        """Carry `request` out; `tell` hears the answer, or the KVUnavailable in its place."""
        if isinstance(request, Together):
            self._ask_all(request, is_open, tell)
            return
        chance, world = self._random, self._world
        kind = chance.random() / self.fault if self.fault else 9.0
        unheard_s = chance.uniform(0.1, TIMEOUT_S)
        if not is_open() or kind < 1.0:
            world.at(unheard_s, lambda: tell(KVUnavailable("not sent")))
        elif kind < 2.0:  # it lands when nobody waits for it
            world.at(unheard_s, lambda: tell(KVUnavailable("on its way for long")))
            world.at(chance.uniform(0.0, 2 * TIMEOUT_S), lambda: self._carry_out(request))
        else:
            world.at(self._delay_s(), lambda: self._answer(request, kind, unheard_s, tell))

    def _answer(self, request: Request, kind: float, unheard_s: float, tell: Callable[[Any], None]) -> None:
        if not self._world.store_up:
            self._world.at(unheard_s, lambda: tell(KVUnavailable("no answer")))
            return
        told = self._carry_out(request)
        if kind < 3.0:
            self._world.at(unheard_s, lambda: tell(KVUnavailable("the answer was lost")))
        else:
            self._world.at(self._delay_s(), lambda: tell(told))
        if 3.0 <= kind < 4.0:
            self._world.at(self._random.uniform(0.0, AGAIN_S), lambda: self._carry_out(request))

    def _ask_all(self, request: Together, is_open: Callable[[], bool], tell: Callable[[Any], None]) -> None:
        answers: dict[int, Any] = {}

        def hear(index: int, told: Any) -> None:
            answers[index] = told
            if len(answers) == len(request.requests):
                tell([answers[i] for i in range(len(answers))])

        for index, one in enumerate(request.requests):
            self.ask(one, is_open, lambda told, index=index: hear(index, told))  # type: ignore[misc]

    def _delay_s(self) -> float:
        chance = self._random
        return chance.uniform(0.5, 1.5) * self.latency_s if chance.random() < 0.995 else chance.uniform(0.0, 2.0)

    def _carry_out(self, request: Request) -> Any:
        match request:
            case Read(name):
                return self._objects.get(name)
            case Names(prefix):
                return [name for name in self._listing() if name.startswith(prefix)]
            case Create(name) if name in self._objects:
                return False
            case Create(name, content):
                self._put(name, content)
                return True
            case Overwrite(name, content):
                self._put(name, content)
        return None

    def _listing(self) -> list[str]:
        now_s, chance = self._world.now_s, self._random
        self._listings.append((now_s, sorted(self._objects)))
        while self._listings[0][0] < now_s - LAG_S:
            self._listings.popleft()
        is_old = self.fault > 0.0 and chance.random() < 0.2
        return self._listings[0][1] if is_old else self._listings[-1][1]

    def _put(self, name: str, content: bytes) -> None:
        self._objects[name] = content
        if (number := number_of(name)) and content:
            self.newest = max(number, self.newest)
            self._world.store = Version.from_bytes(number, content).state
            self._world.check_round()

    def remove(self, name: str) -> None:
        """Somebody tidies up."""
        self._objects.pop(name, None)

    def bury(self, number: int, tombstone: bytes) -> None:
        """A version's content goes, its name stays."""
        if version_name(number) in self._objects:
            self._objects[version_name(number)] = tombstone

    def change_by_hand(self, op: Op) -> None:
        """Somebody who is no node writes the next version, at once."""
        before = self._objects.get(version_name(self.newest))
        if before is None:
            return
        told = Version.from_bytes(self.newest, before)
        draft: State = told.state.fork()
        carry_out(op, draft)
        events = draft.events("", told.state.revision + 1)
        number = self.newest + 1
        recent = {name: until for name, until in told.recent.items() if until > number}
        self._put(version_name(number), Version(number, f"by hand {number}", draft, events, {}, recent).to_bytes())

    @property
    def num_versions(self) -> int:
        """With their names, whatever they hold."""
        return sum(name.startswith(LOG) for name in self._objects)
