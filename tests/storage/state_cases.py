"""What every rank does in the tests of states."""

from __future__ import annotations

import shutil
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from storage import Checkpointer
from tests.storage.states import Draw, fresh, plain, same


def _mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def save_draws(folder: str, seeds: list[int]) -> list[str]:
    """Save the states of these seeds, a run each; for each "" or why it was refused."""
    mesh, found = _mesh(), []
    for seed in seeds:
        state = Draw(seed, dist.get_rank(), mesh).state()
        with Checkpointer(f"{folder}/{seed}") as checkpointer:
            try:
                checkpointer.save(1, state)
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            else:
                found.append("" if checkpointer.wait() else "not committed")
    return found


def restore_draws(folder: str, seeds: list[int], num_saved: int) -> list[str]:
    """Restore them into fresh states; for each "" or what is wrong."""
    mesh, rank, found = _mesh(), dist.get_rank(), []
    for seed in seeds:
        # of a rank of its own that did not save nothing is known
        expected = Draw(seed, rank, mesh).state()
        state = fresh(expected, seed)
        own = {key for key, part in expected.items() if type(part).__name__ == "PerRank" and rank >= num_saved}
        before = {key: plain(state[key]) for key in own}
        try:
            with Checkpointer(f"{folder}/{seed}") as checkpointer:
                step = checkpointer.restore(state)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
            continue
        wrong = [
            f"{key}: {plain(state[key])} is not {wanted}"
            for key, wanted in ((key, before.get(key, plain(expected[key]))) for key in expected)
            if not same(plain(state[key]), wanted)
        ]
        found.append("; ".join(wrong) if step == 1 else f"step {step}")
    dist.barrier()
    if rank == 0:
        for seed in seeds:
            shutil.rmtree(f"{folder}/{seed}", ignore_errors=True)
    return found
