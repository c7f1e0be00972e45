"""What the leader decides, as a table of situations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.rounds.failures import FailureClass
from launcher.rounds.history import Exclusion, History, Mark, MarkKind
from launcher.rounds.membership import Evict, Propose, Rules, Wait, breakage, decide
from launcher.rounds.records import (
    Breakage,
    Node,
    Status,
    Verdict,
)
from tests.launcher.situations import FAILURE, RULES, act, every_slot, node, round_of, running, told, view


class TestFirstRound:
    def test_waits_for_min_nodes(self) -> None:
        assert isinstance(act(view((node("a"),))), Wait)

    def test_max_nodes_start_at_once(self) -> None:
        action = act(view((node("a"), node("b"), node("c"))), now_s=0.0)
        assert isinstance(action, Propose)
        assert action.round.generation == 1
        assert action.round.world_size == 6

    def test_min_nodes_wait_for_the_last_call(self) -> None:
        seen = view((node("a"), node("b")), nodes_changed_s=10.0)
        assert act(seen, now_s=11.0) == Wait("last call", 12.0)
        assert isinstance(act(seen, now_s=12.0), Propose)

    def test_too_few_nodes_for_too_long_end_the_job(self) -> None:
        seen = view((node("a"),))
        assert isinstance(act(seen, now_s=RULES.quorum_timeout_s - 1), Wait)
        action = act(seen, now_s=RULES.quorum_timeout_s)
        assert isinstance(action, Propose)
        assert action.round.outcome == "failed: 1 of at least 2 nodes after 600 s"

    def test_a_store_hosted_anew_counts_on_from_what_the_nodes_know(self) -> None:
        action = act(view((node("a", generation=7), node("b"), node("c"))))
        assert isinstance(action, Propose)
        assert action.round.generation == 8

    def test_generations_grow_beyond_those_of_nodes_that_stay_out(self) -> None:
        action = act(view((node("a"), node("b"), node("c", generation=7, status=Status.EXCLUDED))))
        assert isinstance(action, Propose)
        assert action.round.generation == 8

    @pytest.mark.parametrize("status", [Status.RUNNING, Status.STOPPING, Status.DONE])
    def test_waits_for_workers_of_a_round_whose_record_is_gone(self, status: Status) -> None:
        nodes = (node("a"), node("b"), node("c", generation=7, status=status))
        assert act(view(nodes), now_s=1.0) == Wait("waiting for c to stop", 60.0)
        assert act(view(nodes), now_s=60.0) == Evict("c", "did not stop its workers within 60 s")


class TestTelling:
    """Only the leader sees every record: what breaks a round is told in the round."""

    def test_a_round_is_complete_once_all_have_joined(self) -> None:
        a, b = running("a", "b")
        forming = round_of("b", "a", complete=False)
        assert isinstance(act(view((a, node("b")), forming), now_s=1.0), Wait)
        action = act(view((a, dataclasses.replace(b, worker_store="host 1")), forming))
        assert action == Propose(dataclasses.replace(forming, complete=True, worker_store="host 1"))

    def test_who_runs_workers_hears_of_a_loss_and_who_is_lost(self) -> None:
        seen = view(running("a", "c"), round_of("a", "b", "c"), departed={"b": "lost: gone"})
        assert told(seen) == Breakage("node b lost: gone", graceful=False, lost=("b",))

    def test_what_all_know_is_not_told_again(self) -> None:
        a, c = running("a", "c")
        current = round_of("a", "b", "c")
        seen = view((dataclasses.replace(a, status=Status.STOPPING, reason="b lost"), c), current)
        first = told(view((a, c), current))
        assert told(dataclasses.replace(seen, round=dataclasses.replace(current, broken=first))) is None

    def test_a_second_loss_is_told_too(self) -> None:
        current = round_of("a", "b", "c", broken=Breakage("node b lost", graceful=False, lost=("b",)))
        assert told(view(running("a"), current)).lost == ("b", "c")

    def test_nodes_that_yielded_take_the_others_with_them(self) -> None:
        stopping: dict[str, Any] = {"status": Status.STOPPING, "generation": 1, "reason": "yielded", "yielded": True}
        current = round_of("a", "b")
        first = told(view((node("a", **stopping), *running("b")), current))
        assert first == Breakage("node a yielded", graceful=True)
        both = view((node("a", **stopping), node("b", **stopping)), dataclasses.replace(current, broken=first))
        assert told(both).all_stopped

    def test_a_failure_among_nodes_that_yield_ends_the_waiting(self) -> None:
        broken = Breakage("node a yielded", graceful=True)
        stopping = node("a", status=Status.STOPPING, generation=1, reason="failed", failure=FAILURE)
        assert not told(view((stopping, *running("b")), round_of("a", "b", broken=broken))).graceful

    def test_a_round_of_many_stays_far_below_what_etcd_takes(self) -> None:
        names = [f"ip-10-0-{i // 256}-{i % 256}.region.compute.internal-{i:08x}" for i in range(512)]
        there, coming = names[:256], names[256:]
        rules = Rules(min_nodes=2, max_nodes=512)
        nodes = (*running(*there), *(node(name) for name in coming))
        grows = decide(view(nodes, round_of(*there)), rules, every_slot, 100.0)
        assert isinstance(grows, Propose)
        stopping = [
            dataclasses.replace(n, status=Status.STOPPING, reason=grows.round.stop, yielded=True) for n in nodes[:256]
        ]
        current = dataclasses.replace(grows.round, broken=Breakage(f"node {there[0]} {grows.round.stop}", True))
        ends = decide(view((*stopping, *nodes[256:]), current), rules, every_slot, 100.0)
        assert isinstance(ends, Propose)
        assert ends.round.broken.all_stopped
        assert len(ends.round.to_json()) < 100_000, "etcd refuses 1.5 MB, and every node reads every version"

    def test_a_reason_names_some_and_counts_the_others(self) -> None:
        current = round_of(*"abcdefgh", "last")
        seen = breakage(view(running("last"), current))
        assert seen.lost == tuple("abcdefgh")
        assert seen.reason == "node a lost; node b lost; node c lost; node d lost; and 4 more"

    def test_what_hung_stays_hung_though_its_node_now_says_something_else(self) -> None:
        checks = node("a", status=Status.EXCLUDED, generation=1, reason="preflight runs")
        told_before = Breakage("node a hang: no step", graceful=False, hung=True)
        assert breakage(view((checks, *running("b")), round_of("a", "b", broken=told_before))).hung

    def test_nodes_that_may_come_back_are_not_lost_yet(self) -> None:
        seen = view(running("a", "c"), round_of("a", "b", "c"), awaited=frozenset("b"), awaited_until_s=102.0)
        assert act(seen) == Wait("no word yet from b", 102.0)

    def test_a_loss_is_told_though_another_node_is_awaited(self) -> None:
        seen = view(running("c"), round_of("a", "b", "c"), departed={"a": "lost"}, awaited=frozenset("b"))
        assert told(seen) == Breakage("node a lost", graceful=False, lost=("a",))


class TestLoss:
    def test_survivors_start_again_without_last_call_and_with_their_ranks(self) -> None:
        survivors = tuple(dataclasses.replace(n, status=Status.READY) for n in running("c", "a"))
        seen = view(survivors, round_of("c", "b", "a"), departed={"b": "lost: its lease ended"}, nodes_changed_s=100.0)
        action = act(seen, now_s=100.0)
        assert isinstance(action, Propose)
        assert [p.node_id for p in action.round.participants] == ["c", "a"]
        assert action.round.generation == 2
        assert action.round.reason == "node b lost: its lease ended"

    def test_waits_for_survivors_to_stop_their_workers(self) -> None:
        a, c = running("a", "c")
        seen = view((dataclasses.replace(a, status=Status.READY), c), round_of("a", "b", "c"))
        assert act(seen, now_s=1.0) == Wait("waiting for c to stop", 60.0)
        assert act(seen, now_s=60.0) == Evict("c", "did not stop its workers within 60 s")

    def test_a_failure_that_a_loss_explains_is_not_charged(self) -> None:
        survivors = tuple(dataclasses.replace(n, status=Status.READY, failure=FAILURE) for n in running("a", "c"))
        action = act(view(survivors, round_of("a", "b", "c", restarts=1)))
        assert isinstance(action, Propose)
        assert not action.round.outcome
        assert action.round.restarts == 1

    def test_below_min_nodes_the_job_waits(self) -> None:
        (a,) = running("a")
        action = act(view((dataclasses.replace(a, status=Status.READY),), round_of("a", "b")), now_s=1.0)
        assert action == Wait("1 of at least 2 nodes", 600.0)

    def test_a_loss_while_the_round_forms_breaks_it(self) -> None:
        waiting = (node("a"), node("c"))
        seen = view(waiting, round_of("a", "b", "c"))
        assert breakage(seen)
        assert isinstance(act(seen), Propose)


class TestFailure:
    def fallen(self, **failure) -> tuple[Node, ...]:
        failed = dataclasses.replace(FAILURE, **failure)
        a, b = running("a", "b")
        return (
            dataclasses.replace(a, status=Status.READY, failure=failed),
            dataclasses.replace(b, status=Status.READY),
        )

    def test_is_charged_and_told(self) -> None:
        action = act(view(self.fallen(), round_of("a", "b")))
        assert isinstance(action, Propose)
        assert action.round.restarts == 1
        assert action.round.reason == "worker of rank 1 failed with exit code 1: boom"

    def test_beyond_the_budget_ends_the_job(self) -> None:
        action = act(view(self.fallen(exit_code=-9), round_of("a", "b", restarts=1)))
        assert isinstance(action, Propose)
        assert action.round.outcome == "failed: worker of rank 1 was killed by SIGKILL: boom; restarts used: 1 of 1"

    def test_that_will_happen_again_ends_the_job_at_once(self) -> None:
        nodes = self.fallen(restartable=False, exit_code=2)
        action = act(view(nodes, round_of("a", "b")))
        assert isinstance(action, Propose)
        assert action.round.outcome.startswith("failed: worker of rank 1 failed with exit code 2")

    def test_that_is_final_ends_the_job_while_its_reporter_waits_for_that(self) -> None:
        a, b = self.fallen(restartable=False)
        action = act(view((dataclasses.replace(a, status=Status.STOPPING), b), round_of("a", "b")))
        assert isinstance(action, Propose)
        assert action.round.verdict is Verdict.BUDGET_USED

    def test_is_forgotten_in_the_next_generation(self) -> None:
        a, b = (dataclasses.replace(n, failure=FAILURE) for n in running("a", "b"))
        yet_to_join = dataclasses.replace(b, generation=0, status=Status.READY)
        assert breakage(view((a, yet_to_join), round_of("a", "b"))) is None

    def test_again_waits_before_the_next_round(self) -> None:
        history = History(in_row=2)
        nodes, rules = self.fallen(kind=FailureClass.SIGNAL), dataclasses.replace(RULES, max_restarts=None)
        seen = view(nodes, round_of("a", "b", history=history), formed_s=10.0, broken_s=20.0)
        action = act(seen, 21.9, rules)
        assert action == Wait("restarts 2 s after: worker of rank 1 failed with exit code 1: boom", 22.0)
        action = act(seen, 22.0, rules)
        assert isinstance(action, Propose)
        assert action.round.history.in_row == 3

    @pytest.mark.parametrize(("reason", "in_row"), [("worker failed", 1), ("hang: no output for 600 s", 4)])
    def test_time_spent_hanging_is_no_life(self, reason: str, in_row: int) -> None:
        nodes = tuple(dataclasses.replace(n, reason=reason) for n in self.fallen(kind=FailureClass.LOST_PEER))
        current, rules = round_of("a", "b", history=History(in_row=3)), dataclasses.replace(RULES, max_restarts=None)
        action = act(view(nodes, current, formed_s=0.0, broken_s=600.0), 700.0, rules)
        assert isinstance(action, Propose)
        assert action.round.history.in_row == in_row

    def test_names_the_cause_that_the_leader_heard_of_last(self) -> None:
        a, b = self.fallen(kind=FailureClass.LOST_PEER, traceback="t")
        root = dataclasses.replace(FAILURE, rank=2, restartable=False, traceback="Traceback ...")
        action = act(view((a, dataclasses.replace(b, failure=root)), round_of("a", "b"), fell={"a": 5, "b": 6}))
        assert isinstance(action, Propose)
        assert action.round.verdict is Verdict.BUDGET_USED
        assert [(c.node_id, c.failure.traceback) for c in action.round.causes] == [("b", "Traceback ..."), ("a", "")]


class TestExclusion:
    out = Exclusion("d", "bad", for_s=60.0)
    history = History(exclusions=(out,))

    def test_others_are_not_interrupted_for_it(self) -> None:
        seen = view((*running("a", "b"), node("d")), round_of("a", "b", history=self.history), formed_s=90.0)
        assert act(seen) == Wait("the round is complete")

    def test_ends_in_time(self) -> None:
        seen = view((*running("a", "b"), node("d")), round_of("a", "b", history=self.history), formed_s=40.0)
        assert isinstance(act(seen, 99.9), Wait)
        action = act(seen, 100.0)
        assert isinstance(action, Propose)
        assert action.round.generation == 1
        assert action.round.history.excluded("d") is None
        assert isinstance(act(dataclasses.replace(seen, round=action.round), 100.0), Propose), "and then it is taken in"

    def test_it_is_called_back_where_too_few_are_left(self) -> None:
        (a,) = running("a")
        waits = node("d", status=Status.EXCLUDED)
        nodes = (dataclasses.replace(a, status=Status.READY), waits)
        seen = view(nodes, round_of("a", "b", history=self.history), formed_s=90.0, broken_s=99.0)
        action = act(seen)
        assert isinstance(action, Propose)
        assert action.round.generation == 1
        assert action.round.history.excluded("d") is None
        back = dataclasses.replace(seen, nodes=(nodes[0], node("d")), round=action.round)
        action = act(back)
        assert isinstance(action, Propose)
        assert [p.node_id for p in action.round.participants] == ["a", "d"]

    def test_a_node_that_comes_and_goes_is_left_out_of_the_next_round(self) -> None:
        seen_before = tuple(Mark("d", MarkKind.DEPARTURE, "lost", age_s=100.0) for _ in range(2))
        current = round_of("a", "b", "d-00000007", history=History(marks=seen_before))
        nodes = tuple(dataclasses.replace(n, status=Status.READY) for n in running("a", "b"))
        seen = view((*nodes, node("d-00000008")), current, departed={"d-00000007": "lost: its lease ended"})
        action = act(seen)
        assert isinstance(action, Propose)
        assert [p.node_id for p in action.round.participants] == ["a", "b"]
        excluded = action.round.history.excluded("d")
        assert excluded is not None
        assert excluded.reason == "3 times within 600 s: took part and then lost: its lease ended"

    def test_a_node_that_drains_has_left_whether_or_not_it_is_still_there(self) -> None:
        """It may end only once the next round has formed, where the store is slow."""
        seen_before = tuple(Mark("d", MarkKind.DEPARTURE, "lost", age_s=100.0) for _ in range(2))
        current = round_of("a", "b", "d-00000007", history=History(marks=seen_before))
        going = dataclasses.replace(node("d-00000007"), generation=1, status=Status.READY, draining=True, yielded=True)
        nodes = tuple(dataclasses.replace(n, status=Status.READY) for n in running("a", "b"))
        action = act(view((*nodes, going), current))
        assert isinstance(action, Propose)
        excluded = action.round.history.excluded("d")
        assert excluded is not None
        assert excluded.reason == "3 times within 600 s: took part and then left"
