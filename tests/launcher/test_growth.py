"""What the leader decides when nodes join, leave on a drain or finish: who is taken in, and when."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.rounds.membership import Evict, Propose, Wait, breakage
from launcher.rounds.mesh import Infeasible
from launcher.rounds.records import (
    LEFT,
    LEFT_AT_ONCE,
    SUCCEEDED,
    Status,
)
from tests.launcher.situations import act, node, round_of, running, view


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
