"""What `report` is made of: files as kills and full disks leave them, jobs that share a folder, clocks, the account."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from launcher.events import EventName, EventRecord
from launcher.reports.clocks import doubtful, offsets, set_right, steady
from launcher.reports.files import find_files, read_events
from launcher.reports.goodput import Cause, account
from launcher.reports.jobs import jobs_of
from launcher.reports.sentences import describe_root_cause, sentence
from launcher.script.step_events import StepTeller, claim
from tests.launcher.test_goodput import A, B, Job, training


@pytest.fixture
def job() -> Job:
    return training()


def stop(job: Job, ts: float, reason: str, *nodes: str, step: int, done_ts: float, yielded: bool = False) -> None:
    for node in nodes:
        if yielded:
            job.say(ts, "workers_yielded", node, reason=reason, step=step, step_ts=done_ts)
        job.say(ts, "workers_stopped", node, reason=reason, step=step, step_ts=done_ts)


class TestFiles:
    LINE = '{"ts":%d,"run_id":"r","node":"a-1","generation":1,"event":"x"}'

    def test_a_line_that_was_cut_costs_none_after_it(self, tmp_path: Path) -> None:
        (tmp_path / "events.jsonl").write_text(
            f"{self.LINE % 1}\n{(self.LINE % 2)[:30]}{self.LINE % 3}\n{self.LINE % 4}"
        )
        events, num_unreadable = read_events(find_files([tmp_path]))
        assert ([e["ts"] for e in events], num_unreadable) == ([1, 3, 4], 1)

    def test_rotated_and_copied_files_count_once(self, tmp_path: Path) -> None:
        (tmp_path / "events.jsonl").write_text(f"{self.LINE % 3}\n")
        (tmp_path / "events.jsonl.1").write_text(f"{self.LINE % 2}\n")
        (tmp_path / "events.jsonl.2.gz").write_bytes(gzip.compress(f"{self.LINE % 1}\n".encode()))
        (tmp_path / "backup").mkdir()
        (tmp_path / "backup" / "events.jsonl").write_text(f"{self.LINE % 2}\n{self.LINE % 3}\n")
        events, num_unreadable = read_events(find_files([tmp_path, tmp_path / "backup"]))
        assert (sorted(e["ts"] for e in events), num_unreadable) == ([1, 2, 3], 0)

    @pytest.mark.parametrize("ts", ["NaN", "Infinity", "true", '"1"', "null", "[]"])
    def test_times_that_are_none_are_no_events(self, ts: str, tmp_path: Path) -> None:
        (tmp_path / "events.jsonl").write_text(f'{{"ts":{ts},"event":"x"}}\n\n[[[\n{"[" * 100_000}\n')
        assert read_events([tmp_path / "events.jsonl"]) == ([], 3)

    def test_half_a_compressed_file_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "events.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
        with pytest.raises(OSError, match="not whole as gzip"):
            read_events(find_files([tmp_path]))


class TestJobs:
    def test_two_jobs_at_once_under_one_id_are_two(self, job: Job) -> None:
        other = Job()
        other.say(5, "node_joined", "c-3")
        other.form(6, "c-3", "d-4")
        for event in other.events:
            event["node"] = "c-3"  # type: ignore[index]
        other.say(8, "workers_started", "d-4")
        other.say(30, "workers_stopped", "d-4", reason="x", step=3)
        job.say(25, "finished", outcome="succeeded")
        (first, mine), (second, theirs) = jobs_of([*other.events, *job.events])
        assert (first, second) == ("r", "r (2)")
        assert {e["node"] for e in mine} == {A, B}
        assert {e["node"] for e in theirs} == {"c-3", "d-4"}

    def test_a_job_that_is_launched_again_is_one(self, job: Job) -> None:
        job.say(25, "finished", outcome="failed: x")
        again = Job()  # its store is new, and counts from 1
        again.say(40, "node_joined", "c-3")
        again.form(41, "c-3")
        again.events[-1]["node"] = "c-3"  # type: ignore[index]
        assert [name for name, _ in jobs_of([*job.events, *again.events])] == ["r"]

    def test_nodes_that_a_job_has_lost_and_taken_in_are_of_it(self, job: Job) -> None:
        job.form(20, A, reason="node b-2 lost")
        job.say(21, "workers_stopped", B, reason="this node's lease ended", step=9)
        job.say(22, "node_joined", "waits-9")
        assert [name for name, _ in jobs_of(job.events)] == ["r"]


class TestClocks:
    def skewed(self, job: Job, seconds: float) -> list[EventRecord]:
        """A whole story; b's clock is ahead by that."""
        for node_, ts in ((A, 3.1), (B, 3.2)):
            job.say(ts, "workers_started", node_)
        stop(job, 30, "x", A, B, step=20, done_ts=29.9)
        job.form(30.2, A, B, reason="x")
        for node_, ts in ((A, 30.3), (B, 30.4)):
            job.say(ts, "workers_started", node_)
        job.train(32, step=21, step_s=1)
        job.say(50, "finished", outcome="succeeded")
        return [
            {**e, **{key: e[key] + seconds for key in ("ts", "step_ts") if key in e}} if e["node"] == B else e
            for e in job.events
        ]

    @pytest.mark.parametrize("seconds", [61.0, -61.0, 3600.0])
    def test_a_clock_that_is_off_is_set_right(self, job: Job, seconds: float) -> None:
        events = self.skewed(job, seconds)
        right = account(job.events)
        found = offsets(events)
        assert found == {B: pytest.approx(-seconds, abs=0.5)}
        mended = account(set_right(events, found))
        assert mended.wall_s == pytest.approx(right.wall_s, abs=0.5)
        for cause, spent_s in right.seconds.items():
            assert mended.seconds[cause] == pytest.approx(spent_s, abs=0.5), cause

    def test_clocks_that_agree_are_left_alone(self, job: Job) -> None:
        assert offsets(self.skewed(job, 0.05)) == {}

    @pytest.mark.parametrize(
        "settings", [[(25.0, -3600.0)], [(25.0, 7200.0)], [(12.0, 86400.0)], [(15.0, 60.0), (40.0, -60.0)]]
    )
    def test_a_clock_that_is_set_while_its_node_runs_changes_nothing(
        self, job: Job, settings: list[tuple[float, float]]
    ) -> None:
        story = self.skewed(job, 0.0)
        right, events = account(story), [self.as_told(event, settings) for event in story]
        steadied, jumps = steady(events)
        assert [jump.seconds for jump in jumps] == [pytest.approx(seconds) for _, seconds in settings]
        assert {jump.node for jump in jumps} == {A}
        mended = account(set_right(steadied, offsets(steadied)))
        assert mended.wall_s == pytest.approx(right.wall_s, abs=0.5)
        assert mended.seconds == pytest.approx(right.seconds, abs=0.5)

    def as_told(self, event: EventRecord, settings: list[tuple[float, float]]) -> EventRecord:
        """The event as a node tells it whose clock is set so; b's is not, and began elsewhere."""
        by_boot = {**event, "boot_s": event["ts"] + (1000.0 if event["node"] == A else 5.0)}
        off = sum(seconds for since, seconds in settings if event["ts"] >= since and event["node"] == A)
        return {**by_boot, **{key: event[key] + off for key in ("ts", "step_ts") if key in event}}

    @pytest.mark.parametrize("boot_s", [None, "1", True, float("inf"), []])
    def test_an_event_without_the_other_clock_is_left_as_it_is(self, job: Job, boot_s: object) -> None:
        events = [{**event, "boot_s": boot_s} for event in job.events]
        assert steady(events) == (events, ())

    def test_clocks_that_no_time_sets_right_are_told(self, job: Job) -> None:
        """As events of before tell it, that have one clock only."""
        events = self.skewed(job, 0.0)
        assert doubtful(events) == []
        moved = [{**e, "ts": e["ts"] - 600} if e["node"] == B and e["ts"] > 30.35 else e for e in events]
        late = [{**e, "ts": e["ts"] + 600} if e["node"] == B and 3 < e["ts"] < 30.1 else e for e in moved]
        assert doubtful(late) == [(A, B)]


class TestAccount:
    def test_a_store_outage_is_no_drain_that_nobody_asked_for(self, job: Job) -> None:
        """b's workers were asked, a's agent only sees that they have stopped."""
        stop(job, 20.1, "the store is silent", B, step=10, done_ts=20, yielded=True)
        stop(job, 20.1, "workers of another node were asked to stop", A, step=10, done_ts=20, yielded=True)
        for node in (A, B):
            job.say(22, "store_unreachable", node, reason="etcd: deadline exceeded", seconds=5)
        job.say(40, "node_fenced", B, reason="taken for lost")
        job.say(41, "node_lost", node_lost=B, reason="lost: its lease ended", silent_s=5)
        for node in (A, B):
            job.say(42, "store_back", node, seconds=25)
        job.form(43, A, B, reason="the store is silent")
        job.train(46, step=11, step_s=1)
        told = account(job.events)
        (one,) = told.interruptions
        assert (one.cause, one.nodes, one.seconds) == (Cause.STORE, (), 25)
        assert told.seconds[Cause.STORE] == 25
        (outage,) = told.outages
        assert (outage.nodes, outage.began_ts, outage.ended_ts) == ((A, B), 17, 42)

    def test_workers_that_stop_for_a_drain_elsewhere_are_drained(self, job: Job) -> None:
        job.say(20, "drain_started", B, source="signal", detail="SIGTERM")
        stop(job, 20.1, "workers of another node were asked to stop", A, step=10, done_ts=20, yielded=True)
        (one,) = account(job.events).interruptions
        assert (one.cause, one.nodes, one.root) == (Cause.DRAIN, (B,), "node b-2 drains: SIGTERM")

    @pytest.mark.parametrize("reason", ["workers of another node were asked to stop", "drain of another node"])
    def test_what_nobody_gave_a_reason_for_is_no_drain_and_no_failure(self, job: Job, reason: str) -> None:
        stop(job, 20.1, reason, A, step=10, done_ts=20, yielded=True)
        (one,) = account(job.events).interruptions
        assert (one.cause, one.nodes) == (Cause.OTHER, ())

    def test_a_node_without_the_store_is_lost_and_the_store_is_not_to_blame(self, job: Job) -> None:
        stop(job, 20.1, "the store is silent", B, step=10, done_ts=20, yielded=True)
        job.say(21, "store_unreachable", B, reason="etcd: deadline exceeded", seconds=2)
        job.say(22, "node_lost", node_lost=B, reason="lost: its lease ended", silent_s=2)
        job.form(23, A, reason="node b-2 lost: its lease ended")
        job.train(25, step=11, step_s=1)
        (one,) = account(job.events).interruptions
        assert (one.cause, one.nodes, one.seconds) == (Cause.NODE_LOSS, (B,), 4)

    def test_a_frozen_node_is_lost_from_the_last_step_on_and_not_when_it_is_noticed(self, job: Job) -> None:
        job.say(25, "node_lost", node_lost=B, reason="lost: its lease ended", silent_s=4.5)
        stop(job, 25.1, "node b-2 lost: its lease ended", A, step=10, done_ts=20)
        job.form(26, A)
        job.train(28, step=11, step_s=1)
        (one,) = account(job.events).interruptions
        assert (one.began_ts, one.seconds) == (20.5, 6.5), "half of a step was done when it froze"

    def test_a_round_waits_for_a_silent_node_from_its_beginning_on(self) -> None:
        job = Job()
        job.form(10, A, B)
        job.say(12.4, "node_lost", node_lost=B, reason="lost: its lease ended", silent_s=2)
        job.form(12.5, A, reason="node b-2 lost: its lease ended")
        job.train(14, step=1, step_s=1)
        told = account(job.events)
        assert [(one.cause, one.nodes, one.seconds) for one in told.interruptions] == [(Cause.NODE_LOSS, (B,), 3)]
        assert told.seconds[Cause.START] == 0

    def test_what_a_script_does_after_sigterm_is_training_where_it_tells_no_steps(self) -> None:
        job = Job()
        job.form(1, A, B)
        for node in (A, B):
            job.say(2, "workers_started", node)
        job.say(10, "round_broken", reason="drain: b-2")
        for node, ts in ((A, 15.2), (B, 15)):
            job.say(ts, "workers_stopped", node, reason="drain: b-2", seconds=5, step=-1)
        job.form(16, A, reason="drain: b-2")
        job.say(17, "workers_started")
        (one,) = account(job.events).interruptions
        assert (one.cause, one.began_ts, one.resumed_ts) == (Cause.DRAIN, 15, 17)

    def test_a_join_whose_joiner_dies_before_the_first_step_gives_way(self, job: Job) -> None:
        stop(job, 20, "join: c-3", A, B, step=10, done_ts=20, yielded=True)
        job.form(21, A, B, "c-3", reason="join: c-3")
        job.say(22, "node_lost", node_lost="c-3", reason="lost: its agent is gone")
        job.form(23, A, B, reason="node c-3 lost")
        job.train(25, step=11, step_s=1)
        told = account(job.events)
        join, loss = told.interruptions
        assert (join.cause, join.ended_ts, join.resumed_ts) == (Cause.JOIN, 22, None)
        assert join.followed_by == "node c-3 lost: its agent is gone"
        assert (loss.cause, loss.nodes, loss.seconds) == (Cause.NODE_LOSS, ("c-3",), 2)

    def test_a_job_that_was_killed_whole_did_not_train_until_it_came_back(self, job: Job) -> None:
        """Nobody lived to tell: the last that was heard is how far it was."""
        job.say(40, "progress", step=30, step_s=1)
        again = Job()
        again.events, again.generation = job.events, 0
        job.say(1000, "node_joined", "a-00000002")
        again.form(1001, "a-00000002")
        job.events[-1]["node"] = "a-00000002"  # type: ignore[index]
        again.say(1005, "restored", "a-00000002", step=20, seconds=1)
        again.say(1010, "first_step", "a-00000002", step=21, step_s=1)
        events = [
            {**e, "node": e["node"].replace("a-1", "a-00000001").replace("b-2", "a-00000009")} for e in job.events
        ]
        for event in events:
            for one in event.get("participants", ()):
                one["node_id"] = one["node_id"].replace("a-1", "a-00000001").replace("b-2", "a-00000009")
        told = account(events)
        assert told.seconds[Cause.IDLE] == 960
        (one,) = told.interruptions
        assert (one.cause, one.began_ts, one.resumed_ts, one.steps_redone) == (Cause.NODE_LOSS, 40, 1009, 10)
        assert told.seconds[Cause.NODE_LOSS] == 9
        assert (told.seconds[Cause.LOST_WORK], told.seconds[Cause.TRAINING]) == (10, 20 + 1)

    def test_a_job_that_drained_whole_is_not_running_until_it_is_launched_again(self, job: Job) -> None:
        job.say(20, "drain_started", A, source="command", detail="elastic-moe drain")
        job.say(20, "drain_started", B, source="command", detail="elastic-moe drain")
        stop(job, 21, "drain: a-1, b-2", A, B, step=10, done_ts=20, yielded=True)
        for node in (A, B):
            job.say(22, "node_ended", node, reason="drained", exit_code=75)
        assert account(job.events).end == "a-1: drained; b-2: drained"
        assert account(job.events).outcome == ""
        job.say(100, "node_joined")
        job.form(101, A)
        job.train(103, step=11, step_s=1)
        told = account(job.events)
        assert (told.seconds[Cause.IDLE], told.end) == (78, "")
        assert [(one.cause, one.seconds) for one in told.interruptions] == [(Cause.DRAIN, 2)]

    def test_a_node_that_ends_with_the_job_interrupts_nothing(self, job: Job) -> None:
        """It may end a moment before the leader writes what became of the job."""
        job.say(20, "workers_done", B, step=10)
        job.say(20.1, "node_ended", B, reason="the job is over")
        job.say(20.2, "finished", A, outcome="succeeded")
        told = account(job.events)
        assert (told.interruptions, told.outcome) == ((), "succeeded")

    def test_steps_done_again_in_one_process_are_lost(self, job: Job) -> None:
        job.say(20, "progress", step=10, step_s=1)
        job.say(21, "steps_restarted", step=6, reached=10)
        job.say(40, "finished", outcome="succeeded")
        told = account(job.events)
        assert told.steps_redone == 5
        assert told.seconds[Cause.LOST_WORK] == 20 - 15

    def test_a_script_that_beats_every_ten_steps_only(self) -> None:
        job = Job()
        job.form(0, A)
        job.say(20, "first_step", step=10)
        job.say(30, "progress", step=20, step_s=1, every=10)
        stop(job, 45, "worker failed", A, step=30, done_ts=40)
        job.form(46, A, reason="worker failed")
        job.say(60, "first_step", step=30)  # its own file had the state after 20
        job.say(70, "finished", outcome="succeeded")
        told = account(job.events)
        (one,) = told.interruptions
        assert (told.seconds[Cause.START], one.began_ts, one.resumed_ts, told.steps_redone) == (10, 45, 50, 10)
        assert told.seconds[Cause.LOST_WORK] == 15, "what came after the last heartbeat, too"

    @pytest.mark.parametrize("event", ["checkpoint_waited", "checkpoint_copy_waited"])
    def test_a_commit_or_a_copy_that_is_waited_for_is_a_stall(self, job: Job, event: str) -> None:
        job.save(20, step=10, seconds=0.5)
        job.say(23, event, seconds=3)
        job.say(40, "progress", step=30, step_s=1)
        assert account(job.events).seconds[Cause.CHECKPOINT] == 3.5

    def test_a_checkpoint_store_that_was_away_is_told_with_its_seconds(self, job: Job) -> None:
        for rank, ts in ((0, 30), (1, 33)):
            away: dict[str, Any] = {"rank": rank, "url": "s3://b/r", "seconds": 4, "cause": "reset"}
            job.say(ts, "checkpoint_store_away", **away, reason="no answer")
        job.say(69, "checkpoint_store_back", rank=0, url="s3://b/r", seconds=43)
        job.say(70, "checkpoint_store_back", rank=1, url="s3://b/r", seconds=41)
        told = account(job.events)
        (outage,) = told.outages
        assert (outage.store, outage.where, outage.began_ts, outage.ended_ts) == (
            "checkpoint store",
            "s3://b/r",
            26,
            70,
        )
        assert told.interruptions == ()


class TestSteps:
    def test_the_first_step_now_and_then_how_far_it_is_and_returns(self) -> None:
        teller = StepTeller()
        told = [teller.beat(step, step * 0.1, 0.1) for step in range(1, 101)]
        said = [(name, fields["step"]) for name, fields in filter(None, told)]
        assert said[0] == ("first_step", 1)
        assert {name for name, _ in said[1:]} == {"progress"}
        assert 20 < len(said) < 50
        assert teller.beat(41, 10.1) == ("steps_restarted", {"step": 41, "reached": 100})
        assert teller.beat(41, 99.0) is None, "the same number says only that it is alive"

    def test_a_day_of_short_steps_costs_at_most_a_line_a_minute(self) -> None:
        teller = StepTeller()
        num_told = sum(teller.beat(step, float(step)) is not None for step in range(86_400))
        assert num_told < 24 * 60 + 100

    def test_one_worker_of_a_node_tells(self, tmp_path: Path) -> None:
        assert claim(tmp_path / "worker-3-1", 3)
        assert not claim(tmp_path / "worker-3-0", 3)
        assert claim(tmp_path / "worker-4-0", 4)


def test_ends_are_told_in_words() -> None:
    failed = {"rank": 3, "node": A, "node_failed": A, "host": "h", "failure_class": "signal", "message": ""}
    killed = {**failed, "exit_code": -9, "place": "SIGKILL"}
    assert describe_root_cause(killed) == "rank 3 on a-1 was killed by SIGKILL (signal, host h)"
    unnamed = {**failed, "event": EventName.WORKER_FAILED, "exit_code": -40}
    assert sentence(unnamed) == "rank 3 on a-1 was killed by signal 40"
    ended = {**failed, "failure_class": "program", "exit_code": 3, "place": "exit code 3"}
    assert describe_root_cause(ended) == "rank 3 on a-1 failed with exit code 3 (program, host h)"
    raised = {**ended, "exit_code": 1, "message": "ValueError: nan", "place": "ValueError at train.py:7 in f"}
    told = "rank 3 on a-1 failed with exit code 1: ValueError: nan at train.py:7 in f (program, host h)"
    assert describe_root_cause(raised) == told


def test_the_events_file_is_named_so_that_workers_find_it_wherever_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script may change its folder."""
    from elastic_moe.cli import run

    seen: list[Any] = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    monkeypatch.setattr("launcher.launch_agent", lambda config, command, extras: seen.append(extras) or 0)  # type: ignore[func-returns-value]
    assert run.handle(run_arguments("--log-dir", "logs", "train.py")) == 0
    assert seen[0].events_path == tmp_path / "logs" / "events.jsonl"


def run_arguments(*words: str) -> Any:
    from elastic_moe.cli.main import build_parser

    return build_parser().parse_args(["run", *words])
