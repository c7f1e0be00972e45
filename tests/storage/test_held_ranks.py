"""Ranks of several nodes, each a process: copies to buddies, a lost node, and a restore on fewer or more ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from storage.arena.slot import Slot
from storage.events import Reporter
from storage.held.node_memory import NodeIdentity, NodeMemory
from storage.held.peer_server import CopyRules
from storage.held.rate import RateLimit
from storage.loading.memory_tier import MemoryAccess
from storage.loading.restorer import Restorer
from storage.ranks.agreement import AgreeingGroup
from storage.state.wants import Ignored
from storage.stores.registry import open_store
from tests.ranks import Ranks
from tests.storage.held_cases import COLUMNS, LINEAGE, ROWS, RUN, Staged, in_shared_memory, whole

WAIT_S = 60.0
COPIES = CopyRules(Slot.create, 1 << 30)

_memory: list[NodeMemory] = []
"""Of this process, which stands for a node with one rank: it outlives the world that it is part of."""


def access(group: AgreeingGroup, local: NodeMemory | None) -> MemoryAccess:
    return MemoryAccess(local, RUN, LINEAGE, group)


def silent(*_: Any, **__: Any) -> None:
    """Hear nothing."""


def stage(step: int, attempt: str) -> None:
    """Each rank's node holds its part, and has copied it to its buddy."""
    group = AgreeingGroup()
    while _memory:
        _memory.pop().close()
    memory = NodeMemory(COPIES, RateLimit(None), silent)
    memory.start(NodeIdentity(f"n{group.rank}", f"h{group.rank}"))
    _memory.append(memory)
    access(group, memory).meet(Reporter(None))
    memory.add(in_shared_memory(Staged(step, group.world_size, id=attempt).part(group.rank)))
    assert memory.copied(WAIT_S)
    dist.barrier()


def forget() -> None:
    """The node is lost; or the test is over."""
    while _memory:
        _memory.pop().close()


def resume(url: str, world_before: int, has_memory: bool) -> tuple[int, bool, dict[str, Any], list[str]]:
    """Restore what `world_before` ranks had, in rows over as many ranks as there are now."""
    group, told = AgreeingGroup(), list[tuple[str, dict[str, Any]]]()
    mesh = init_device_mesh("cpu", (group.world_size,))
    expected = whole(30, world_before)
    state: dict[str, Any] = {"n": -1, "w": distribute_tensor(torch.zeros_like(expected), mesh, [Shard(0)])}
    report = Reporter(lambda event, fields: told.append((str(event), fields)))
    memory = access(group, _memory[0] if has_memory and _memory else None)
    with open_store(url) as store:
        step = Restorer(store, None, group, report, memory).restore(state, strict=True, ignored=Ignored(()))
    same = torch.equal(state["w"].full_tensor(), expected) and state["n"] == 30
    return step, same, dict(told)["restored"], [event for event, _ in told]


def test_of_three_nodes_one_is_lost_and_the_other_two_go_on_from_memory(ranks: Ranks, tmp_path: Any) -> None:
    ranks.run(stage, 30, "abcdef0123", world_size=3)
    try:
        found = ranks.run(resume, str(tmp_path), 3, True, world_size=2)  # the third's memory is not asked
    finally:
        ranks.run(forget, world_size=3)
    assert [(step, same) for step, same, _, _ in found] == [(30, True)] * 2
    assert all("from_store" not in fields and set(events) == {"restored"} for _, _, fields, events in found)
    needed = 3 * ROWS * COLUMNS * 4
    near = [num for _, _, fields, _ in found for name, num in fields.items() if name.startswith("from_")]
    assert sum(near) >= needed


def on_joiner(url: str) -> tuple[int, bool, dict[str, Any], list[str]]:
    """Ranks 0 and 1 have memory, and rank 2 has just come."""
    group = AgreeingGroup()
    if group.rank == 2:
        forget()
        memory = NodeMemory(COPIES, RateLimit(None), silent)
        memory.start(NodeIdentity("fresh", "h9"))
        _memory.append(memory)
    return resume(url, 2, True)


def test_a_rank_that_joins_gets_its_state_from_the_memory_of_the_others(ranks: Ranks, tmp_path: Any) -> None:
    ranks.run(stage, 30, "abcdef0124", world_size=2)
    try:
        found = ranks.run(on_joiner, str(tmp_path), world_size=3)
    finally:
        ranks.run(forget, world_size=3)
    assert [(step, same) for step, same, _, _ in found] == [(30, True)] * 3
    assert all("from_store" not in fields for _, _, fields, _ in found)
    assert "from_own" not in found[2][2]


def test_ranks_without_memory_take_part(ranks: Ranks, tmp_path: Any) -> None:
    found = ranks.run(on_empty, str(tmp_path), world_size=2)
    assert found == [0, 0]


def on_empty(url: str) -> int:
    group = AgreeingGroup()
    memory = NodeMemory(COPIES, RateLimit(None), silent) if group.rank == 1 else None
    if memory is not None:
        memory.start(NodeIdentity("n1", "h1"))
    state: dict[str, Any] = {"n": -1}
    try:
        with open_store(url) as store:
            restorer = Restorer(store, None, group, Reporter(None), access(group, memory))
            return restorer.restore(state, strict=True, ignored=Ignored(()))
    finally:
        if memory is not None:
            memory.close()
