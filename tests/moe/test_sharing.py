"""Hot experts whose rows several ranks compute: the same model, gradients and checkpoints as without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from elastic_moe.config import JobConfig
from elastic_moe.parallel import Shared, begin_round, build_mesh, clip_gradients, gather_full, init_weights, take_shared
from elastic_moe.trainer.config import TrainConfig
from elastic_moe.trainer.routing import SharingStats
from elastic_moe.trainer.setup import set_up, share_rule
from launcher import ShareRule
from launcher.rounds.mesh import MeshPlan
from tests import sample
from tests.moe.cases import SMALL, batch, build, fitted, grads, layout, objective, train_leg
from tests.ranks import Ranks

ALWAYS = ShareRule(guests=2, copy_rows=0)


class Way(NamedTuple):
    """How a step is done."""

    plan: MeshPlan
    num_experts: int = 6
    num_rounds: int = 1
    recompute: bool = False
    keep_gathered: bool = False


class Found(NamedTuple):
    """Whole gradients, their norm, each rank's loss, and what was shared in forward passes."""

    grads: dict[str, Tensor]
    norm: float
    loss: float
    shared: Shared


def skewed(way: Way, sharing: ShareRule | None) -> Found:
    """A step of a batch of which every token goes to the first expert."""
    config = SMALL.model_copy(update={"num_experts": way.num_experts})
    model, meshes = build(config, way.plan, sharing=sharing)
    model.recompute = way.recompute
    for block in model.blocks:
        block.moe.router.expert_bias[0] = 10.0
    tokens = batch(config, num_sequences=12, num_positions=16)
    parts = tokens.tensor_split(dist.get_world_size())[dist.get_rank()].tensor_split(way.num_rounds)
    total, shared = 0.0, Shared()
    for i, part in enumerate(parts):
        begin_round(model, last=i + 1 == way.num_rounds, keep_gathered=way.keep_gathered)
        take_shared(model)
        loss = objective(model, part, num_sequences=12)
        shared = shared.plus(take_shared(model))
        loss.backward()
        total += float(loss)
    norm = clip_gradients(model.parameters(), meshes, None)
    return Found(gather_full(dict(grads(model))), norm, total, shared)


WAYS = {
    "EP2": Way(layout(expert=2)),
    "EP2, 2 rounds": Way(layout(expert=2), num_rounds=2),
    "EP2, kept": Way(layout(expert=2), num_rounds=2, keep_gathered=True),
    "EP2, computed again": Way(layout(expert=2), num_rounds=2, recompute=True),
    "EP3, uneven": Way(layout(expert=3), num_experts=8),
    "EP4, a rank without experts": Way(layout(expert=4), num_experts=5, recompute=True),
    "FS2xEP2": Way(layout(shard=2, expert=2), num_rounds=2),
    "FS2xEP2, uneven": Way(layout(shard=2, expert=2), num_experts=5),
    "R2xEP2": Way(layout(replicate=2, expert=2)),
}


# What each of them is about, others below it do as well.
REST = ("EP2", "FS2xEP2", "R2xEP2")


@pytest.mark.parametrize("name", [sample.rest(name) if name in REST else name for name in WAYS])
def test_loss_and_gradients_are_those_of_the_plain_layout(ranks: Ranks, name: str) -> None:
    way = WAYS[name]
    plain = ranks.run(skewed, way, None, world_size=way.plan.world_size)
    for got, expected in zip(ranks.run(skewed, way, ALWAYS, world_size=way.plan.world_size), plain, strict=True):
        assert got.loss == pytest.approx(expected.loss, rel=1e-6)
        assert got.norm == pytest.approx(expected.norm, rel=1e-6)
        errors = {key: float((got.grads[key] - value).norm() / value.norm()) for key, value in expected.grads.items()}
        assert max(errors.values()) <= 1e-6, sorted(errors.items(), key=lambda item: -item[1])[:5]
        assert expected.shared == Shared()
        assert got.shared.copies > 0
        assert got.shared.owned_rows > 1.2 * got.shared.level_rows
        assert got.shared.busiest_rows < 1.05 * got.shared.level_rows


def job(expert_replicas: int, folder: Path, **train: object) -> JobConfig:
    text = folder / "text"
    text.write_bytes(bytes(range(32, 96)) * 40)
    return JobConfig.model_validate(
        {
            "model": SMALL.model_dump() | {"vocab_size": 128, "num_experts": 5, "balance": "bias"},
            "data": {"url": str(text), "format": "text", "validation": 0.05},
            "train": {
                "steps": 6,
                "global_batch": 6,
                "seq_len": 16,
                "max_micro_batch": 2,
                "expert_replicas": expert_replicas,
                **train,
            },
            # Links so fast that every copy pays.
            "mesh": {"flops_per_s": 1.0, "inter_node_bytes_per_s": 1e12},
        }
    )


def test_a_run_goes_on_with_and_without_on_other_meshes(ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint knows of no guest: three legs, of which the first and the last share."""
    losses = {}
    for name, replicas in {"plain": (0, 0, 0), "shared": (2, 0, 1)}.items():
        (folder := tmp_path / name).mkdir()
        jobs = [job(number, folder) for number in replicas]
        plans = [fitted(jobs[0], expert=3), fitted(jobs[1], shard=2), fitted(jobs[2], replicate=2, expert=2)]
        legs = [
            ranks.run(train_leg, each, plan, first, first + 2, folder, world_size=plan.world_size)[0]
            for each, plan, first in zip(jobs, plans, (0, 2, 4), strict=True)
        ]
        losses[name] = [loss for leg in legs for loss in leg.losses], legs[-1].weights
    assert losses["shared"][0] == pytest.approx(losses["plain"][0], rel=1e-6)
    for key, weight in losses["plain"][1].items():
        torch.testing.assert_close(losses["shared"][1][key], weight, rtol=1e-4, atol=1e-5)


def told(job: JobConfig) -> tuple[SharingStats | None, float]:
    stepper, _ = set_up(job, build_mesh(fitted(job, expert=2), "cpu"), dist.get_rank(), torch.device("cpu"))
    init_weights(stepper.model, 0)
    stepper.validate()  # what it shares is no part of the step
    result = stepper.step(0)
    return result.sharing, float(result.load_LE.sum())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed-again"])
def test_a_step_tells_what_was_shared_and_counts_it_once(ranks: Ranks, tmp_path: Path, recompute: bool) -> None:
    (stats, _), (other, _) = ranks.run(told, job(1, tmp_path, recompute=recompute), world_size=2)
    assert stats is not None
    assert stats == other
    assert 1.0 <= stats.rank_load < stats.rank_load_owned
    # Two layers, two rounds; a pass whose loads are level by chance has none.
    assert 1 <= stats.copies <= 4
    assert ranks.run(told, job(0, tmp_path), world_size=2)[0][0] is None


def test_ranks_of_nodes_with_other_links_or_cores_decide_alike(ranks: Ranks, tmp_path: Path) -> None:
    config = job(1, tmp_path)
    assert len(set(ranks.run(rule_of, config, world_size=2))) == 1


def rule_of(config: JobConfig) -> ShareRule | None:
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + dist.get_rank())
    try:
        return share_rule(config, fitted(config, expert=2), torch.device("cpu"))
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def test_exact_mode_refuses_it() -> None:
    with pytest.raises(ValidationError, match="set expert_replicas to 0"):
        TrainConfig(exact=True, expert_replicas=1)
