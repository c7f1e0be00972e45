"""What the ranks of `test_dcp` do; functions by name, because they run in other processes."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from storage import Checkpointer, ShardReader, ShardWriter
from storage.errors import UsageError

SHOULD_NOT_WAIT_S = 100.0
"""Less than a collective takes to give up that waits for a rank which does not come; a busy machine takes its time."""


def state(number: int) -> dict[str, Any]:
    return {"w": torch.full((300,), float(number)), "n": number}


def loaded(url: str, **told: Any) -> int:
    """What a reader that was told nothing reads."""
    found = state(0)
    dcp.load(found, storage_reader=ShardReader(url), **told)
    assert (found["w"] == found["n"]).all()
    return int(found["n"])


def load_by_some(url: str) -> list[int]:
    """Reads in which not all ranks take part, none of which waits for those that do not; what each gave this rank."""
    rank, found, started_s = dist.get_rank(), [], time.monotonic()
    some = dist.new_group([1, 2])
    own = [dist.new_group([each]) for each in range(3)][rank]
    if rank == 0:
        dcp.save(state(7), storage_writer=ShardWriter(url), no_dist=True)
    dist.barrier()
    found.append(loaded(url, no_dist=True))
    if rank == 1:
        found.append(loaded(url, no_dist=True))
        assert sorted(ShardReader(url).read_metadata().state_dict_metadata) == ["n", "w"]  # as scripts look into one
    if rank > 0:
        found.append(loaded(url, process_group=some))
        found.append(loaded(url, process_group=own))
    found.append(loaded(url))
    dist.barrier()
    assert time.monotonic() - started_s < SHOULD_NOT_WAIT_S
    return found


def save_by_some(url: str) -> tuple[int, int, str]:
    """What two of three ranks have saved, as all read it; what one of them has; what is said to a save without DCP's
    collectives.
    """
    rank, some = dist.get_rank(), dist.new_group([1, 2])
    if rank > 0:
        dcp.save({f"w{rank}": torch.ones(5), "n": 2}, storage_writer=ShardWriter(f"{url}/some"), process_group=some)
    if rank == 2:
        dcp.save(state(1), storage_writer=ShardWriter(f"{url}/one"), no_dist=True)
    dist.barrier()
    both: dict[str, Any] = {"w1": torch.zeros(5), "w2": torch.zeros(5), "n": 0}
    dcp.load(both, storage_reader=ShardReader(f"{url}/some"))
    assert both["w1"].sum() + both["w2"].sum() == 10
    try:
        dcp.save(state(1), storage_writer=ShardWriter(f"{url}/none"), use_collectives=False)
    except UsageError as error:
        return both["n"], loaded(f"{url}/one"), str(error)
    return both["n"], loaded(f"{url}/one"), "nothing"


def save_unlike_steps(url: str) -> list[str]:
    """What a save says on this rank where another gives no step, or another one."""
    said = []
    with Checkpointer(url) as ckpt:
        for step in (True if dist.get_rank() == 1 else 3, 3 + dist.get_rank()):
            try:
                ckpt.save(step, state(3))
            except UsageError as error:
                said.append(str(error))
        ckpt.save(5, state(5), wait=True)
        assert ckpt.wait()
    return said


def save_with_kept_plans(url: str) -> None:
    """Twice with plans that DCP keeps from save to save; the second time to another folder and over the first."""
    rank = dist.get_rank()
    for number, name in ((1, "first"), (2, "second"), (3, "first")):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        mine = {f"w{rank}": torch.full((9,), float(number)), "n": number}
        if number == 3 and rank == 1:
            mine["more"] = torch.ones(3)  # so that this rank's plan is a new one, and the other's is not
        dcp.save(mine, storage_writer=ShardWriter(f"{url}/{name}", overwrite=True), planner=planner)
