"""Survivors of a lost peer share a newest step, wherever in a step each of them was."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from storage.errors import Corrupt
from storage.events import CheckpointEvent, Reporter
from storage.held.choice import held_states, join, worth_a_look
from storage.held.inventory import HeldPart
from storage.live.door import Door, Turn
from storage.live.state import LivePart, LiveState
from storage.ranks.agreement import AgreeingGroup
from storage.saving.writing import Payload
from storage.service.capturing import part_of
from storage.service.live_messages import KeepLive
from storage.service.messages import Identity, StagedAttempt
from storage.service.table import HandedOver
from tests.cluster import until
from tests.storage.thread_ranks import Meeting, PeerLost, ThreadGroup

DEADLINE_S = 60.0
NUM_SEEDS = int(os.environ.get("DOOR_SEEDS", "25"))
"""How many lives of survivors are drawn, each captured at random moments."""


class Survivor:
    """A rank that holds a part of the state, and trains until it has done its steps, or hangs.

    `gates`: by step, what it waits for before it comes to that step's door. `own`: the last step that its thread has
    applied by itself.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank = rank
        self.group = ThreadGroup(meeting, rank)
        self.weight = torch.zeros(4)
        self.state: dict[str, Any] = {f"weight-{rank}": self.weight, "step": 0}
        self.gates: dict[int, threading.Event] = {}
        self.naps = random.Random(0)
        self.nap_s = 0.0
        self.applied = self.own = 0
        self.fails_at: int | None = None
        self.parts: dict[int, HeldPart] = {}
        self.missed: list[tuple[int, str]] = []
        # it is not started, so it hears of no optimizers, which all threads of a process have in common
        self.live = LiveState(self.group, self._publish, Reporter(self._hear))
        self.thread = threading.Thread()

    def start(self, num_steps: int) -> None:
        self.thread = threading.Thread(target=self._train, args=(num_steps,), daemon=True)
        self.thread.start()

    def waits_at_the_door_of(self, step: int) -> bool:
        turn = self.live._door._turn
        return turn is not None and turn.step == step and self.group.is_waiting

    def capture(self) -> int | str:
        return self.live.capture(DEADLINE_S)

    def _train(self, num_steps: int) -> None:
        with contextlib.suppress(PeerLost, ValueError):
            self.live.note(0, self.state)
            for step in range(1, num_steps + 1):
                time.sleep(self.naps.random() * self.nap_s)
                if step in self.gates:
                    self.gates[step].wait(DEADLINE_S)
                self.live.finish(step, self.state, self._apply)

    def _hear(self, event: CheckpointEvent, fields: dict[str, Any]) -> None:
        if event is CheckpointEvent.LIVE_MISSED:
            self.missed.append((fields["step"], fields["reason"]))

    def _apply(self) -> None:
        if self.applied + 1 == self.fails_at:
            raise ValueError("the script's own")
        self.applied += 1
        self.weight.add_(self.rank + 1.0)
        self.state["step"] = self.applied
        if threading.current_thread() is self.thread:
            self.own = self.applied

    def _publish(self, part: LivePart) -> None:
        """As the service does; of copies, since the slot is used no longer than this call."""
        payloads = [
            Payload(p.chunk, p.content.clone() if isinstance(p.content, torch.Tensor) else p.content)
            for p in part.payloads
        ]
        attempt = StagedAttempt(**vars(part.attempt), rank=part.rank)
        keep = KeepLive(url="/runs/a", attempt=attempt, origin=Identity(generation=1, lineage="here"))
        self.parts[part.attempt.step] = part_of(keep, HandedOver(payloads, part.contents, None, ()))


class World:
    """Two survivors that hold the whole state together, and a peer that is lost."""

    def __init__(self) -> None:
        self.meeting = Meeting(3)
        self.survivors = [Survivor(self.meeting, rank) for rank in range(2)]
        self.peer = Survivor(self.meeting, 2)
        del self.peer.state["weight-2"]  # what it has others have as well

    def start(self, peer_steps: int) -> None:
        """Train; the peer is gone after so many steps."""
        for survivor in self.survivors:
            survivor.start(1000)
        self.peer.start(peer_steps)

    def close(self) -> None:
        self.meeting.end()
        for rank in (*self.survivors, self.peer):
            rank.live.close(rescue=False)
            rank.thread.join(DEADLINE_S)
            assert not rank.thread.is_alive()

    def goes_on_from(self) -> tuple[int, list[float]]:
        """What a restore takes of what the survivors' services hold: its step, and the two weights."""
        offers = [[part.label for part in survivor.parts.values()] for survivor in self.survivors]
        for state in worth_a_look(held_states(offers, "here"), None, unhealthy=False):
            step = state.label.step
            parts = [survivor.parts[step] for survivor in self.survivors if step in survivor.parts]
            with contextlib.suppress(Corrupt):
                return step, weights_in(parts)
        raise AssertionError(f"no step is held whole: {[sorted(survivor.parts) for survivor in self.survivors]}")


def weights_in(parts: list[HeldPart]) -> list[float]:
    """The weights of the state that those parts make. Raises Corrupt: they make none."""
    manifest = join([part.papers for part in parts]).manifest
    objects = {name: held for part in parts for name, held in part.objects.items()}
    found = {}
    for item in manifest.items.rows():
        if item.key.startswith("weight-"):
            assert item.raw_offset is not None
            views = objects[manifest.objects[item.object].name].views(item.offset + item.raw_offset, 16)
            (found[item.key],) = set(
                torch.frombuffer(bytearray(b"".join(map(bytes, views))), dtype=torch.float32).tolist()
            )
    return [found[key] for key in sorted(found)]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("late", [0, 1])
def test_one_is_at_the_door_and_one_on_its_way(world: World, late: int, first: int) -> None:
    """Whoever is captured first, they have a step in common, and nobody has gone further by itself."""
    gate = world.survivors[late].gates[3] = threading.Event()
    world.start(peer_steps=9)
    until("one at the door", lambda: world.survivors[1 - late].waits_at_the_door_of(3))
    world.survivors[first].capture()
    gate.set()  # the other comes, if nothing keeps it
    world.survivors[1 - first].capture()
    step, weights = world.goes_on_from()
    assert step >= max(survivor.own for survivor in world.survivors)
    assert weights == [step * 1.0, step * 2.0]


def test_who_is_captured_on_its_way_does_not_come_to_the_door(world: World) -> None:
    """So the others do not pass it either, and are not ahead when they are captured."""
    early, late = world.survivors
    gate = late.gates[3] = threading.Event()
    world.start(peer_steps=9)
    until("one at the door", lambda: early.waits_at_the_door_of(3))
    assert late.capture() == 2
    gate.set()
    early.thread.join(0.2)  # as long as it gets, it does not pass
    assert early.own == 2
    assert early.capture() == 3
    assert sorted(early.parts) == [2, 3], "it could not know whether the other is at the door as well"
    assert world.goes_on_from() == (2, [2.0, 4.0])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_all_survivors_are_at_the_door(world: World, order: tuple[int, int]) -> None:
    """The peer is gone, and each has all that it needs: the step is applied for them."""
    world.start(peer_steps=2)
    until("both at the door", lambda: all(survivor.waits_at_the_door_of(3) for survivor in world.survivors))
    assert [world.survivors[rank].capture() for rank in order] == [3, 3]
    assert world.goes_on_from() == (3, [3.0, 6.0])
    assert [(survivor.applied, survivor.own) for survivor in world.survivors] == [(3, 2), (3, 2)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("slow", [0, 1])
def test_one_has_passed_and_one_has_not_yet(
    world: World, slow: int, order: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    behind, ahead = world.survivors[slow], world.survivors[1 - slow]
    gate, meet = threading.Event(), behind.group.any

    def meet_slowly(flag: bool) -> bool:
        found = meet(flag)
        if behind.applied == 2:
            gate.wait(DEADLINE_S)
        return found

    monkeypatch.setattr(behind.group, "any", meet_slowly)
    world.start(peer_steps=3)
    until("one ahead of the other", lambda: ahead.own == 3 and behind.live._door._turn is not None)
    assert behind.own == 2
    for rank in order:
        world.survivors[rank].capture()
    assert 3 in ahead.parts
    assert sorted(behind.parts) == [2, 3]
    assert world.goes_on_from() == (3, [3.0, 6.0])
    gate.set()
    behind.thread.join(0.2)
    assert (behind.applied, behind.own) == (3, 2), "its own thread finds the step applied"


def test_an_error_at_the_door_is_as_good_as_waiting_there(world: World) -> None:
    """Where the collective fails, the thread that trains captures on its way out."""
    world.start(peer_steps=2)
    until("both at the door", lambda: all(survivor.waits_at_the_door_of(3) for survivor in world.survivors))
    world.meeting.end()
    for survivor in world.survivors:
        survivor.thread.join(DEADLINE_S)
        survivor.live.close(rescue=True)
        assert sorted(survivor.parts) == [2, 3]
    assert world.goes_on_from() == (3, [3.0, 6.0])


def test_a_step_that_cannot_be_applied_beside_the_training_leaves_the_one_before(world: World) -> None:
    world.survivors[0].fails_at = 3
    world.start(peer_steps=2)
    until("both at the door", lambda: all(survivor.waits_at_the_door_of(3) for survivor in world.survivors))
    assert [survivor.capture() for survivor in world.survivors] == [2, 3]
    assert world.survivors[0].missed == [(3, "ValueError: the script's own")]
    assert world.goes_on_from() == (2, [2.0, 4.0])


def test_a_restore_after_a_step_that_failed_takes_its_turn_away(world: World) -> None:
    """A script may catch the error, and go on from a checkpoint: the old step must not be applied to that."""
    world.start(peer_steps=2)
    until("the door", lambda: world.survivors[0].waits_at_the_door_of(3))
    world.meeting.end()
    world.survivors[0].thread.join(DEADLINE_S)
    world.survivors[0].live.forget("a restore has begun")
    assert world.survivors[0].capture() == "a restore has begun"
    assert world.survivors[0].applied == 2


def test_the_first_step_of_all_is_noted_without_a_door() -> None:
    """Before it nothing was agreed on that could be captured."""
    state, parts = {"weight": torch.zeros(2)}, list[LivePart]()
    live = LiveState(AgreeingGroup(alone=True), parts.append, Reporter(None))
    live.finish(1, state, lambda: state["weight"].add_(1))
    assert live.capture(DEADLINE_S) == 1
    live.close(rescue=False)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_at_whatever_moments_survivors_are_captured(world: World, seed: int) -> None:
    """No step that any of them has applied by itself is done again."""
    chance = random.Random(seed)
    for rank in (*world.survivors, world.peer):
        rank.naps, rank.nap_s = random.Random(chance.random()), 0.002
    world.start(peer_steps=chance.randrange(1, 12))
    until("a step", lambda: all(survivor.applied for survivor in world.survivors))
    time.sleep(chance.random() * 0.02)
    for survivor in chance.sample(world.survivors, 2):
        survivor.capture()
        time.sleep(chance.random() * 0.004)
    step, weights = world.goes_on_from()
    assert step >= max(survivor.own for survivor in world.survivors)
    assert weights == [step * 1.0, step * 2.0]


def test_a_turn_is_taken_once() -> None:
    taken: list[int] = []
    turn = Turn(1, lambda: taken.append(1))
    for _ in range(2):
        turn.take()
    assert taken == [1]

    def fail() -> None:
        taken.append(2)
        raise ValueError("no memory")

    failing = Turn(2, fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="no memory"):
            failing.take()
    assert taken == [1, 2]


def test_who_captures_waits_no_longer_than_it_may_for_a_step_that_the_training_applies() -> None:
    begun, ends = threading.Event(), threading.Event()

    def apply() -> None:
        begun.set()
        ends.wait(DEADLINE_S)

    turn = Turn(2, apply)
    training = threading.Thread(target=turn.take, daemon=True)
    training.start()
    assert begun.wait(DEADLINE_S)
    assert not turn.take(0.0)
    missed = list[Any]()
    live = LiveState(
        AgreeingGroup(alone=True), lambda part: None, Reporter(lambda event, fields: missed.append((event, fields)))
    )
    live.finish(1, {"weight": torch.zeros(2)}, lambda: None)
    live._door.come(turn)
    live._capture_noted = lambda deadline_s, patience_s: 1  # type: ignore[method-assign]
    assert live.capture(0.0) == 1
    (told,) = [fields for event, fields in missed if event is CheckpointEvent.LIVE_MISSED]
    assert told == {"step": 2, "reason": "step 2 is still being applied"}
    ends.set()
    training.join(DEADLINE_S)
    assert turn.take(0.0)
    live.close(rescue=False)


def test_a_shut_door_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a training that is closed, and, after a while, for one that nobody has ended."""
    door, turn = Door(), Turn(1, lambda: None)
    assert door.shut() is None
    order: list[str] = []

    def come() -> None:
        door.come(turn)
        order.append("came")

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    thread.join(0.2)
    order.append("opened")
    door.open()
    thread.join(DEADLINE_S)
    assert order == ["opened", "came"]
    assert door.shut() is turn
    monkeypatch.setattr("storage.live.door._SHUT_S", 0.01)
    door.come(Turn(2, lambda: None))
    door.leave()
    assert door.shut() is None
