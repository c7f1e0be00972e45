"""Runs through worlds that are killed, exact and other: `KILLED_RUNS=30 pytest tests/moe/test_killed_runs.py`; one of
each kind as it is is in `test_train.py`."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic_moe.config import JobConfig
from elastic_moe.parallel import build_mesh, gather_full
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.state import training_state
from launcher import placement_obstacle
from launcher.rounds.mesh import MeshPlan
from storage import Checkpointer
from tests.moe.cases import fitted
from tests.moe.test_train import World, job
from tests.ranks import Ranks

NUM_RUNS = int(os.environ.get("KILLED_RUNS", "0"))
STEPS = 60
WORLDS = [(4, 3, 2, 4), (8, 5)]
BALANCES = ["sequence", "global", "bias", "quantile", "forced", "none"]


def drawn_job(folder: Path, draw: random.Random, seed: int, *, exact: bool) -> JobConfig:
    model = {
        "balance": BALANCES[seed % len(BALANCES)],
        "top_k": draw.choice([1, 2, 3]),
        "num_experts": draw.choice([5, 6, 7, 8]),
        "dim": draw.choice([32, 64, 96]),
        "expert_dim": draw.choice([32, 64, 160]),
        "shared_expert_dim": draw.choice([0, 32]),
        "score": draw.choice(["softmax", "sigmoid"]),
    }
    what = job(folder, steps=STEPS, exact=exact)
    return what.model_copy(update={"model": what.model.model_validate(what.model.model_dump() | model)})


def drawn_plan(what: JobConfig, world_size: int, draw: random.Random) -> MeshPlan:
    widths = (what.model.dim, what.model.expert_dim)
    degrees = [
        (replicate, shard, expert)
        for replicate in range(1, world_size + 1)
        for shard in range(1, world_size + 1)
        for expert in range(1, world_size + 1)
        if replicate * shard * expert == world_size
        and not placement_obstacle(what.model.num_experts, widths, expert=expert, shard=shard)
    ]
    return fitted(what, *draw.choice(degrees))


def last_weights(what: JobConfig, plan: MeshPlan) -> dict[str, Tensor]:
    stepper, progress = set_up(what, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    state = training_state(stepper.model, stepper.optimizer, progress)
    with Checkpointer(str(what.checkpoint.url)) as ckpt:
        assert ckpt.restore(state) == STEPS
    moments = {f"second moment of {name}": tensor for name, tensor in state["optim"]["exp_avg_sq"].items()}
    return gather_full({**state["model"], **moments})


def losses(folder: Path) -> dict[int, float]:
    """By step, as it was done last."""
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in told}


@pytest.mark.skipif(not NUM_RUNS, reason="KILLED_RUNS is not set")
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "normal"])
@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_a_run_of_killed_worlds_is_that_of_one_process(ranks: Ranks, tmp_path: Path, seed: int, exact: bool) -> None:
    """Exact mode to the last bit of weights and moments, the other within a millionth of each loss."""
    draw = random.Random(seed)
    worlds = WORLDS[seed % len(WORLDS)]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    broken.mkdir()
    unbroken.mkdir()
    what = drawn_job(broken, draw, seed, exact=exact)
    for generation, world_size in enumerate(worlds, start=1):
        with World(broken, what, drawn_plan(what, world_size, draw), generation) as world:
            if generation < len(worlds):
                world.reach(STEPS // len(worlds) * generation - 3)  # and all its processes are killed
            else:
                assert world.exit_codes() == [0] * world_size
    alone = drawn_job(unbroken, random.Random(seed), seed, exact=exact)
    with World(unbroken, alone, fitted(alone), generation=1) as world:
        assert world.exit_codes() == [0]
    assert losses(broken) == pytest.approx(losses(unbroken), rel=1e-14 if exact else 1e-6)
    if exact:
        (got,), (expected,) = (ranks.run(last_weights, each, fitted(each), world_size=1) for each in (what, alone))
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
