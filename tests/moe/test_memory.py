"""What the planner counts of a rank's memory is what tensors have when they have the most."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_moe.config import mesh_spec
from launcher import MeshPlan, memory_use
from tests.bench.plan import tokens_file
from tests.bench.plan_cases import Case, a_batch, a_model
from tests.bench.plan_ranks import live_peak_of
from tests.ranks import Ranks

CASES = (
    Case("one round", a_model(256, 3, 512), a_batch(2, 64), MeshPlan(1, 1, 1, 0, 2, 1)),
    Case("two rounds", a_model(256, 3, 512), a_batch(4, 64), MeshPlan(1, 1, 1, 0, 2, 2)),
    Case("logits", a_model(128, 2, 128, 16_384), a_batch(4, 128), MeshPlan(1, 1, 1, 0, 4, 1)),
    Case("activations", a_model(128, 4, 256), a_batch(8, 256), MeshPlan(1, 1, 1, 0, 8, 1)),
    Case("again", a_model(128, 4, 256), a_batch(8, 256, recompute=True), MeshPlan(1, 1, 1, 0, 8, 1)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_live_memory(ranks: Ranks, tmp_path: Path, case: Case) -> None:
    """By torch's own account, which is the same each time: resident memory is for `make bench-plan`."""
    job = case.job(tokens_file(tmp_path))
    (live,) = ranks.run(live_peak_of, job, case.plan, world_size=1)
    use = memory_use(case.plan, mesh_spec(job))
    assert use.total - use.optimizer == pytest.approx(live, rel=0.15)
