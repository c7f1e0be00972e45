"""When workers count as hung, and which rank is behind it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from launcher.health.hangs import Auto, Evidence, Hang, HangRules, HangWatch, startup_limit_s, step_limit_s, suspects
from launcher.workers.channel import Progress, WorkerPhase

LOOK_S = 0.5


LEARNT = HangRules()


class Job:
    """Workers in lock-step under a watch, in virtual time."""

    def __init__(self, rules: HangRules = LEARNT, num_ranks: int = 2) -> None:
        self.watch = HangWatch(rules)
        self.now_s = 1000.0
        self.ranks = {rank: Progress(WorkerPhase.ATTACHED, -1, 0.0) for rank in range(num_ranks)}
        self.exited: set[int] = set()
        self.paused = False
        self.output: object = None

    def pass_time(self, seconds: float) -> Hang | None:
        """Look every half second; the first hang, at once."""
        ends_s = self.now_s + seconds
        while self.now_s < ends_s:
            self.now_s += LOOK_S
            if hang := self.look():
                return hang
        return None

    def look(self) -> Hang | None:
        looked = self.watch.look
        return looked(self.ranks, self.now_s, exited=self.exited, output=self.output, paused=self.paused)

    def beat(self, *ranks: int) -> None:
        for rank in ranks or self.ranks:
            self.ranks[rank] = Progress(WorkerPhase.RUNNING, self.ranks[rank].step + 1, self.now_s)

    def steps(self, num: int, step_s: float) -> None:
        for _ in range(num):
            assert self.pass_time(step_s) is None
            self.beat()

    def restart(self) -> None:
        self.watch.begin()
        self.ranks = {rank: Progress(WorkerPhase.STARTING, -1, 0.0) for rank in self.ranks}


@pytest.fixture
def seeds() -> Iterator[random.Random]:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return iter([random.Random(seed)])


def test_limits_are_learnt_and_have_floors() -> None:
    assert step_limit_s([]) == step_limit_s([0.1] * 100) == 300
    assert step_limit_s([60.0] * 100) == 600, "ten steps"
    assert step_limit_s([1.0] * 99 + [400.0]) == 1200, "three times the longest"
    assert step_limit_s([1.0] * 99 + [10 * 3600.0]) == 3600, "a stall that was survived does not disarm the watch"
    assert step_limit_s([1200.0] * 9) == 12000, "unless steps are so long"
    assert startup_limit_s([]) == 3600
    assert startup_limit_s([20.0]) == 1800
    assert startup_limit_s([20.0, 900.0]) == 4500


def test_workers_that_stop_beating_are_hung_once_the_learnt_limit_is_over() -> None:
    job = Job()
    job.steps(20, 60.0)
    hang = job.pass_time(700)
    assert hang is not None
    assert (hang.kind, hang.ranks, hang.step, hang.limit_s) == ("step", (0, 1), 19, 600)
    assert 600 < hang.seconds < 602


def test_one_worker_that_stops_beating_while_the_other_goes_on_is_hung() -> None:
    job = Job(HangRules(step=10.0))
    job.steps(3, 1.0)
    for _ in range(20):
        job.beat(0)
        if hang := job.pass_time(1.0):
            break
    assert hang is not None
    assert (hang.ranks, hang.step) == ((1,), 2)


def test_an_evaluation_every_so_often_is_no_hang() -> None:
    job = Job()
    for _ in range(5):
        job.steps(100, 1.0)
        job.steps(1, 280.0)
    assert job.pass_time(700) is None
    assert job.pass_time(200) is not None


def test_first_steps_may_take_as_long_as_a_start() -> None:
    job = Job()
    job.steps(2, 10.0)
    assert job.pass_time(1200) is None, "half an hour is the least that a start may take"
    assert (hang := job.pass_time(1200)) is not None and hang.limit_s == 1800


def test_a_start_has_a_limit_of_its_own_once_the_script_is_known_to_report() -> None:
    job = Job()
    hang = job.pass_time(5000)
    assert hang is not None
    assert (hang.kind, hang.step, hang.limit_s) == ("start-up", -1, 3600)


def test_a_script_that_never_reported_is_left_alone() -> None:
    job = Job()
    job.restart()
    assert job.pass_time(5 * 3600) is None
    asked = Job(HangRules(startup=30.0))
    asked.restart()
    assert (hang := asked.pass_time(60)) is not None and hang.kind == "start-up"


def test_a_hang_before_the_script_reports_is_found_in_later_generations() -> None:
    job = Job()
    job.steps(20, 1.0)
    job.restart()
    assert (hang := job.pass_time(3600)) is not None
    assert (hang.kind, hang.limit_s) == ("start-up", 1800)


def test_each_alarm_doubles_the_limits() -> None:
    job = Job()
    for limit_s in (300, 600, 1200):
        job.steps(20, 1.0)
        assert (hang := job.pass_time(1500)) is not None and hang.limit_s == limit_s
        job.restart()


def test_a_given_limit_stays_and_off_is_off() -> None:
    job = Job(HangRules(step=5.0))
    for _ in range(3):
        job.steps(2, 1.0)
        assert (hang := job.pass_time(10)) is not None and hang.limit_s == 5
        job.restart()
    off = Job(HangRules(step=Auto.OFF, startup=Auto.OFF))
    assert off.pass_time(5 * 3600) is None
    off.steps(20, 1.0)
    assert off.pass_time(5 * 3600) is None


def test_saving_may_take_longer_than_a_step_but_not_for_ever_and_teaches_nothing() -> None:
    job = Job()
    job.steps(20, 1.0)
    job.ranks = {
        rank: Progress(WorkerPhase.RUNNING, now.step, now.beat_s, untimed=True) for rank, now in job.ranks.items()
    }
    assert job.pass_time(1500) is None
    job.ranks = {rank: Progress(WorkerPhase.RUNNING, now.step, now.beat_s) for rank, now in job.ranks.items()}
    assert job.pass_time(200) is None
    job.beat()
    assert (hang := job.pass_time(1000)) is not None and hang.limit_s == 300
    job.restart()
    job.steps(20, 1.0)
    job.ranks = {
        rank: Progress(WorkerPhase.RUNNING, now.step, now.beat_s, untimed=True) for rank, now in job.ranks.items()
    }
    assert (hang := job.pass_time(2 * 3600)) is not None and hang.kind == "start-up"


def test_a_start_of_signs_may_last_and_is_no_step() -> None:
    """Five hours of reading data, and then none: the limit counts from the last sign."""
    job = Job()
    for signs in range(1, 20):
        job.ranks = dict.fromkeys(job.ranks, Progress(WorkerPhase.ATTACHED, -1, 0.0, signs=signs))
        assert job.pass_time(1000) is None
    assert (hang := job.pass_time(4000)) is not None
    assert (hang.kind, hang.limit_s) == ("start-up", 3600)


def test_a_node_that_was_frozen_as_a_whole_ages_nobody() -> None:
    job = Job(HangRules(step=10.0))
    job.steps(3, 1.0)
    assert job.pass_time(1) is None  # the last heartbeat was seen
    job.now_s += 3600
    assert job.look() is None
    assert job.pass_time(7) is None
    assert job.pass_time(5) is not None


def test_workers_that_have_been_asked_to_stop_do_not_age() -> None:
    job = Job(HangRules(step=10.0, silence_s=10.0))
    job.output = "some"
    job.steps(3, 1.0)
    job.paused = True
    assert job.pass_time(100) is None


def test_who_has_ended_or_stopped_at_the_boundary_cannot_hang() -> None:
    job = Job(HangRules(step=10.0))
    job.steps(3, 1.0)
    job.exited = {0}
    job.ranks[1] = Progress(WorkerPhase.YIELDED, 3, job.now_s)
    assert job.pass_time(100) is None


def test_silence_counts_from_the_last_byte_or_heartbeat() -> None:
    job = Job(HangRules(silence_s=10.0))
    job.restart()
    job.output = 1
    assert job.pass_time(1000) is None, "a start is silent"
    job.output = 2
    assert job.pass_time(8) is None
    job.beat()
    assert job.pass_time(8) is None
    hang = job.pass_time(8)
    assert hang is not None
    assert (hang.kind, hang.ranks, hang.limit_s) == ("silence", (0, 1), 10)
    assert "no output for" in str(hang)
    job.restart()
    job.output = 1
    assert (hang := job.pass_time(6000)) is not None and hang.limit_s > 1800, "as long as a start may be"
    unwatched = Job(HangRules(silence_s=10.0))
    unwatched.restart()
    assert unwatched.pass_time(100) is None, "another node's output is watched"


def test_steps_that_vary_as_they_like_within_their_range_are_no_hang(seeds: Iterator[random.Random]) -> None:
    rng = next(seeds)
    for _ in range(20):
        job, step_s = Job(), rng.uniform(0.5, 100)
        for _ in range(30):
            job.steps(1, step_s * rng.uniform(0.2, 2.5))


COLLECTIVE, COMPUTE = "/x/torch/distributed/distributed_c10d.py:1 in all_reduce", "train.py:3 in slow"


@pytest.mark.parametrize(
    ("evidence", "behind"),
    [
        ([], ()),
        ([Evidence(0, 5, frame=COMPUTE)], ()),
        ([Evidence(0, 5, frame=COLLECTIVE, waits=True), Evidence(1, 5, frame=COMPUTE)], (1,)),
        ([Evidence(0, 5, frame=COMPUTE), Evidence(1, 4, frame=COLLECTIVE, waits=True)], (1,)),
        ([Evidence(0, 5, stopped=True), Evidence(1, 4, frame=COMPUTE)], (0,)),
        ([Evidence(r, 5, frame=COLLECTIVE, waits=True) for r in range(3)], ()),
        ([*(Evidence(r, 5, frame="a") for r in range(3)), Evidence(3, 5, frame="b")], (3,)),
        ([Evidence(0, 5, frame="a"), Evidence(1, 5, frame="b")], ()),
        ([Evidence(0, 5, frame=COLLECTIVE, waits=True), Evidence(1, 5)], ()),
    ],
)
def test_the_rank_that_the_others_wait_for(evidence: list[Evidence], behind: tuple[int, ...]) -> None:
    assert suspects(evidence) == behind


def test_ranks_that_never_say_a_word_while_others_make_steps_are_not_late() -> None:
    """A script whose rank 0 alone reports progress, as it alone logs."""
    job = Job(num_ranks=3)
    job.restart()
    for _ in range(5 * 3600 // 60):
        assert job.pass_time(60.0) is None
        job.beat(0)
    hang = job.pass_time(3 * 3600.0)
    assert hang is not None, "it is watched by the one that does"
    assert hang.ranks == (0,)


def test_a_rank_that_never_says_a_word_is_found_by_those_that_wait_for_it() -> None:
    job = Job()
    job.restart()
    job.ranks[0] = Progress(WorkerPhase.ATTACHED, -1, 0.0)
    hang = job.pass_time(2 * 3600.0)
    assert hang is not None
    assert (hang.kind, hang.ranks) == ("start-up", (0, 1))
