"""When to save, decided: rules, at which steps ranks look, and what a save costs. Nothing here sleeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from storage import Checkpointer, UsageError, parse_every
from storage.pace.cost import PRIOR_S, Meter, interval_s, mean_time_between_failures_s
from storage.pace.rules import Backlog, Continuously, EverySeconds, EverySteps, Rule, Tier
from storage.pace.schedule import Answer, Schedule, Seen, Timer
from storage.saving.options import SavingPlan


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        (1, EverySteps(1)),
        (250, EverySteps(250)),
        (timedelta(minutes=2), EverySeconds(120.0)),
        ("30s", EverySeconds(30.0)),
        ("1.5 min", EverySeconds(90.0)),
        ("500ms", EverySeconds(0.5)),
        ("2h", EverySeconds(7200.0)),
        ("auto", Continuously()),
    ],
)
def test_what_may_be_said_of_when(said: Any, rule: Rule) -> None:
    assert parse_every(said) == rule


@pytest.mark.parametrize(
    "said", [0, -3, True, 1.5, "0s", "-3s", "soon", "", "30", "9" * 400 + "s", timedelta(0), None, [10]]
)
def test_what_is_no_time_to_save_is_one_line(said: Any) -> None:
    with pytest.raises(UsageError, match=r"^every is .*; it must be a number of steps, at least 1, or a time such as"):
        parse_every(said)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ram_every": 5}, "without every"),
        ({"every": 5, "ram_every": "auto"}, "ram_every is 'auto'; .* \"5min\"$"),
        ({"backlog": "drop"}, "backlog is 'drop'; it must be one of 'wait', 'skip', 'replace'"),
        ({"prefix_spread": 0}, "prefix_spread is 0; it must be a number of prefixes from 1 to 256"),
        ({"prefix_spread": 257}, "prefix_spread is 257"),
        ({"check_replicas": True}, "check_replicas is True; it must be a number of steps"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        SavingPlan.of(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"keep": keep}, "keep is .*; it must be a number of checkpoints") for keep in (0, -1, 2.5, "3", None, True)),
        *(
            ({"timeout_s": s}, "timeout_s is .*; it must be a number of")
            for s in (0, -1, "9", None, math.inf, math.nan)
        ),
        ({"on_event": "print"}, "on_event is 'print'"),
    ],
)
def test_parameters_that_are_none_are_one_line(options: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Checkpointer("memory://limits", **options)


def test_options_that_fit() -> None:
    plan = SavingPlan.of(every="auto", ram_every=2, backlog="skip", prefix_spread=16, check_replicas=100)
    assert plan == SavingPlan(Continuously(), EverySteps(2), Backlog.SKIP, 16, 100)
    assert SavingPlan.of() == SavingPlan()


def due_steps(timer: Timer, steps: Iterator[int] | range) -> list[int]:
    due = []
    for step in steps:
        if timer.asks(step):
            due.append(step)
        timer.passed(step)
    return due


def test_steps_are_multiples_that_were_passed() -> None:
    assert due_steps(Timer(EverySteps(10)), range(1, 35)) == [10, 20, 30]
    assert due_steps(Timer(EverySteps(10)), range(3, 50, 3)) == [12, 21, 30, 42]  # of every third step one is told
    timer = Timer(EverySteps(50))
    timer.passed(57)  # restored
    assert due_steps(timer, range(58, 160)) == [100, 150]


class Job:
    """A training under virtual time, whose steps take `step_s(now)` and whose saves take `save_s` behind it."""

    def __init__(
        self,
        store: Rule,
        step_s: Callable[[float], float],
        *,
        save_s: float = 0.0,
        floor_s: float = 0.0,
        hangs: bool = False,
    ):
        self._schedule = Schedule(store, None)
        self._step_s = step_s
        self._save_s, self._floor_s, self._hangs = save_s, floor_s, hangs
        self.saves: list[float] = []
        self.looks: list[float] = []

    def run(self, num_steps: int, epoch_steps: int = 1 << 60) -> None:
        now_s, took_s = 0.0, None
        for number in range(1, num_steps + 1):
            step = number % epoch_steps
            now_s += self._step_s(now_s)
            took_s = self._step_s(now_s)
            if self._schedule.asking(step):
                self.looks.append(now_s)
                began_s = self.saves[-1] if self.saves else 0.0
                is_saving = bool(self.saves) and (self._hangs or now_s < began_s + self._save_s)
                seen = Seen(now_s, began_s, took_s, is_saving, self._save_s, self._floor_s)
                answer = self._schedule.decide(step, {Tier.STORE: seen})
                self._schedule.follow(step, answer)
                if answer.tier is Tier.STORE:
                    assert not is_saving
                    self.saves.append(now_s)
            else:
                self._schedule.follow(step, self._schedule.decide(step, {}))

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip([0.0, *self.saves], self.saves, strict=False)]


def test_a_time_between_saves_is_kept_to_a_step_with_few_looks() -> None:
    job = Job(EverySeconds(60.0), lambda now_s: 0.02)
    job.run(60_000)  # 20 minutes
    assert len(job.saves) == 20
    assert all(59.9 <= gap_s <= 60.1 for gap_s in job.gaps_s)
    assert len(job.looks) <= 15 * len(job.saves)


def test_steps_longer_than_the_time_are_all_saved() -> None:
    job = Job(EverySeconds(10.0), lambda now_s: 12.0)
    job.run(20)
    assert len(job.saves) == 20


def test_a_time_is_kept_where_steps_get_slower_and_faster() -> None:
    job = Job(EverySeconds(60.0), lambda now_s: 0.02 if int(now_s / 100) % 2 else 0.4)
    job.run(30_000)
    assert len(job.saves) > 10
    # half of what was left, in steps that took a twentieth: 30 s of 0.02 s become 600 s of 0.4 s at the very most
    assert all(gap_s >= 59.5 for gap_s in job.gaps_s)
    assert max(job.gaps_s) <= 60 + 0.5 * 60 * 20
    assert sorted(job.gaps_s)[len(job.gaps_s) // 2] <= 75


def test_by_itself_the_next_save_begins_when_the_last_has_ended_and_not_before_it_pays() -> None:
    job = Job(Continuously(), lambda now_s: 0.1, save_s=5.0)
    job.run(3_000)
    assert all(4.9 <= gap_s <= 5.6 for gap_s in job.gaps_s[1:])  # seen at most a twentieth and a step later
    job = Job(Continuously(), lambda now_s: 0.1, save_s=5.0, floor_s=40.0)
    job.run(3_000)
    assert all(39.9 <= gap_s <= 40.2 for gap_s in job.gaps_s[1:])


@pytest.mark.parametrize("rule", [EverySeconds(60.0), Continuously()])
def test_a_time_is_kept_where_each_epoch_counts_its_steps_anew(rule: Rule) -> None:
    job = Job(rule, lambda now_s: 0.1, save_s=50.0)
    job.run(30_000, epoch_steps=700)
    assert len(job.saves) > 45
    assert max(job.gaps_s) < 62


def test_a_save_that_hangs_is_looked_for_ever_more_seldom() -> None:
    job = Job(Continuously(), lambda now_s: 0.1, save_s=5.0, hangs=True)
    job.run(100_000)
    assert len(job.saves) == 1
    assert len(job.looks) < 400


def test_ram_saves_lie_between_those_of_the_store() -> None:
    schedule = Schedule(EverySteps(6), EverySteps(2))
    answers = []
    for step in range(1, 13):
        answers.append(schedule.decide(step, {}))
        schedule.follow(step, answers[-1])
    assert [(step, answer.tier) for step, answer in enumerate(answers, 1) if answer.tier] == [
        (2, "ram"),
        (4, "ram"),
        (6, "store"),
        (8, "ram"),
        (10, "ram"),
        (12, "store"),
    ]
    assert answers[0] == Answer(None, {})


def test_what_pays_is_dalys_interval() -> None:
    assert interval_s(10.0, 3600.0) == pytest.approx(271.7, abs=0.3)  # begin to begin: sqrt(72000), and 1.2 % more
    assert interval_s(0.0, 3600.0) == 0.0
    assert interval_s(5000.0, 2000.0) == 7000.0  # a save that costs more than two lives: once in each
    assert interval_s(1.0, 100.0) < interval_s(2.0, 100.0) < interval_s(2.0, 200.0)
    # no other interval wastes less: the save itself, and half an interval for each failure
    best_s = interval_s(10.0, 3600.0)
    waste = {s: 10.0 / s + s / 2 / 3600.0 for s in (best_s / 2, best_s, best_s * 2)}
    assert min(waste, key=waste.__getitem__) == best_s


def test_failures_make_it_shorter_and_a_quiet_life_longer() -> None:
    assert mean_time_between_failures_s(0.0, 0) == PRIOR_S
    assert mean_time_between_failures_s(86_400.0, 0) == PRIOR_S + 86_400
    assert mean_time_between_failures_s(86_400.0, 9) == (PRIOR_S + 86_400) / 10
    assert mean_time_between_failures_s(-5.0, 0) == PRIOR_S  # clocks of two hosts


def test_a_save_costs_what_it_blocks_and_what_steps_take_longer_by() -> None:
    meter, now_s = Meter(), 0.0
    assert meter.step_s is None
    for step in range(1, 11):
        now_s += 0.1 if step != 5 else 30.0  # an evaluation is no step
        meter.step(step, now_s, is_saving=False)
    assert meter.step_s == pytest.approx(0.1)
    now_s += 0.5  # `save`
    meter.resume(now_s)
    meter.step(10, now_s, is_saving=True)
    for step in range(11, 15):
        now_s += 0.15
        meter.step(step, now_s, is_saving=True)
    meter.saved(0.5, 1.1)
    assert meter.cost.blocked_s == 0.5
    assert meter.cost.slower_s == pytest.approx(4 * 0.05)
    assert meter.cost.cost_s == pytest.approx(0.7)
    meter.saved(0.5, 1.1)  # nothing ran beside this one
    assert meter.cost.slower_s == pytest.approx(0.7 * 0.2)
    assert meter.num_saves == 2
