"""Which nodes form a round and in what order, and what of it the store keeps."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.rounds.formation import form, rank_order
from launcher.rounds.membership import Wait
from launcher.rounds.mesh import Infeasible, MeshPlan
from launcher.rounds.records import (
    Failure,
    Node,
    Round,
    Status,
)
from tests.launcher.situations import FAILURE, LIMITS, RULES, act, node, round_of, view


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
