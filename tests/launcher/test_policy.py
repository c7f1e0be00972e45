"""What follows from failures, as a table of job histories."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence

import pytest

from launcher.rounds.exclusion import admit, needed, weigh
from launcher.rounds.failures import FailureClass
from launcher.rounds.formation import Formation
from launcher.rounds.history import Exclusion, History, Mark, MarkKind
from launcher.rounds.policy import (
    Blame,
    GenerationEnd,
    Judgement,
    Limits,
    backoff_s,
    blame,
    exclude,
    judge,
    mark,
    order_causes,
    readmit,
    suspects,
)
from launcher.rounds.records import FailedWorker, Failure, Node, Participant, Round, Verdict

LIMITS = Limits(crash_loop=4, strikes=3, strike_window_s=600.0, exclusion_s=100.0)


def cause(kind: FailureClass = FailureClass.SIGNAL, node: str = "a", **fields) -> FailedWorker:
    defaults = {"rank": 0, "exit_code": 1, "message": "boom", "ts": 1.0, "place": "ValueError at x.py:1", "step": -1}
    return FailedWorker(node, f"host-{node}", Failure(kind=kind, **{**defaults, **fields}))


def after(history: History, *causes: FailedWorker, **fields) -> Judgement:
    settings = {"lived_s": 5.0, "restarts": 0, "max_restarts": None, "lost": False, "stopping": False, **fields}
    return judge(history, causes, LIMITS, GenerationEnd(**settings))


def lives(*failures: FailedWorker, **fields) -> Judgement:
    """The judgement of the last of several failures in turn; every one before must have led to a restart."""
    history = History()
    for failure in failures[:-1]:
        judged = after(history, failure, **fields)
        assert judged.verdict is None, judged
        history = judged.history
    return after(history, failures[-1], **fields)


class TestWhatStopsAtOnce:
    def test_a_refused_argument(self) -> None:
        assert lives(cause(FailureClass.USAGE)).verdict is Verdict.USAGE

    def test_a_program_that_gave_up_whatever_else_happened(self) -> None:
        worked = lives(cause(FailureClass.SIGNAL, step=3)).history
        gave_up = cause(FailureClass.GAVE_UP, step=9)
        for judged in (
            after(worked, gave_up),
            after(worked, gave_up, lost=True),
            after(worked, gave_up, stopping=True),
        ):
            assert judged.verdict is Verdict.FAILS_AGAIN
            assert judged.why == "it gave up"
        ordered = order_causes([(0, cause(FailureClass.PROGRAM)), (1, gave_up)])
        assert ordered[0] == gave_up

    def test_an_error_at_start(self) -> None:
        judged = lives(cause(FailureClass.START_UP))
        assert judged.verdict is Verdict.FAILS_AGAIN
        assert "at start" in judged.why

    @pytest.mark.parametrize(
        ("kind", "verdict"), [(FailureClass.START_UP, Verdict.FAILS_AGAIN), (FailureClass.USAGE, Verdict.USAGE)]
    )
    def test_but_not_once_the_job_has_worked(self, kind: FailureClass, verdict: Verdict) -> None:
        worked = lives(cause(FailureClass.SIGNAL, step=3)).history
        assert after(worked, cause(kind)).verdict is None
        settled = after(History(), lived_s=31.0).history
        assert after(settled, cause(kind)).verdict is None
        not_yet = after(History(), lived_s=2.0).history
        assert after(not_yet, cause(kind)).verdict is verdict

    def test_what_every_node_refuses_stops_even_a_job_that_has_worked(self) -> None:
        refused = cause(FailureClass.USAGE, place="exit code 2")
        worked = lives(cause(FailureClass.SIGNAL, step=3)).history
        assert after(after(worked, refused).history, refused).verdict is Verdict.FAILS_AGAIN


class TestProgramErrors:
    def test_the_same_place_twice_stops(self) -> None:
        error = cause(FailureClass.PROGRAM)
        assert lives(error).charged
        judged = lives(error, error)
        assert judged.verdict is Verdict.FAILS_AGAIN
        assert "ValueError at x.py:1" in judged.why

    def test_the_same_step_twice_stops(self) -> None:
        judged = lives(cause(FailureClass.PROGRAM, step=7), cause(FailureClass.PROGRAM, step=7, place="elsewhere"))
        assert judged.verdict is Verdict.FAILS_AGAIN
        assert "after step 7" in judged.why

    def test_with_steps_gained_between_it_may_pass(self) -> None:
        assert lives(cause(FailureClass.PROGRAM, step=7), cause(FailureClass.PROGRAM, step=8)).charged

    def test_steps_that_are_done_again_are_no_gain(self) -> None:
        errors = [cause(FailureClass.PROGRAM, step=step) for step in (7, 6)]
        assert lives(*errors).verdict is Verdict.FAILS_AGAIN

    def test_what_victims_tell_of_steps_is_no_gain(self) -> None:
        root, victim = cause(FailureClass.PROGRAM, step=7), cause(FailureClass.LOST_PEER, "b", step=8)
        first = after(History(), root)
        assert after(first.history, root, victim).verdict is Verdict.FAILS_AGAIN

    def test_other_failures_between_do_not_hide_it(self) -> None:
        error = cause(FailureClass.PROGRAM, step=7)
        assert lives(error, cause(FailureClass.SIGNAL, step=5), error).verdict is Verdict.FAILS_AGAIN
        assert lives(error, cause(FailureClass.SIGNAL, step=9), cause(FailureClass.PROGRAM, step=9)).charged

    def test_a_script_without_steps_is_judged_by_the_place_however_long_it_lived(self) -> None:
        error = cause(FailureClass.PROGRAM)
        assert lives(error, error, lived_s=1e4).verdict is Verdict.FAILS_AGAIN
        assert lives(error, cause(FailureClass.PROGRAM, place="elsewhere"), lived_s=1e4).charged


class TestRestarts:
    def test_the_first_is_at_once_and_then_ever_later(self) -> None:
        assert [backoff_s(n) for n in (0, 1, 2, 3, 4, 9, 50)] == [0, 0, 1, 2, 4, 60, 60]
        assert lives(cause()).delay_s == 0
        assert lives(cause(), cause()).delay_s == 1

    def test_steps_gained_begin_anew(self) -> None:
        judged = lives(*(cause(step=step) for step in (3, 3, 3, 4, 4)))
        assert judged.delay_s == 1
        assert judged.history.in_row == 2

    def test_a_long_life_begins_anew_for_a_script_without_steps(self) -> None:
        assert lives(*[cause()] * 9, lived_s=300.0).delay_s == 0

    @pytest.mark.parametrize(
        ("kind", "verdict"),
        [
            (FailureClass.SIGNAL, Verdict.CRASH_LOOP),
            (FailureClass.OUT_OF_MEMORY, Verdict.CRASH_LOOP),
            (FailureClass.HANG, Verdict.CRASH_LOOP),
            (FailureClass.DEVICE, Verdict.NODES_FAIL),
            (FailureClass.LOST_PEER, Verdict.NODES_FAIL),
        ],
    )
    def test_many_in_a_row_without_progress_stop(self, kind: FailureClass, verdict: Verdict) -> None:
        assert lives(*[cause(kind)] * 3).charged
        assert lives(*[cause(kind)] * 4).verdict is verdict

    def test_a_given_number_is_a_cap(self) -> None:
        judged = after(History(), cause(), restarts=2, max_restarts=2)
        assert judged.verdict is Verdict.BUDGET_USED
        assert judged.why == "restarts used: 2 of 2"
        assert after(History(), cause(), restarts=1, max_restarts=2).charged
        assert after(History(), cause(), max_restarts=0).verdict is Verdict.BUDGET_USED

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            (FailureClass.PROGRAM, {"lost": True}),
            (FailureClass.LOST_PEER, {"lost": True}),
            (FailureClass.LOST_PEER, {"stopping": True}),
            (FailureClass.PREEMPTION, {}),
        ],
    )
    def test_what_something_else_explains_is_not_charged(self, kind: FailureClass, fields: dict[str, bool]) -> None:
        judged = after(History(), cause(kind), max_restarts=0, **fields)
        assert judged.verdict is None
        assert not judged.charged
        assert judged.history.in_row == 0

    def test_a_program_error_while_stopping_counts(self) -> None:
        assert after(History(), cause(FailureClass.PROGRAM), stopping=True).charged


class TestRootCause:
    def test_classes_go_before_the_order_in_which_nodes_were_heard(self) -> None:
        victim = cause(FailureClass.LOST_PEER, "a", rank=0)
        root = cause(FailureClass.PROGRAM, "b", rank=4, traceback="Traceback ...")
        for arrivals in ((1, 2), (2, 1)):
            ordered = order_causes(zip(arrivals, (victim, root), strict=True))
            assert [c.failure.rank for c in ordered] == [4, 0]
        assert ordered[0].failure.traceback

    def test_the_first_that_was_heard_of_equals(self) -> None:
        first, second = cause(node="a", rank=0, ts=9.0), cause(node="b", rank=1, ts=1.0, traceback="t")
        ordered = order_causes([(5, first), (6, second)])
        assert [c.node_id for c in ordered] == ["a", "b"], "times of different hosts are not compared"
        assert not ordered[1].failure.traceback, "only the root cause's is kept"

    def test_victims_of_a_node_are_told_with_it(self) -> None:
        victims = tuple(cause(FailureClass.LOST_PEER, rank=r, ts=2.0).failure for r in (1, 2))
        root = dataclasses.replace(cause(), failure=dataclasses.replace(cause().failure, victims=victims))
        ordered = order_causes([(1, cause(FailureClass.LOST_PEER, "b", rank=5)), (2, root)])
        assert [(c.node_id, c.failure.rank) for c in ordered] == [("a", 0), ("b", 5), ("a", 1), ("a", 2)]
        assert not any(c.failure.victims for c in ordered)


def node(name: str) -> Node:
    return Node(name, f"host-{name}", "", 0, 1, seniority=ord(name))


def form(nodes: Sequence[Node]) -> Formation | None:
    if len(nodes) < 2:
        return None
    return Formation(tuple(Participant(n.node_id, n.slots) for n in nodes), (), None)


class TestExclusion:
    def test_whom_a_failure_speaks_against(self) -> None:
        fresh, again, worked = History(in_row=1), History(in_row=2), History(worked=True)
        assert blame(fresh, cause(FailureClass.DEVICE).failure) is Blame.STRIKE
        assert blame(fresh, cause(FailureClass.SIGNAL).failure) is Blame.NONE, "once is an accident"
        assert blame(again, cause(FailureClass.SIGNAL).failure) is Blame.STRIKE
        assert blame(again, cause(FailureClass.PROGRAM).failure) is Blame.NONE
        assert blame(again, cause(FailureClass.LOST_PEER).failure) is Blame.NONE
        assert blame(worked, cause(FailureClass.START_UP).failure) is Blame.UNFIT

    suffixes = itertools.count()  # an agent that is started anew gets a new one

    def strike(self, history: History, kind: FailureClass = FailureClass.DEVICE):
        judged = after(history, cause(kind, step=history.best_step + 1))
        return weigh(judged, [cause(kind, f"a-{next(self.suffixes):08x}")], [], {}, LIMITS)

    def test_three_strikes_within_the_window(self) -> None:
        history = History()
        for _ in range(2):
            history, new = self.strike(history.aged(100.0))
            assert not new
        history, (new,) = self.strike(history.aged(100.0))
        assert (new.node, new.for_s) == ("a", 100.0)
        assert "3 times within 600 s: device: boom" in new.reason
        formed, history = admit([node(n) for n in "abc"], history, [new], LIMITS, form)
        assert formed is not None
        assert [p.node_id for p in formed.participants] == ["b", "c"]
        assert history.excluded("a") == new
        assert history.in_row == 0
        assert not [m for m in history.marks if m.node == "a"]

    def test_strikes_of_long_ago_are_forgotten(self) -> None:
        history = History()
        for _ in range(4):
            history, new = self.strike(history.aged(301.0))
            assert not new

    def test_coming_and_going(self) -> None:
        history = History()
        for _ in range(3):
            judged, name = after(history.aged(10.0)), f"a-{next(self.suffixes):08x}"
            history, new = weigh(judged, [], [name], {name: "lost: its lease ended"}, LIMITS)
        assert [e.node for e in new] == ["a"]
        assert "took part and then lost: its lease ended" in new[0].reason

    def test_a_node_that_cannot_start_what_has_run_elsewhere_is_out_at_once(self) -> None:
        judged = after(History(worked=True, best_step=5), cause(FailureClass.START_UP, "c"))
        causes = [cause(FailureClass.START_UP, "c"), cause(FailureClass.LOST_PEER, "a")]
        history, new = weigh(judged, causes, [], {}, LIMITS)
        assert [e.node for e in new] == ["c"]
        formed, _ = admit([node(n) for n in "abc"], history, new, LIMITS, form)
        assert formed is not None
        assert [p.node_id for p in formed.participants] == ["a", "b"]

    def test_better_on_a_suspect_than_not_at_all(self) -> None:
        new = Exclusion("a", "bad", 100.0)
        formed, history = admit([node("a"), node("b")], History(), [new], LIMITS, form)
        assert formed is not None
        assert [p.node_id for p in formed.participants] == ["a", "b"]
        assert history.excluded("a") is None
        assert history.waived == ("a (bad)",)

    def test_one_that_is_out_is_called_back_when_it_is_needed(self) -> None:
        history = exclude(History(), [Exclusion("a", "bad", 100.0)], LIMITS)
        formed, _ = admit([node("a"), node("b")], history, [], LIMITS, form)
        assert formed is None, "it has to hear of it first"
        assert needed([node("a"), node("b")], history) == ("a",)
        called = readmit(history, 1.0, ("a",))
        assert called is not None
        assert admit([node("a"), node("b")], called, [], LIMITS, form)[0] is not None

    def test_ends_after_its_time_and_is_longer_the_next(self) -> None:
        history, lengths_s = History(), []
        for _ in range(6):
            history = mark(history, [Mark("n", MarkKind.STRIKE, "x")] * 3)
            (new,) = suspects(history, LIMITS)
            lengths_s.append(new.for_s)
            history = exclude(history, [new], LIMITS).aged(30.0)
            assert readmit(history, new.for_s - 31.0) is None
            ended = readmit(history, new.for_s - 30.0)
            assert ended is not None
            assert ended.excluded("n") is None
            history = ended
        assert lengths_s == [100, 200, 400, 800, 800, 800]

    def test_is_forgiven_in_time(self) -> None:
        history = exclude(History(), [Exclusion("n", "x", 100.0, active=False)], LIMITS).aged(900.0)
        assert exclude(history, [], LIMITS).exclusions == ()

    def test_history_survives_the_store(self) -> None:
        history = exclude(mark(History(best_step=3), [Mark("m", MarkKind.DEPARTURE, "x", 2.0)]),
                          [Exclusion("n", "bad", 100.0)], LIMITS)  # fmt: skip
        current = Round(1, "L", (Participant("a", 1),), None, (), "", causes=(cause(),), history=history)
        current = dataclasses.replace(current, verdict=Verdict.CRASH_LOOP)
        assert Round.from_json(current.to_json()) == current
        assert json.loads(current.to_json())["verdict"] == "crash_loop"


def test_exit_codes_tell_a_scheduler_whether_to_requeue() -> None:
    codes = {verdict: verdict.exit_code for verdict in Verdict}
    assert codes == {
        Verdict.NONE: 1,
        Verdict.SUCCEEDED: 0,
        Verdict.BUDGET_USED: 1,
        Verdict.USAGE: 2,
        Verdict.FAILS_AGAIN: 70,
        Verdict.CRASH_LOOP: 70,
        Verdict.NODES_FAIL: 75,
        Verdict.NO_QUORUM: 75,
    }
