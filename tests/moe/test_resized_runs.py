"""Runs through resizes, drawn at random: `RESIZED_RUNS=200 pytest tests/moe/test_resized_runs.py`; the suite has two.

Every way to keep loads level, one to three experts a token, experts and widths that nothing divides, on random meshes.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.config import JobConfig
from elastic_moe.trainer.world import check_plan
from launcher import placement_obstacle
from launcher.rounds.mesh import MeshPlan
from tests.moe.cases import SMALL, fitted
from tests.moe.test_training import different, job, run_legs, whole_curve
from tests.ranks import Ranks

NUM_RUNS = int(os.environ.get("RESIZED_RUNS", "1"))
WORLDS = [(4, 3, 2, 4), (8, 5)]
BALANCES = ["sequence", "global", "bias", "quantile", "forced", "none"]


def drawn_job(draw: random.Random, seed: int, *, exact: bool) -> JobConfig:
    """Seeds take balancings in turn; of the rest everything is drawn."""
    balance = BALANCES[seed % len(BALANCES)]
    widths = [32, 64, 96, 160] if exact else [16, 18, 20, 50, 64, 72]
    heads = draw.choice([(1, 1), (2, 1), (4, 2)])
    num_experts, top_k = draw.choice([3, 4, 5, 6, 7, 8]), draw.choice([1, 2, 3])
    model: dict[str, Any] = {
        "balance": balance,
        "top_k": top_k,
        "num_experts": num_experts,
        "dim": draw.choice(widths),
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": draw.choice([6, 8, 10]),
        "expert_dim": draw.choice(widths),
        "shared_expert_dim": draw.choice([0, draw.choice(widths)]),
        "score": draw.choice(["softmax", "sigmoid"]),
        "route_scale": draw.choice([1.0, 2.5]),
    }
    if balance != "quantile" and num_experts % 2 == 0 and top_k <= num_experts // 2 and draw.random() < 0.4:
        model |= {"num_groups": 2, "top_groups": draw.choice([1, 2])}
    train = {
        "exact": exact,
        "steps": 4,
        "global_batch": draw.choice([3, 5, 8]),
        "seq_len": draw.choice([7, 16]),
        "recompute": draw.random() < 0.3,
        "keep_gathered": draw.random() < 0.3,
    }
    if not exact:
        train["max_micro_batch"] = draw.choice([1, 2, 3])
    return job(train, SMALL.model_validate(SMALL.model_dump() | model | {"vocab_size": 256}).model_dump())


def drawn_plan(what: JobConfig, world_size: int, draw: random.Random) -> MeshPlan:
    widths = (what.model.dim, what.model.expert_dim)
    degrees = [
        (replicate, world_size // (replicate * expert), expert)
        for replicate in range(1, world_size + 1)
        for expert in range(1, world_size // replicate + 1)
        if world_size % (replicate * expert) == 0
        and not placement_obstacle(
            what.model.num_experts, widths, expert=expert, shard=world_size // (replicate * expert)
        )
    ]
    plan = fitted(what, *draw.choice(degrees))
    check_plan(plan, what, world_size)
    return plan


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "normal"])
@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_a_run_through_resizes_is_that_of_one_process(ranks: Ranks, tmp_path: Path, seed: int, exact: bool) -> None:
    """Exact mode to the last bit of every weight, the other within a millionth of every loss."""
    draw = random.Random(f"{seed} {exact}")
    what = drawn_job(draw, seed, exact=exact)
    plans = [drawn_plan(what, world_size, draw) for world_size in WORLDS[seed % len(WORLDS)]]
    print(what.model, what.train, *plans, sep="\n")
    resized = run_legs(ranks, what, plans, tmp_path / "resized")
    (alone,) = run_legs(ranks, what, [fitted(what)], tmp_path / "alone")
    assert len(set(alone.losses)) == what.train.steps
    assert whole_curve(resized) == pytest.approx(alone.losses, rel=1e-14 if exact else 1e-6)
    if exact:
        assert not different(resized[-1], alone)
