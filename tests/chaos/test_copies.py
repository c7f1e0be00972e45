"""Nodes are lost that nobody has replicas of: the job goes on from copies in memory, and from the store without them.

Real agents, workers and services, and an S3 server that is stopped. What ranks hold after a restore is compared bit by
bit with what others have written down when it was saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.chaos.job import freeze
from tests.cluster import Cluster, Node, until
from tests.s3 import S3Server, moto_server

SCRIPT = str(Path(__file__).parent / "scripts" / "sharded.py")
STORED_AT, HELD_AT, LAST = 4, 8, 9
"""The steps that the store and memory have last, and after which all ranks wait."""
State = dict[str, torch.Tensor]

pytestmark = pytest.mark.slow


class Sharded(Cluster):
    """Nodes of one worker each that train a model in shards."""

    def __init__(self, folder: Path, server: S3Server) -> None:
        super().__init__(folder)
        self.environment |= server.environment
        self.url = server.url("run")
        self.states = folder / "states"
        self.states.mkdir()
        self.go_to(LAST)

    def go_to(self, step: int) -> None:
        """Let them train up to that step."""
        (self.states / "limit.tmp").write_text(str(step))
        (self.states / "limit.tmp").rename(self.states / "limit")

    def nodes(self, names: str) -> dict[str, Node]:
        """One of each name, in one round."""
        found = {}
        for name in names:
            conf = "last_call=60,lease_ttl=30"
            script = (SCRIPT, str(self.states), self.url, str(STORED_AT))
            found[name] = self.start(name, *script, nnodes=f"1:{len(names)}", conf=conf)
            until(f"{name} has joined", lambda: len(self.events("node_joined")) == len(found))
        return found

    def newest(self, what: str, world_size: int) -> tuple[int, int] | None:
        """Generation and step of the newest state that all ranks of a world of that size have written down."""
        found = Counter(tuple(path.name.split("-")[1:3]) for path in self.states.glob(f"{what}-*-{world_size}"))
        whole = [(int(generation), int(step)) for (step, generation), num in found.items() if num == world_size]
        return max(whole, default=None)

    def state(self, what: str, step: int, generation: int, world_size: int) -> State:
        """All of a state that was written down."""
        name = f"{what}-{step}-{generation}"
        parts = [torch.load(self.states / f"{name}-{rank}-{world_size}") for rank in range(world_size)]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name.startswith("shard ")}
        return {**parts[0], **found}

    def await_copies(self, generation: int, world_size: int) -> None:
        """Wait until the part of each rank is on two nodes."""

        def copied() -> bool:
            told = self.events("checkpoint_copied", generation=generation, step=HELD_AT)
            return {event["of_rank"] for event in told} == set(range(world_size))

        until(f"copies of all {world_size} parts", copied)
        until("the last step", lambda: self.newest("after", world_size) == (generation, LAST))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    (tmp_path / "moto").mkdir()
    with moto_server(tmp_path / "moto") as made:
        yield made


@pytest.fixture
def job(tmp_path: Path, server: S3Server) -> Iterator[Sharded]:
    (tmp_path / "job").mkdir()
    made = Sharded(tmp_path / "job", server)
    try:
        yield made
    finally:
        made.end()


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_with_both_copies_lost_the_stores_state_is_taken_and_without_a_store_the_copies(
    job: Sharded, server: S3Server
) -> None:
    """Of five nodes two are killed at once that alone held a part; of the three left one, while S3 is away."""
    nodes = job.nodes("abcde")
    job.await_copies(1, 5)
    for name in "bc":
        freeze(nodes[name])
    for name in "bc":
        nodes[name].kill()
    generation, step = until("three go on", lambda: job.newest("restored", 3))
    assert step == STORED_AT
    assert is_same(job.state("restored", step, generation, 3), job.state("after", step, 1, 5))
    told = {event["reason"] for event in job.events("checkpoint_held_in_part", step=HELD_AT)}
    assert "nobody holds the part of rank 1" in told, "it says why it goes back so far"

    job.await_copies(generation, 3)
    server.stop()
    nodes["d"].kill()
    alone, step = until("two go on", lambda: job.newest("restored", 2))
    assert LAST - step <= LAST - HELD_AT, "not more than since the last save"
    assert is_same(job.state("restored", step, alone, 2), job.state("after", step, generation, 3))
    restored = job.events("restored", generation=alone)
    assert len(restored) == 2 and not any("from_store" in event for event in restored)
    for told_beside in ("checkpoint_store_unasked", "checkpoint_claimed_later"):
        job.wait_event(told_beside, generation=alone)
    job.go_to(13)
    until("the training goes on", lambda: job.newest("after", 2) == (alone, 13))
    assert not job.events("checkpoint_committed", step=10), "there is no store"
