"""The reshard matrix: a Mixture-of-Experts model with its AdamW state, saved under some meshes, loaded under others."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.rounds.mesh import MeshPlan
from tests import sample
from tests.ranks import Ranks
from tests.storage import moe_cases as cases


def mesh(replicate: int = 1, shard: int = 1, expert: int = 1) -> MeshPlan:
    return MeshPlan(replicate=replicate, shard=shard, expert=expert, idle=0, micro_batch=1, rounds=1)


SAVED = {
    "FS2xEP2": (cases.EVEN, mesh(shard=2, expert=2)),
    "EP4": (cases.EVEN, mesh(expert=4)),  # 2, 2, 2 and no expert
    "R2xFS2": (cases.EVEN, mesh(replicate=2, shard=2)),
    "uneven FS2xEP2": (cases.UNEVEN, mesh(shard=2, expert=2)),
}
LOADED = {
    "1": mesh(),
    "FS2": mesh(shard=2),
    "EP2": mesh(expert=2),
    "R2": mesh(replicate=2),
    "EP3": mesh(expert=3),
    "FS2xEP2": mesh(shard=2, expert=2),
    "FS3": mesh(shard=3),
}


@pytest.mark.slow
def test_every_mesh_loads_what_every_mesh_saved_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """In the suite each of two that saved, so that some meshes have together loaded all of them."""
    urls = {}
    for source, (config, plan) in SAVED.items():
        urls[source] = (str(tmp_path / source.replace(" ", "-")), config)
        assert not any(ranks.run(cases.save, urls[source][0], config, plan, world_size=plan.world_size))
    for number, (target, plan) in enumerate(LOADED.items()):
        # the other readers share DCP's planner with ours: two meshes show that the formats are the same
        readers = cases.READERS if target in ("1", "FS2xEP2") else ("ours",)
        sources = {source: urls[source] for source in sample.turn(list(SAVED), number, 2)}
        for found in ranks.run(cases.load, sources, plan, readers, world_size=plan.world_size):
            assert len(found) == len(readers) * len(sources)
            for case, wrong in found.items():
                assert not wrong, f"{case} -> {target}"
