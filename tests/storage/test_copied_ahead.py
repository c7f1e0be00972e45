"""A save is copied while the other ranks' words are on their way, and is not saved where they say otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from storage import Checkpointer, Fenced
from storage.arena.stager import Stager
from storage.saving import consensus
from storage.saving.proposal import Decision, decide
from tests.storage.small_runs import Events, state, states


class Watched:
    """Notes in which order a save copies and its ranks meet; `decisions` replace what they decide."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.decisions: list[Decision | Exception] = []
        stage = Stager.stage

        def staged(stager: Stager, *given: Any) -> Any:
            self.order.append("copy")
            return stage(stager, *given)

        def decided(proposals: Any) -> Decision:
            self.order.append("meet")
            found = self.decisions.pop(0) if self.decisions else decide(proposals)
            if isinstance(found, Exception):
                raise found
            return found

        patch.setattr(Stager, "stage", staged)
        patch.setattr(consensus, "decide", decided)

    def taken(self) -> list[str]:
        """What has happened since the last time."""
        found, self.order = self.order, []
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_a_state_of_another_shape_is_copied_once_all_have_met(memory_url: str, watched: Watched) -> None:
    small = {"w": torch.ones(3), "n": 1}
    with Checkpointer(memory_url, keep=9) as ckpt:
        for number, value in enumerate((state(1), state(2), small, small)):
            ckpt.save(number, value)
            is_new = number in (0, 2)
            assert watched.taken() == (["meet", "copy"] if is_new else ["copy", "meet"])
    assert [step for step, _ in states(memory_url)] == [3, 2, 1, 0]


@pytest.mark.parametrize("staging", ["sync", "overlapped"])
def test_what_another_rank_leaves_out_is_copied_once_for_nothing_and_not_again(
    staging: Any, memory_url: str, watched: Watched, events: Events
) -> None:
    layer = torch.nn.Linear(30, 30)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with Checkpointer(memory_url, keep=9, backlog="skip", staging=staging, on_event=events[1]) as ckpt:
        arena = ckpt._savers()[0]._arena
        orders = []
        for step in range(6):
            layer(torch.ones(30)).sum().backward()
            optimizer.step()
            if step in (2, 3):
                watched.decisions = [Decision(step, "rank 1: no memory")]
            ckpt.save(step, {"m": layer})
            orders.append(watched.taken())
            if step in (2, 3):
                assert arena.num_free == 2
            assert ckpt.wait()
        late, ahead = ["meet", "copy"], ["copy", "meet"]
        assert orders == [late, ahead, ahead, ["meet"], late, ahead]
        assert arena.num_free == 2
    assert [step for step, _ in states(memory_url)] == [5, 4, 1, 0]
    told = [event for event, _ in events[0]]
    assert told.count("checkpoint_skipped") == 2
    assert "checkpoint_state_changed" not in told


def test_what_cannot_be_saved_leaves_its_memory_free(memory_url: str, watched: Watched) -> None:
    with Checkpointer(memory_url) as ckpt:
        ckpt.save(1, state(1), wait=True)
        watched.decisions = [Fenced("somebody else has it")]
        with pytest.raises(Fenced, match="somebody else"):
            ckpt.save(2, state(2))
        assert watched.taken() == ["meet", "copy", "copy", "meet"]
        assert ckpt._savers()[0]._arena.num_free == 2
        ckpt.save(3, state(3), wait=True)
    assert [step for step, _ in states(memory_url)] == [3, 1]


def test_what_is_saved_already_is_not_copied_for_nothing(memory_url: str, watched: Watched) -> None:
    with Checkpointer(memory_url) as ckpt:
        for step in (1, 2, 2):
            watched.taken()
            ckpt.save(step, state(step), wait=True)
        assert watched.taken() == ["meet"]


def test_where_ranks_plan_anew_the_copy_is_made_again(memory_url: str, watched: Watched) -> None:
    with Checkpointer(memory_url, keep=9) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(step), wait=True)
        attempts: list[str] = []

        def plans(proposals: Any) -> Decision:
            watched.order.append("meet")
            attempts.append(proposals[0].attempt)
            return Decision(3, attempt=proposals[0].attempt, plan=True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(consensus, "decide", plans)
            watched.taken()
            ckpt.save(3, state(3), wait=True)
        assert watched.taken() == ["copy", "meet", "copy"]
        assert ckpt._savers()[0]._arena.num_free == 2
        found = state(0)
        assert ckpt.restore(found) == 3
        assert torch.equal(found["w"], state(3)["w"])
