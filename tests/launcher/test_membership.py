"""What the leader decides, as a table of situations."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.rounds.failures import FailureClass
from launcher.rounds.forming import form, rank_order
from launcher.rounds.history import Exclusion, History, Mark, MarkKind
from launcher.rounds.membership import Evict, Propose, Rules, View, Wait, breakage, decide
from launcher.rounds.mesh import Infeasible, MeshPlan
from launcher.rounds.records import (
    LEFT,
    LEFT_AT_ONCE,
    SUCCEEDED,
    Breakage,
    Failure,
    Node,
    Participant,
    Round,
    Status,
    Verdict,
)

RULES = Rules(min_nodes=2, max_nodes=3, last_call_s=2.0, join_cooldown_s=5.0, join_settle_s=0.5, max_restarts=1)
LIMITS = {"min_nodes": RULES.min_nodes, "max_nodes": RULES.max_nodes}
FAILURE = Failure(rank=1, exit_code=1, message="boom", ts=10.0)


def every_slot(slots, previous):
    return None


def node(name: str, seniority: int = 0, **fields) -> Node:
    fields = {"host": name, "address": "127.0.0.1", "port": 1, "slots": 2, **fields}
    return Node(node_id=name, seniority=seniority or ord(name[0]), **fields)


def running(*names: str, **fields) -> tuple[Node, ...]:
    return tuple(node(name, status=Status.RUNNING, generation=1, **fields) for name in names)


def round_of(*names: str, **fields) -> Round:
    participants = tuple(Participant(name, 2) for name in names)
    return Round(
        **{
            "generation": 1,
            "lineage": "L",
            "participants": participants,
            "mesh": None,
            "spares": (),
            "reason": "",
            "complete": True,
            **fields,
        }
    )


def view(nodes: tuple[Node, ...], current: Round | None = None, **fields) -> View:
    times = {"nodes_changed_s": 0.0, "formed_s": 0.0, "broken_s": 0.0}
    return View(nodes=nodes, round=current, lineage="L", **{**times, **fields})


def act(seen: View, now_s: float = 100.0, rules: Rules = RULES, planner=every_slot):
    """What is decided once all have been told that the round is broken, where it is."""
    action = decide(seen, rules, planner, now_s)
    if isinstance(action, Propose) and seen.round and action.round.broken != seen.round.broken:
        return decide(dataclasses.replace(seen, round=action.round), rules, planner, now_s)
    return action


def told(seen: View) -> Breakage | None:
    """What the leader tells of the round before anything else, if it does."""
    action = decide(seen, RULES, every_slot, 100.0)
    return action.round.broken if isinstance(action, Propose) and action.round.generation == 1 else None


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
        seen = view((dataclasses.replace(a, status=Status.STOPPING, reason="b lost"), c), round_of("a", "b", "c"))
        first = told(view((a, c), seen.round))
        assert told(dataclasses.replace(seen, round=dataclasses.replace(seen.round, broken=first))) is None

    def test_a_second_loss_is_told_too(self) -> None:
        current = round_of("a", "b", "c", broken=Breakage("node b lost", graceful=False, lost=("b",)))
        assert told(view(running("a"), current)).lost == ("b", "c")

    def test_nodes_that_yielded_take_the_others_with_them(self) -> None:
        stopping = {"status": Status.STOPPING, "generation": 1, "reason": "yielded", "yielded": True}
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


class TestGrowth:
    grown = (*running("a", "b"), node("d"))

    def test_waits_for_the_cooldown_and_for_quiet(self) -> None:
        seen = view(self.grown, round_of("a", "b"), formed_s=10.0, nodes_changed_s=14.8)
        assert act(seen, now_s=15.0) == Wait("joiners wait for the cool-down", 15.3)
        action = act(seen, now_s=15.3)
        assert isinstance(action, Propose)
        assert action.round == round_of("a", "b", stop="join: d")

    def test_is_asked_for_once(self) -> None:
        assert isinstance(act(view(self.grown, round_of("a", "b", stop="join: d"))), Wait)

    def test_happens_once_all_have_yielded(self) -> None:
        yielded = tuple(dataclasses.replace(n, status=Status.READY, yielded=True) for n in running("a", "b"))
        seen = view((*yielded, node("d")), round_of("a", "b", stop="join: d"))
        broken = breakage(seen)
        assert broken is not None
        assert broken.graceful
        action = act(seen)
        assert isinstance(action, Propose)
        assert action.round.world_size == 6
        assert action.round.reason == "join: d"
        assert action.round.restarts == 0

    def test_does_not_happen_beyond_max_nodes(self) -> None:
        nodes = (*running("a", "b", "c"), node("d"))
        assert isinstance(act(view(nodes, round_of("a", "b", "c"))), Wait)

    def test_does_not_happen_for_a_mesh_that_is_no_larger(self) -> None:
        def no_six(slots, previous):
            if sum(slots) == 6:
                raise Infeasible("six ranks")

        assert isinstance(act(view(self.grown, round_of("a", "b")), planner=no_six), Wait)

    def test_waits_until_all_have_joined(self) -> None:
        a, b = running("a", "b")
        late = dataclasses.replace(b, generation=0, status=Status.READY)
        seen = view((a, late, node("d")), round_of("a", "b"))
        assert act(seen, now_s=1.0) == Wait("b still joins", 60.0)
        assert act(seen, now_s=60.0) == Evict("b", "did not join generation 1 within 60 s")

    def test_a_loss_while_yielding_is_not_graceful(self) -> None:
        a, _ = running("a", "b")
        seen = view((a,), round_of("a", "b", stop="join: d"), departed={"b": "lost: its lease ended"})
        broken = breakage(seen)
        assert broken is not None
        assert not broken.graceful


class TestEnd:
    def test_all_done_is_success(self) -> None:
        done = tuple(dataclasses.replace(n, status=Status.DONE) for n in running("a", "b"))
        action = act(view(done, round_of("a", "b")))
        assert isinstance(action, Propose)
        assert action.round.outcome == SUCCEEDED

    def test_some_done_is_not(self) -> None:
        a, b = running("a", "b")
        nodes = (dataclasses.replace(a, status=Status.DONE), b, node("d"))
        assert act(view(nodes, round_of("a", "b"))) == Wait("the job is about to finish")

    def test_a_closed_job_stays_closed(self) -> None:
        assert isinstance(act(view((node("a"), node("b")), round_of("a", "b", outcome=SUCCEEDED))), Wait)

    def test_a_draining_node_makes_all_stop_at_a_boundary(self) -> None:
        a, b = running("a", "b")
        action = act(view((a, dataclasses.replace(b, draining=True)), round_of("a", "b")))
        assert isinstance(action, Propose)
        assert action.round.stop == "drain: b"


class TestDrain:
    """A node that left on a drain; `b` and `c` go on without it."""

    left = view(
        tuple(dataclasses.replace(n, status=Status.READY, yielded=True) for n in running("b", "c")),
        round_of("a", "b", "c", stop="drain: a"),
        departed={"a": LEFT},
        drained_s=10.0,
    )

    def test_the_others_wait_a_moment_for_more_that_drain(self) -> None:
        assert act(self.left, now_s=10.2) == Wait("more nodes may drain", 10.5)
        action = act(self.left, now_s=10.5)
        assert isinstance(action, Propose)
        assert [p.node_id for p in action.round.participants] == ["b", "c"]

    def test_no_round_is_formed_of_nodes_that_drain_too(self) -> None:
        nodes = tuple(dataclasses.replace(n, draining=True) for n in self.left.nodes)
        assert isinstance(act(dataclasses.replace(self.left, nodes=nodes), now_s=20.0), Wait)

    @pytest.mark.parametrize(
        ("how", "yielded", "graceful"),
        [(LEFT, True, True), (LEFT_AT_ONCE, True, False), ("lost: its lease ended", True, False), (LEFT, False, False)],
    )
    @pytest.mark.parametrize("stop", ["", "drain: a"])
    def test_workers_may_finish_their_step_if_all_that_stopped_did_so_at_one(
        self, how: str, yielded: bool, graceful: bool, stop: str
    ) -> None:
        """Whether or not the leader has come to ask for it: ranks agree on a boundary among themselves."""
        stopping = dataclasses.replace(running("c")[0], yielded=yielded, draining=True, status=Status.STOPPING)
        seen = view((*running("b"), stopping), round_of("a", "b", "c", stop=stop), departed={"a": how})
        broken = breakage(seen)
        assert broken is not None
        assert broken.graceful is graceful


class TestFormation:
    def test_slots_the_plan_leaves_idle_get_no_worker(self) -> None:
        def five(slots, previous):
            return MeshPlan(1, 5, 1, sum(slots) - 5, 1, 1)

        formed = form(
            [node("a"), node("b"), node("c")], (), None, five, min_nodes=RULES.min_nodes, max_nodes=RULES.max_nodes
        )
        assert formed is not None
        assert [(p.node_id, p.slots) for p in formed.participants] == [("a", 2), ("b", 2), ("c", 1)]

    def test_the_newest_are_left_out_where_there_is_no_mesh(self) -> None:
        def four(slots, previous):
            if sum(slots) != 4:
                raise Infeasible("only four")

        formed = form(
            [node("a"), node("b"), node("c")], ("c",), None, four, min_nodes=RULES.min_nodes, max_nodes=RULES.max_nodes
        )
        assert formed is not None
        assert [p.node_id for p in formed.participants] == ["c", "a"]
        assert formed.spares == ("b",)

    def test_an_infeasible_world_forms_nothing(self) -> None:
        def never(slots, previous):
            raise Infeasible("never")

        assert form([node("a"), node("b")], (), None, never, **LIMITS) is None
        assert isinstance(act(view((node("a"), node("b"), node("c"))), planner=never), Wait)

    def test_newcomers_go_beside_their_host_then_their_zone(self) -> None:
        old = [node("a", zone="1"), node("b", zone="2"), node("c", zone="1", host="h")]
        new = [node("x", zone="2"), node("y", zone="9"), node("z", host="h")]
        ordered = rank_order([*new, *old], ["c", "b", "a"])
        assert [n.node_id for n in ordered] == ["c", "z", "b", "x", "a", "y"]

    @given(st.permutations("abcdefgh"), st.integers(1, 8), st.data())
    def test_survivors_keep_their_order(self, names: list[str], keep: int, data: st.DataObject) -> None:
        survivors = set(data.draw(st.permutations(names))[:keep])
        new = [node(name) for name in "uvw"]
        ordered = rank_order([*(node(n) for n in survivors), *new], names)
        kept = [n.node_id for n in ordered if n.node_id in survivors]
        assert kept == [name for name in names if name in survivors]
        assert len(ordered) == len(survivors) + 3


@pytest.mark.parametrize("failure", [None, FAILURE])
def test_records_survive_the_store(failure: Failure | None) -> None:
    record = node("a", 7, status=Status.STOPPING, generation=3, draining=True, failure=failure, zone="z")
    assert Node.from_json(record.to_json(), 7) == record
    current = round_of("a", "b", mesh=MeshPlan(1, 2, 2, 0, 1, 1), spares=("c",), stop="join: c")
    assert Round.from_json(current.to_json()) == current


def test_versions_of_a_generation_share_their_participants() -> None:
    """Those of another generation or another job are read anew."""
    first, other = round_of("a", "b"), round_of("c")
    complete = dataclasses.replace(first, complete=True)
    assert Round.from_json(complete.to_json(), first) == complete
    assert Round.from_json(complete.to_json(), first).participants is first.participants
    later = dataclasses.replace(other, generation=first.generation + 1)
    assert Round.from_json(later.to_json(), first) == later
    elsewhere = dataclasses.replace(other, lineage="another")
    assert Round.from_json(elsewhere.to_json(), first) == elsewhere
