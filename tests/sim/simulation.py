"""Lives of a job with faults, each a function of its seed, and what must hold in the quiet after the last fault."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

from launcher.kv.state import State
from launcher.node.board import ROUND
from launcher.rounds.membership import Rules
from launcher.rounds.policy import Limits
from launcher.rounds.records import SUCCEEDED, Round
from tests.sim.faults import Fault
from tests.sim.nodes import SimNode
from tests.sim.objects import SimObjects
from tests.sim.world import Violation, World

FAULTS_UNTIL_S = 60.0
SETTLED_BY_S = 60.0
QUIET_S = 5.0


def simulate(seed: int, *, on_objects: bool | None = None) -> World:
    """One life of a job with faults for a minute and a minute of quiet; raises `Violation`.

    `on_objects`: whether its nodes meet on a bucket; None: every other seed does.
    """
    chance = random.Random(f"faults {seed}")
    num_nodes = chance.randint(2, 7)
    rules = Rules(
        min_nodes=chance.randint(1, num_nodes),
        max_nodes=num_nodes - chance.choice([0, 0, 1]) or 1,
        last_call_s=chance.choice([0.5, 2.0]),
        join_cooldown_s=chance.choice([0.5, 5.0]),
        stop_timeout_s=chance.choice([5.0, 20.0]),
        quorum_timeout_s=1e9,
        limits=Limits(
            crash_loop=1000,
            strikes=chance.choice([1, 2, 3]),
            strike_window_s=30.0,
            exclusion_s=chance.choice([0.5, 4.0]),
        ),
    )
    rules = dataclasses.replace(rules, min_nodes=min(rules.min_nodes, rules.max_nodes))
    world = World(seed, rules, State(history_events=chance.choice([20, 200])))
    if on_objects if on_objects is not None else random.Random(f"place {seed}").random() < 0.5:
        world.objects = SimObjects(world)
        world.ttl_s, world.slow_s = 4.0, 3.0
    names = itertools.count()

    def start() -> None:
        SimNode(world, f"{chance.choice('abcd')}-{next(names):08x}", chance.randint(1, 4))

    for _ in range(num_nodes):
        world.at(chance.uniform(0, 3.0), start)
    for _ in range(chance.randint(0, 12)):
        world.at(chance.uniform(1.0, FAULTS_UNTIL_S), Fault(world, chance, start).strike)
    world.run(FAULTS_UNTIL_S + 5.0)
    _end_faults(world, start)
    _run_until_settled(world)
    return world


def _run_until_settled(world: World) -> None:
    """The job runs at full size a minute after the last fault, if not before; and then it goes on running."""
    ends_s = world.now_s + SETTLED_BY_S
    generation = 0
    while True:
        world.run(world.now_s + QUIET_S)
        try:
            settled = _check_settled(world)
        except Violation:
            if world.now_s >= ends_s:
                raise
            settled = 0
        if settled and settled == generation:
            return
        if world.now_s >= ends_s + 2 * QUIET_S:
            raise Violation(f"generation {settled} runs after {generation}, and nothing had happened")
        generation = settled


def _end_faults(world: World, start: Callable[[], None]) -> None:
    world.cuts.clear()
    if world.objects is not None:
        world.objects.fault = 0.0  # whatever is on its way by then lands late all the same
    for node in list(world.nodes.values()):
        node.cut = node.flaky = False
        if node.frozen:
            node.thaw()
    for _ in range(max(0, world.rules.min_nodes - sum(n.alive for n in world.nodes.values()))):
        start()


def _check_settled(world: World) -> int:
    """The generation that runs."""
    entry = world.store.get(ROUND)
    if entry is None:
        raise Violation("no round was ever formed")
    current = Round.from_json(entry.value)
    if current.outcome:
        raise Violation(f"the job was closed: {current.outcome}" if current.outcome != SUCCEEDED else "succeeded")
    living = [n for n in world.nodes.values() if n.alive]
    expected = min(len(living), world.rules.max_nodes)
    running = [n for n in living if n.running == current.generation]
    if len(current.participants) != len(running):
        raise Violation(
            f"{len(running)} of {len(current.participants)} participants run, a minute after the last fault"
        )
    if len(running) < expected and not _is_as_large(world, living, current):
        raise Violation(f"{len(running)} nodes run where {expected} could")
    return current.generation


def _is_as_large(world: World, living: list[SimNode], current: Round) -> bool:
    """Joiners are taken in only for a larger world; all nodes together may not make one within max nodes."""
    return len(living) > world.rules.max_nodes and len(current.participants) == world.rules.max_nodes
