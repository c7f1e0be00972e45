"""The account of a job's time: every second has one cause, and the causes are right."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cli.timeline import timeline
from launcher.events import EventRecord
from launcher.reports.causes import Spans
from launcher.reports.goodput import Cause, Goodput, account

A, B = "a-1", "b-2"


class Job:
    """Writes the events of a job of two nodes."""

    def __init__(self) -> None:
        self.events: list[EventRecord] = []
        self.generation = 0

    def say(self, ts: float, event: str, node: str = A, **fields: Any) -> None:
        line = {"ts": ts, "run_id": "r", "node": node, "generation": self.generation, "event": event}
        self.events.append({**line, **fields})

    def form(self, ts: float, *nodes: str, reason: str = "first round") -> None:
        self.generation += 1
        self.say(ts, "round_formed", reason=reason, participants=[{"node_id": n, "slots": 1} for n in nodes])

    def train(self, ts: float, step: int, step_s: float = 0.0) -> None:
        """The first step of a round, of `step_s` seconds, is done at `ts`."""
        self.say(ts, "first_step", step=step, step_s=step_s, rank=0)

    def save(self, ts: float, step: int, seconds: float = 0.0) -> None:
        for node in (A, B):
            self.say(ts, "checkpoint_staged", node, step=step, seconds=seconds)


def training() -> Job:
    """Two nodes that train from second 10 on, a step a second."""
    job = Job()
    job.say(0, "node_joined")
    job.say(1, "node_joined", B)
    job.form(3, A, B)
    job.train(11, step=1, step_s=1)
    return job


@pytest.fixture
def job() -> Job:
    """They saved the state after step 20 at second 30."""
    job = training()
    job.save(30, step=20)
    return job


def spent(result: Goodput) -> dict[Cause, float]:
    return {cause: pytest.approx(seconds) for cause, seconds in result.seconds.items() if seconds}


def test_a_job_without_an_interruption(job: Job) -> None:
    job.say(40, "finished", outcome="succeeded")
    job.say(42, "node_left", B, node_left=A)
    result = account(job.events)
    assert spent(result) == {Cause.WAITING: 3, Cause.START: 7, Cause.TRAINING: 20, Cause.CHECKPOINT: 10, Cause.IDLE: 2}
    assert (result.wall_s, result.outcome, result.interruptions) == (42, "succeeded", ())


def test_a_node_that_leaves_with_its_work_done_has_drained_nothing(job: Job) -> None:
    job.say(40, "workers_done", A, step=30, step_ts=39.5)
    job.say(40, "workers_done", B, step=30, step_ts=39.5)
    job.say(41, "node_left", A, node_left=B)
    job.say(42, "finished", outcome="succeeded")
    assert account(job.events).interruptions == ()


def test_the_silence_of_the_store_to_a_node_that_joins_explains_nothing(job: Job) -> None:
    c = "c-00000003"
    job.say(32, "store_unreachable", c, seconds=1, reason="deadline exceeded")
    job.say(33, "node_joined", c)
    for node in (A, B):
        job.say(34, "workers_yielded", node, reason="workers of another node were asked to stop", step=25)
    job.say(34, "stop_requested", reason=f"join: {c}")
    job.say(35, "store_back", c, seconds=4)
    for node in (A, B):
        job.say(35, "workers_stopped", node, reason=f"join: {c}", step=25)
    job.form(36, A, B, c, reason=f"join: {c}")
    job.train(38, step=26)
    (stop,) = account(job.events).interruptions
    assert (stop.cause, stop.nodes) == (Cause.JOIN, (c,))


def test_the_step_in_which_a_node_was_frozen_is_not_what_a_step_takes() -> None:
    job = training()
    job.say(33, "node_lost", node_lost=B, reason="lost: its lease ended", silent_s=2)
    job.say(33.1, "workers_stopped", reason="node b-2 lost: its lease ended", step=6, step_ts=16.0)
    job.say(36, "progress", B, step=6, step_s=5, every=1)
    job.form(34, A, reason="node b-2 lost: its lease ended")
    job.train(36, step=7, step_s=1)
    (stop,) = account(job.events).interruptions
    assert stop.began_ts == 17, "the step after the last that was done was under way"


def test_a_lost_node_explains_the_workers_that_failed_with_it_and_costs_what_was_not_saved(job: Job) -> None:
    job.say(35.0, "worker_failed", rank=0, exit_code=1, step=24, message="Connection reset by peer")
    job.say(35.2, "node_lost", node_lost=B, reason="lost: its lease ended")
    job.say(35.5, "workers_stopped", reason="worker failed", step=25)
    job.form(36, A, reason="node b-2 lost")
    job.train(40, step=21, step_s=2)
    job.say(50, "finished", outcome="succeeded")
    result = account(job.events)
    assert spent(result) == {
        Cause.WAITING: 3,
        Cause.START: 7,
        Cause.TRAINING: 32,
        Cause.LOST_WORK: 5,
        Cause.NODE_LOSS: 3,
    }
    (stop,) = result.interruptions
    assert (stop.cause, stop.root) == (Cause.NODE_LOSS, "node b-2 lost: its lease ended")
    assert stop.victims == ("rank 0 on a-1 failed with exit code 1: Connection reset by peer",)
    assert (stop.began_ts, stop.formed_ts, stop.resumed_ts, stop.steps_redone) == (35, 36, 38, 5)


def test_a_job_that_begins_anew_has_lost_all_of_its_work(job: Job) -> None:
    job.say(35, "worker_failed", B, rank=1, exit_code=-9, step=24, message="")
    job.form(36, A, B, reason="worker failed")
    job.train(40, step=1)
    job.say(45, "finished", outcome="failed: x")
    result = account(job.events)
    assert spent(result) == {Cause.WAITING: 3, Cause.START: 7, Cause.LOST_WORK: 25, Cause.FAILURE: 5, Cause.TRAINING: 5}
    assert result.interruptions[0].root == "rank 1 on b-2 was killed by SIGKILL"
    assert result.interruptions[0].steps_redone == 24


@pytest.mark.parametrize(("reason", "cause"), [("drain: b-2", Cause.DRAIN), ("join: c-3", Cause.JOIN)])
def test_a_stop_at_a_step_boundary_loses_no_step(job: Job, reason: str, cause: Cause) -> None:
    job.say(34, "stop_requested", reason=reason)
    job.save(35, step=25, seconds=0.5)
    for node in (A, B):
        job.say(36, "workers_yielded", node, step=25)
        job.say(36.1, "workers_stopped", node, reason=reason, step=25)
    if cause is Cause.DRAIN:
        job.say(36.2, "node_left", A, node_left=B)
    job.form(37, A, reason=reason)
    job.train(38, step=26)
    job.say(40, "finished", outcome="succeeded")
    result = account(job.events)
    assert spent(result) == {Cause.WAITING: 3, Cause.START: 7, Cause.TRAINING: 26.5, Cause.CHECKPOINT: 1.5, cause: 2}
    assert [(s.cause, s.steps_redone) for s in result.interruptions] == [(cause, 0)]


def test_stalls_of_several_ranks_count_once(job: Job) -> None:
    job.say(32.0, "checkpoint_staged", step=22, seconds=1.0)
    job.say(32.5, "checkpoint_staged", B, step=22, seconds=1.0)
    job.say(40, "node_left", B, node_left="c-3")
    assert account(job.events).seconds[Cause.CHECKPOINT] == pytest.approx(1.5)


def test_the_leader_knows_which_failure_was_the_first(job: Job) -> None:
    job.say(35, "worker_failed", B, rank=1, exit_code=1, step=24, message="Connection closed by peer")
    job.say(35.1, "worker_failed", A, rank=0, exit_code=1, step=24, message="ValueError: nan")
    told = {"rank": 0, "host": "h1", "node_failed": A, "failure_class": "program", "exit_code": 1}
    job.say(35.2, "root_cause", A, **told, message="ValueError: nan", place="train.py:7")
    job.form(36, A, B, reason="x")
    (stop,) = account(job.events).interruptions
    assert stop.cause is Cause.FAILURE
    assert stop.root == "rank 0 on a-1 failed with exit code 1: ValueError: nan at train.py:7 (program, host h1)"
    assert stop.victims == ("rank 1 on b-2 failed with exit code 1: Connection closed by peer",)


def test_a_hang_explains_the_workers_that_were_killed_for_it(job: Job) -> None:
    job.say(35, "hang_detected", B, rank=1, seconds=3)
    job.say(36, "worker_failed", rank=0, exit_code=-9, step=22, message="")
    result = account(job.events)
    assert result.seconds[Cause.HANG] == pytest.approx(3 + 1), "from the last progress on"
    (stop,) = result.interruptions
    assert (stop.cause, stop.root) == (Cause.HANG, "hang on b-2: rank=1 seconds=3")
    assert stop.resumed_ts is None


def test_a_round_that_breaks_before_it_trains_is_an_interruption_of_its_own(job: Job) -> None:
    job.say(35, "worker_failed", rank=0, exit_code=1, step=20, message="x")
    job.form(36, A, B)
    job.say(38, "node_lost", node_lost=B, reason="lost: its lease ended")
    job.form(39, A)
    job.train(42, step=21)
    result = account(job.events)
    assert [(s.cause, s.resumed_ts) for s in result.interruptions] == [(Cause.FAILURE, None), (Cause.NODE_LOSS, 42)]
    told = {Cause.WAITING: 3, Cause.START: 7, Cause.TRAINING: 21, Cause.FAILURE: 7, Cause.NODE_LOSS: 4}
    assert spent(result) == told, "step 20 was done at second 30, and steps take one"


def test_what_happens_to_spares_is_no_interruption(job: Job) -> None:
    job.say(35, "node_lost", node_lost="spare-3", reason="lost: its lease ended")
    job.say(40, "workers_stopped", "spare-3", reason="drains")
    assert account(job.events).interruptions == ()


def test_a_script_that_tells_no_step_trains_once_all_its_workers_have_started() -> None:
    job = Job()
    job.say(0, "node_joined")
    job.form(1, A, B)
    job.say(2, "workers_started", A)
    job.say(4, "workers_started", B)
    job.say(9, "finished", outcome="succeeded")
    assert spent(account(job.events)) == {Cause.WAITING: 1, Cause.START: 3, Cause.TRAINING: 5}


def test_the_time_between_two_runs_of_a_job_is_idle(job: Job) -> None:
    job.say(40, "finished", outcome="failed: budget")
    job.generation = 0
    job.say(60, "node_joined")
    job.form(61, A)
    job.train(65, step=21)
    job.say(70, "finished", outcome="succeeded")
    result = account(job.events)
    assert (result.seconds[Cause.IDLE], result.seconds[Cause.START], result.outcome) == (20, 7 + 4, "succeeded")
    assert result.seconds[Cause.WAITING] == 3 + 1


def test_nothing_is_no_account() -> None:
    with pytest.raises(ValueError, match="no events"):
        account([])


NAMES = [
    *("node_joined", "node_lost", "node_left", "node_fenced", "round_formed", "stop_requested", "workers_started"),
    *("first_step", "worker_failed", "workers_yielded", "workers_stopped", "hang_detected", "checkpoint_staged"),
    *("finished", "root_cause", "round_broken", "something_new", "peer_lost", "node_ended", "drain_started"),
    *("progress", "steps_restarted", "restored", "store_unreachable", "store_back", "checkpoint_waited"),
]


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_the_causes_add_up_to_the_wall_time_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    job = Job()
    for _ in range(rng.randrange(1, 60)):
        ts, name, node = rng.random() * 100, rng.choice(NAMES), rng.choice([A, B, "c-3"])
        if name == "round_formed":
            job.form(ts, *rng.sample([A, B, "c-3"], rng.randrange(1, 4)))
            continue
        told = {"node_lost": node, "node_left": node, "step": rng.randrange(-1, 40), "seconds": rng.random() * 5}
        told |= {"peer": node, "reached": rng.randrange(40), "silent_s": rng.choice([0, rng.random() * 9])}
        told |= {"step_ts": ts - rng.random()} if rng.random() < 0.5 else {}
        job.say(
            ts, name, rng.choice([A, B]), **told, step_s=rng.random(), reason=rng.choice(["drain: x", "join: y", ""])
        )
    result = account(job.events)
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s), f"seed {seed}"
    assert min(result.seconds.values()) > -1e-9, f"seed {seed}"
    for stop in result.interruptions:
        times = [t for t in (stop.began_ts, stop.formed_ts, stop.resumed_ts, stop.ended_ts) if t is not None]
        assert times == sorted(times), f"seed {seed}"


def test_what_spans_cover() -> None:
    assert Spans([]).within(0, 10) == 0
    assert Spans([(8, 20), (1, 3), (-5, 2)]).within(0, 10) == 5
    assert Spans([(11, 12), (4, 4), (9, 3)]).within(0, 10) == 0
    assert Spans([(0, 3), (5, 6), (5, 9)]).within(2, 7) == 3
    assert Spans([(0, 3)]).within(7, 2) == 0


def hard(num_rounds: int) -> list[EventRecord]:
    """A job that loses a node, its store and steps in every round, and tells little of how far it came."""
    job = Job()
    job.say(0, "node_joined")
    for number in range(num_rounds):
        ts, other = number * 100.0, f"b-{number:08x}"
        job.say(ts + 1, "node_joined", other)
        job.form(ts + 3, A, other)
        job.train(ts + 11, step=1 + number, step_s=1)
        for node in (A, other):
            job.say(ts + 30, "checkpoint_staged", node, step=2 + number % 5, seconds=0.1)
            job.say(ts + 40, "store_unreachable", node, reason="silent", seconds=1)
            job.say(ts + 45, "store_back", node, seconds=6)
        job.say(ts + 50, "steps_restarted", A, step=4 + number, reached=6 + number)
        job.say(ts + 60, "worker_failed", A, rank=0, exit_code=1, step=5 + number)
        job.say(ts + 61, "node_lost", node_lost=other, reason="lost: its lease ended")
        job.say(ts + 62, "workers_stopped", A, reason="worker failed", step=5 + number)
    return job.events


def calls_in(tell: Callable[[], object]) -> int:
    """How many functions are called, those of C included: what a report costs, on any machine."""
    num = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num
        num += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        tell()
    finally:
        sys.setprofile(before)
    return num


def test_a_report_of_twice_as_many_rounds_costs_twice_as_much() -> None:
    def told(num_rounds: int) -> int:
        events = hard(num_rounds)
        return calls_in(lambda: (account(events), timeline(events, 0.0)))

    few, many = told(150), told(300)
    assert many < 2.2 * few
