"""What each rank has of its own in a live state, once ranks are lost: the others go on with theirs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from storage import PerRank
from storage.errors import Corrupt
from storage.events import Reporter
from storage.held.choice import join
from storage.held.inventory import HeldObject, HeldPart
from storage.live.state import LivePart, LiveState
from storage.loading.restorer import Restorer
from storage.ranks.agreement import AgreeingGroup
from storage.saving.writing import Payload
from storage.service.capturing import part_of
from storage.service.live_messages import KeepLive
from storage.service.messages import Identity, StagedAttempt
from storage.service.table import HandedOver
from storage.state.wants import Ignored
from storage.stores.memory import MemoryStore
from tests.storage.held_cases import LINEAGE, RUN, Seen, Told, nodes, of
from tests.storage.small_runs import fresh_memory_url
from tests.storage.thread_ranks import Meeting, ThreadGroup

DEADLINE_S = 60.0
STEP = 7


def state_of(rank: int) -> dict[str, Any]:
    """What all ranks have, and what each has of its own: in two places, of which one is nested."""
    inner = {"seen": [rank, torch.full((2,), float(rank))], f"only {rank}": {"x": PerRank(rank)}}
    return {"w": torch.arange(6.0), "n": STEP, "rng": PerRank(torch.full((3,), float(rank))), "own": PerRank(inner)}


def live_parts(num_ranks: int) -> dict[int, HeldPart]:
    """What the services of a job's ranks hold when each has staged all that it has after a step."""
    meeting, parts = Meeting(num_ranks), dict[int, HeldPart]()

    def publish(part: LivePart) -> None:
        payloads = [
            Payload(p.chunk, p.content.clone() if isinstance(p.content, torch.Tensor) else p.content)
            for p in part.payloads
        ]
        attempt = StagedAttempt(**vars(part.attempt), rank=part.rank)
        keep = KeepLive(url=RUN, attempt=attempt, origin=Identity(generation=1, lineage=LINEAGE))
        made = part_of(keep, HandedOver(payloads, part.contents, None, ()))
        objects = {name: HeldObject([bytes(piece) for piece in held.pieces]) for name, held in made.objects.items()}
        parts[part.rank] = HeldPart(made.papers, objects)  # nodes let go of it and hold it again

    def train(rank: int) -> None:
        live = LiveState(ThreadGroup(meeting, rank), publish, Reporter(None))
        live.note(STEP, state_of(rank))
        live.capture(DEADLINE_S)
        live.close(rescue=False)

    ranks = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(DEADLINE_S)
    assert sorted(parts) == list(range(num_ranks))
    return parts


class As(AgreeingGroup):
    """The only one that restores, as if it were that rank."""

    is_coordinator = True  # type: ignore[assignment]

    def __init__(self, rank: int) -> None:
        super().__init__(alone=True)
        self.rank = rank

    def swap(self, sends: Any, receives: Any) -> None:
        """To itself, which has it."""


def restored(parts: list[HeldPart], rank: int, num_ranks: int, told: Told) -> tuple[int, dict[str, Any]]:
    """What that rank of a new job has, the parts being held by one node: the step, and the state."""
    state: dict[str, Any] = {"w": torch.zeros(6), "n": 0, "rng": PerRank(torch.zeros(3)), "own": PerRank({})}
    report = Reporter(lambda event, fields: told.append((str(event), fields)))
    with nodes(["a"]) as (a,):
        for part in parts:
            a.add(part)
        memory: Any = Seen([a], num_ranks=num_ranks)
        store = MemoryStore.named(fresh_memory_url().removeprefix("memory://"))
        step = Restorer(store, None, As(rank), report, memory).restore(state, strict=True, ignored=Ignored(()))
    return step, state


def same(found: dict[str, Any], rank: int) -> bool:
    """Whether it is the state of that rank, to the types of all that is in it."""
    expected = state_of(rank)
    own, mine = found["own"].value, expected["own"].value
    return (
        (torch.equal(found["w"], expected["w"]), found["n"]) == (True, expected["n"])
        and torch.equal(found["rng"].value, expected["rng"].value)
        and list(own) == list(mine)
        and own["seen"][0] == rank
        and torch.equal(own["seen"][1], mine["seen"][1])
        and own[f"only {rank}"]["x"].value == rank
    )


def test_who_is_left_goes_on_with_its_own_under_its_new_number() -> None:
    parts, told = live_parts(4), Told()
    left = [parts[rank] for rank in (0, 2, 3)]
    for rank, before in enumerate((0, 2, 3)):
        step, state = restored(left, rank, 3, told)
        assert (step, same(state, before)) == (STEP, True)
    fields = of(told, "per_rank_resized")[0]
    assert (fields["saved"], fields["now"], fields["gone"]) == (4, 3, [1])
    assert {"rng", "own"} <= set(fields["names"])
    step, state = restored(left, 1, 2, told)  # one more has left since: as from a store, the last ones' is left out
    assert (step, same(state, 2)) == (STEP, True)


def test_where_somebody_would_get_nothing_the_state_is_passed_over() -> None:
    parts, told = live_parts(2), Told()
    assert restored([parts[1]], 0, 2, told)[0] == 0
    (fields,) = of(told, "checkpoint_held_in_part")
    assert "('own'" in fields["reason"] and "'rng') is left of 1 of 2, and there are 2 now" in fields["reason"]
    assert restored([parts[1]], 0, 1, told)[0] == STEP


def test_with_all_ranks_there_nothing_is_renumbered_and_other_gaps_stay_gaps() -> None:
    parts = live_parts(2)
    both = join([parts[0].papers, parts[1].papers], 2)
    assert both.lost == ()
    assert {"rng.0", "rng.1"} <= set(both.manifest.tensors)
    alone = join([parts[1].papers], 1)
    assert "rng" in alone.lost
    assert "rng.0" in alone.manifest.tensors and "rng.1" not in alone.manifest.tensors
    items = parts[1].papers.receipt.items
    kept = [item for item in items.rows() if item.key != "w"]
    receipt = parts[1].papers.receipt.model_copy(update={"items": type(items).of(kept)})
    with pytest.raises(Corrupt, match="tensor 'w' has 0 of 6 elements"):
        join([parts[1].papers.model_copy(update={"receipt": receipt})], 1)
