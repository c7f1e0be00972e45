"""`save(step, state)` after each step: which calls save, what they cost, and what a backlog leads to."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from storage import AgreeingGroup, Checkpointer, CheckpointEvent, UsageError, checkpointer, open_store
from storage.events import Reporter
from storage.pace.rules import Tier
from storage.ranks.group import Group
from storage.run import heartbeat, owner
from storage.run.owner import FailuresSeen, Owner
from storage.saving.options import SavingPlan
from storage.saving.pacer import Pacer
from storage.stores.memory import MemoryStore
from storage.stores.objects import Fetch, ObjectInfo
from tests.cluster import until
from tests.ranks import Ranks
from tests.storage.small_runs import Events, opened, state, states

COLLECTIVES = ("broadcast", "gather", "begin_all_gather", "all_gather_long", "any", "swap")


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The collectives that were called, by name."""
    called: list[str] = []
    for name in COLLECTIVES:
        original = getattr(Group, name)

        def counted(*args: Any, _name: str = name, _original: Callable[..., Any] = original) -> Any:
            called.append(_name)
            return _original(*args)

        monkeypatch.setattr(Group, name, counted)
    return called


class Gate(MemoryStore):
    """A store that stores no data object while it is closed."""

    def __init__(self) -> None:
        super().__init__("gate")
        self.is_open = threading.Event()
        self.is_met = threading.Event()

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        self.is_met.set()
        assert self.is_open.wait(60)
        return super().put_from(key, size_bytes, fetch, pool)


def told(events: Events, name: str) -> list[dict[str, Any]]:
    return [fields for event, fields in events[0] if event == name]


def saved(events: Events) -> list[int]:
    return [fields["step"] for fields in told(events, "checkpoint_staged")]


def test_every_so_many_steps_and_whenever_it_must(memory_url: str, events: Events) -> None:
    with Checkpointer(memory_url, every=10, keep=99, on_event=events[1]) as ckpt:
        for step in range(1, 36):
            assert ckpt.due(step) == (step in (10, 20, 30))
            ckpt.save(step, state(step), wait=step == 23, now=step == 33)
    assert saved(events) == [10, 20, 23, 30, 33]
    assert [step for step, _ in states(memory_url)] == [33, 30, 23, 20, 10]
    with Checkpointer(memory_url, every=5, keep=99, on_event=events[1]) as ckpt:
        assert ckpt.restore(state(0)) == 33
        for step in range(36, 42):  # 35, a multiple, was passed since
            ckpt.save(step, state(step))
    assert saved(events)[5:] == [36, 40]


def test_without_a_rule_every_call_saves(memory_url: str, events: Events) -> None:
    with Checkpointer(memory_url, on_event=events[1]) as ckpt:
        for step in (1, 2, 4):
            assert ckpt.due(step)
            ckpt.save(step, state(step))
    assert saved(events) == [1, 2, 4]


def test_a_call_that_saves_nothing_costs_no_collective(memory_url: str, collectives: list[str]) -> None:
    with Checkpointer(memory_url, every=10) as ckpt:
        collectives.clear()
        for step in range(1, 10):
            ckpt.save(step, state(step))
        assert collectives == []
        ckpt.save(10, state(10))
        assert collectives == ["begin_all_gather", "gather", "broadcast"]


class Noting:
    """A live session that only remembers what was noted."""

    is_agreed, guard = True, None
    asks = False

    def __init__(self, *given: object) -> None:
        self.noted: list[int] = []
        self.saves: list[int] = []
        self.state, self.on_connect = self, list[object]()

    def note(self, step: int, state: object, *, healthy: bool = True) -> None:
        self.noted.append(step)
        self.asks = step == 6

    def saved(self, step: int, state: object, *, healthy: bool = True) -> None:
        self.saves.append(step)

    def close(self, *, rescue: bool) -> None:
        assert not rescue


def test_each_call_notes_its_step(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    live = Noting()
    monkeypatch.setattr(checkpointer, "live_session", lambda *given: live)
    with Checkpointer(memory_url, every=3) as ckpt:
        for step in range(1, 7):
            ckpt.save(step, state(step))
        ckpt.note(7, state(7))
    assert live.noted == [1, 2, 3, 4, 5, 6, 7]
    assert live.saves == [6], "they agree anew where a rank has asked for it, and only there"


def test_an_odd_step_is_refused_whether_it_is_due_or_not(memory_url: str) -> None:
    with Checkpointer(memory_url, every=10) as ckpt:
        for odd in (-1, 1.5, "3", True):
            with pytest.raises(UsageError, match="step is"):
                ckpt.save(odd, state(1))  # type: ignore[arg-type]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pacer(events: Events, clock: Clock, failures: int = 0, **options: Any) -> tuple[Pacer, Reporter]:
    report = Reporter(events[1])
    seen = FailuresSeen(failures, 0.0)
    plan = SavingPlan.of(**options)
    return Pacer(AgreeingGroup(alone=True), plan, report, lambda: seen, give_up_s=1e6, clock=clock), report


def test_a_rule_of_time_asks_the_coordinator_seldom(events: Events, collectives: list[str]) -> None:
    clock = Clock()
    pace, _ = pacer(events, clock, every="60s")
    due = []
    for step in range(1, 2401):
        clock.now_s += 0.1
        if pace.due(step):
            due.append(step)
            pace.began(step, Tier.STORE)
            assert pace.due(step) is Tier.STORE  # asked again, it says the same
            pace.returned(is_saving=True)
    assert due == [600, 1200, 1800, 2400]
    assert collectives.count("broadcast") < 80


def test_by_itself_it_waits_for_the_commit_and_tells_its_pace(events: Events) -> None:
    clock = Clock()
    pace, report = pacer(events, clock, failures=3, every="auto")
    saves: list[int] = []
    for step in range(1, 2001):
        clock.now_s += 0.1
        if pace.due(step):
            saves.append(step)
            pace.began(step, Tier.STORE)
            clock.now_s += 0.4
            pace.returned(is_saving=True)
        if saves and step == saves[-1] + 50:
            report(CheckpointEvent.COMMITTED, step=saves[-1], seconds=5.4, bytes=1)
    # one in sqrt(2 x 0.4 s x 900 s) = 26.8 s, and somewhat more
    gaps = [b - a for a, b in itertools.pairwise(saves)]
    assert gaps and all(255 <= gap <= 285 for gap in gaps), gaps
    (pace_told,) = told(events, "checkpoint_pace")
    assert pace_told["cost_s"] == pytest.approx(0.4)
    assert pace_told["seconds"] == pytest.approx(27.0, abs=0.5)
    assert (pace_told["failures"], pace_told["mtbf_s"], pace_told["step"]) == (3, 900.0, saves[0])


def test_a_failed_save_is_an_end_too_and_one_that_never_ends_is_given_up(events: Events) -> None:
    clock = Clock()
    pace, report = pacer(events, clock, every="auto")
    assert pace.due(1)
    pace.began(1, Tier.STORE)
    pace.returned(is_saving=True)
    clock.now_s += 1.0
    assert not pace.due(2)
    report(CheckpointEvent.FAILED, step=1, seconds=1.0, reason="away")
    clock.now_s += 1.0
    assert any(pace.due(step) for step in range(3, 9))
    pace.began(9, Tier.STORE)
    pace.returned(is_saving=True)
    assert not pace.due(10)
    clock.now_s += 2e6  # nobody has said what became of it
    assert any(pace.due(step) for step in range(11, 10_000))


def test_a_claim_that_nobody_let_go_is_a_failure_that_the_run_has_seen(memory_url: str) -> None:
    store = open_store(memory_url)
    first, _ = owner.claim(store, Owner(lineage="a", generation=1, epoch=0, token="1" * 32))
    heartbeat.write(store, first.token, 3)
    second, _ = owner.claim(store, Owner(lineage="a", generation=2, epoch=0, token="2" * 32))  # the first was killed
    third, _ = owner.claim(store, Owner(lineage="a", generation=3, epoch=0, token="3" * 32))  # the second let go
    assert [claim.failures for claim in (first, second, third)] == [0, 1, 1]
    assert first.since_unix_s == third.since_unix_s > 0
    assert owner.Claim(store, third).failures.age_s < 600


def test_a_save_that_meets_a_backlog_is_skipped_where_that_is_asked_for(events: Events) -> None:
    store = Gate()
    with Checkpointer(opened(store), every=1, backlog="skip", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert store.is_met.wait(60)
        ckpt.save(2, state(2))  # returns, though nothing is stored
        store.is_open.set()
        assert ckpt.wait()
        ckpt.save(3, state(3))
    assert saved(events) == [1, 3]
    (skipped,) = told(events, "checkpoint_skipped")
    assert skipped["step"] == 2
    assert "rank 0: step 1 has been on its way to the store for" in skipped["reason"]


def test_what_has_not_begun_gives_way_and_what_has_goes_on(events: Events) -> None:
    store = Gate()
    with Checkpointer(opened(store), every=1, keep=9, backlog="replace", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert store.is_met.wait(60)
        for step in (2, 3, 4):  # each waits, and the next one takes its place
            ckpt.save(step, state(step))
        store.is_open.set()
        assert ckpt.wait()
        found = state(0)
        assert ckpt.restore(found) == 4
        assert found["n"] == 4
    assert saved(events) == [1, 2, 3, 4]
    assert [(row["step"], row["by"]) for row in told(events, "checkpoint_replaced")] == [(2, 3), (3, 4)]
    assert [row["step"] for row in told(events, "checkpoint_committed")] == [1, 4]
    assert not told(events, "checkpoint_skipped")


def test_what_waits_goes_on_with_the_next_call_though_that_saves_nothing(events: Events) -> None:
    store = Gate()
    with Checkpointer(opened(store), every=2, keep=9, backlog="replace", on_event=events[1]) as ckpt:
        for step in (1, 2, 3, 4):
            ckpt.save(step, state(step))
        store.is_open.set()
        assert ckpt._savers()[0]._committer.await_end(60)  # of step 2, a little later than its commit is told
        ckpt.save(5, state(5))
        until("step 4 is committed", lambda: told(events, "checkpoint_committed")[1:])
    assert [row["step"] for row in told(events, "checkpoint_committed")] == [2, 4]


def test_what_must_be_saved_waits_for_all_before_it(events: Events) -> None:
    store = Gate()
    with Checkpointer(opened(store), every=1, keep=9, backlog="replace", on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        ckpt.save(2, state(2))
        store.is_open.set()
        ckpt.save(3, state(3), wait=True)
    assert [row["step"] for row in told(events, "checkpoint_committed")] == [1, 2, 3]


def uneven_ranks(folder: str) -> tuple[list[int], list[str]]:
    """Rank 1 has begun what waits on rank 0: then it cannot give way."""
    import torch.distributed as dist

    from storage.saving.committer import Committer

    heard: list[str] = []
    has_ended = dist.get_rank() == 1
    steps: list[int] = []

    def hear(event: CheckpointEvent, fields: dict[str, Any]) -> None:
        heard.extend([f"{event} {fields['step']}"] if event == CheckpointEvent.SKIPPED else [])
        steps.extend([fields["step"]] if event == CheckpointEvent.COMMITTED else [])

    original = Committer.await_end
    with Checkpointer(folder, backlog="replace", keep=9, on_event=hear) as ckpt, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Committer, "await_end", lambda self, timeout_s: has_ended)
        for step in (1, 2, 3):
            ckpt.save(step, {"w": torch.ones(4)})
        patch.setattr(Committer, "await_end", original)
        assert ckpt.wait()
    return steps, heard


def test_what_has_begun_on_one_rank_goes_on_on_all(ranks: Ranks, tmp_path: Path) -> None:
    (steps, heard), _ = ranks.run(uneven_ranks, str(tmp_path), world_size=2, timeout_s=180)
    assert steps == [1]
    assert heard == ["checkpoint_skipped 2", "checkpoint_skipped 3"]


def test_saves_for_memory_are_left_out_where_nothing_holds_them_and_told_once(memory_url: str, events: Events) -> None:
    with Checkpointer(memory_url, every=6, ram_every=2, on_event=events[1]) as ckpt:
        for step in range(1, 13):
            ckpt.save(step, state(step))
    assert saved(events) == [6, 12]
    (skipped,) = told(events, "checkpoint_skipped")
    assert skipped["step"] == 2
    assert "no checkpoint service holds states in memory" in skipped["reason"]


def test_saves_for_memory_wait_for_no_store(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.saving.committer import InProcess, Running

    submit = InProcess.submit

    def held(self: InProcess, running: Running, *tried: Any) -> None:
        if running.job.tier is Tier.STORE:
            return submit(self, running, *tried)
        running.free()
        return running.committed.set_result(True)

    monkeypatch.setattr(InProcess, "holds", True)
    monkeypatch.setattr(InProcess, "submit", held)
    store = Gate()
    with Checkpointer(opened(store), every=4, ram_every=1, backlog="skip", on_event=events[1]) as ckpt:
        for step in range(4, 9):
            ckpt.save(step, state(step))
        assert saved(events) == [4, 5, 6, 7]
        assert [row["step"] for row in told(events, "checkpoint_skipped")] == [8]  # the next one for the store
        store.is_open.set()
        assert ckpt.wait()


def test_a_backlog_is_waited_for_but_not_for_ever(events: Events) -> None:
    store = Gate()
    with Checkpointer(opened(store), timeout_s=0.2, on_event=events[1]) as ckpt:
        ckpt.save(1, state(1))
        assert store.is_met.wait(60)
        until("a spare slot", lambda: ckpt._savers()[0]._arena.num_made == 2)
        ckpt.save(2, state(2))  # is in line
        ckpt.save(3, state(3))  # after 0.2 s
        assert [fields["step"] for fields in told(events, "checkpoint_skipped")] == [3]
        store.is_open.set()
        ckpt.wait()
        ckpt.save(4, state(4), wait=True)
    assert saved(events) == [1, 2, 4]


def ranks_by_time(folder: str) -> list[int]:
    """The steps that this rank has saved, by a clock that only the coordinator's counts of."""
    steps: list[int] = []

    def hear(event: CheckpointEvent, fields: dict[str, Any]) -> None:
        if event == CheckpointEvent.STAGED:
            steps.append(fields["step"])

    with Checkpointer(folder, every=timedelta(milliseconds=50), backlog="skip", keep=999, on_event=hear) as ckpt:
        step = 0
        total = torch.zeros(1)
        while len(steps) < 3 and step < 100_000:
            step += 1
            torch.distributed.all_reduce(total)  # a rank that saved alone would meet another collective here
            ckpt.save(step, {"w": torch.ones(4)})
    return steps


def test_ranks_save_the_same_steps_by_the_coordinators_clock(ranks: Ranks, tmp_path: Path) -> None:
    one, two = ranks.run(ranks_by_time, str(tmp_path), world_size=2, timeout_s=180)
    assert one == two
    assert len(one) == 3


def busy_ranks(folder: str) -> list[str]:
    import torch.distributed as dist

    from storage.saving.committer import Committer

    heard: list[str] = []
    mine = dist.get_rank() == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Committer, "await_free", lambda *_: "the disk is slow" if mine else "")
        with Checkpointer(folder, backlog="skip", on_event=lambda e, f: heard.append(f"{e} {json.dumps(f)}")) as ckpt:
            ckpt.save(1, {"w": torch.ones(4)})
    return heard


def test_one_busy_rank_lets_all_skip(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(busy_ranks, str(tmp_path), world_size=2, timeout_s=180)
    assert first == ['checkpoint_skipped {"step": 1, "reason": "rank 1: the disk is slow"}']
    assert second == []
