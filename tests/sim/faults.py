"""What befalls a job: one fault each, drawn beforehand, which strikes at its time."""

from __future__ import annotations

import random
from collections.abc import Callable

from launcher.kv.bucket.ops import DeleteKey
from launcher.node.board import NODES
from launcher.rounds.failures import FailureClass
from tests.sim.nodes import SimNode
from tests.sim.world import World

ENDS_THE_JOB = (FailureClass.GAVE_UP, FailureClass.USAGE, FailureClass.START_UP)


class Fault:
    """Drawn from `chance`; `start` starts a new node."""

    def __init__(self, world: World, chance: random.Random, start: Callable[[], None]) -> None:
        self._world = world
        self._start = start
        self._kind = chance.choice(KINDS)
        self._failure = chance.choice([kind for kind in FailureClass if kind not in ENDS_THE_JOB])
        self._pick, self._other = chance.random(), chance.random()
        self._length_s = chance.uniform(0.1, 8.0)
        self._how = chance.choice(["paused", "killed", "frozen"])  # the store

    def strike(self) -> None:
        """It happens, if it can now."""
        living = self._living()
        if living:
            victim = living[int(self._pick * len(living))]
            self._world.note(f"fault: {self._kind.__name__} {victim.name} {self._length_s:.1f}")
            self._kind(self, victim)

    def _living(self) -> list[SimNode]:
        return [node for node in self._world.nodes.values() if node.alive]

    def _later(self, action: Callable[[], object]) -> None:
        self._world.at(self._length_s, action)

    # --- a node

    def kill(self, victim: SimNode) -> None:
        victim.kill()
        self._later(self._start)

    def leave(self, victim: SimNode) -> None:
        victim.leave()
        self._later(self._start)

    def join(self, victim: SimNode) -> None:
        self._start()

    def drain(self, victim: SimNode) -> None:
        victim.agent.drain()
        self._later(self._start)

    def freeze(self, victim: SimNode) -> None:
        if not victim.frozen:
            victim.frozen = True
            # On objects a writer may also be stopped for a minute between its look and its write.
            is_long = self._world.objects is not None and self._other < 0.2
            self._world.at(60.0 if is_long else self._length_s, victim.thaw)

    # --- its workers

    def crash(self, victim: SimNode) -> None:
        if victim.agent.is_idle_or_running and not victim.frozen:
            victim.agent.crash(self._failure, int(self._world.now_s) if self._pick < 0.7 else 0)

    def get_stuck(self, victim: SimNode) -> None:
        victim.agent.are_stuck = victim.running > 0

    def be_unfit(self, victim: SimNode) -> None:
        victim.agent.be_unfit(self._length_s)

    # --- its ways

    def cut_from_store(self, victim: SimNode) -> None:
        victim.cut = True
        self._later(lambda: setattr(victim, "cut", False))

    def lose_answers(self, victim: SimNode) -> None:
        victim.flaky = True
        self._later(lambda: setattr(victim, "flaky", False))

    def cut_from_peer(self, victim: SimNode) -> None:
        living, world = self._living(), self._world
        pair = frozenset((victim.name, living[int(self._other * len(living))].name))
        if len(pair) == 2 and pair not in world.cuts:
            world.cuts[pair] = world.now_s
            world.at(2 * self._length_s, lambda: world.cuts.pop(pair, None))

    # --- the store

    def delete_record(self, victim: SimNode) -> None:
        """By hand, say."""
        if self._world.objects is not None:
            self._world.objects.change_by_hand(DeleteKey(f"{NODES}{victim.name}"))
        elif self._world.store_up:
            self._world.store.delete(f"{NODES}{victim.name}")

    def take_store_away(self, victim: SimNode) -> None:
        world = self._world
        if not world.store_up:
            return
        world.store_up, world.store_refuses = False, self._how == "killed" and world.objects is None
        stopped_s = world.now_s

        def up() -> None:
            world.store_up = True
            if world.objects is not None:  # it has no part in leases
                return
            if self._how == "paused":  # the embedded store's host was
                world.store.extend_all(world.now_s - stopped_s)
            elif self._how == "killed":  # etcd's leader gives every lease its TTL when it is elected
                for grant in world.store._grants.values():
                    grant.ends_s = world.now_s + grant.ttl_s

        self._later(up)

    def lose_store(self, victim: SimNode) -> None:
        """It is hosted anew, and knows nothing."""
        if self._world.store_up and self._other < 0.3 and self._world.objects is None:
            self._world.lose_store()


KINDS = (
    *(Fault.kill, Fault.kill, Fault.leave, Fault.join, Fault.drain, Fault.freeze),
    *(Fault.crash, Fault.crash, Fault.get_stuck, Fault.get_stuck, Fault.be_unfit),
    *(Fault.cut_from_store, Fault.lose_answers, Fault.lose_answers, Fault.cut_from_peer, Fault.cut_from_peer),
    *(Fault.delete_record, Fault.take_store_away, Fault.lose_store),
)
