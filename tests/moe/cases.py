"""What the ranks of a test run; each function is called on every rank by `tests.ranks`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from elastic_moe.config import JobConfig
from elastic_moe.model import ModelConfig
from elastic_moe.model.decoder import Decoder, token_loss
from elastic_moe.parallel import (
    Meshes,
    Precision,
    begin_round,
    build_mesh,
    clip_gradients,
    gather_full,
    init_weights,
    materialize,
    parallelize,
)
from elastic_moe.trainer.optimizer import set_step
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.state import training_state
from launcher import ShareRule
from launcher.rounds.mesh import MeshPlan
from tests.moe import variants as variants  # of all that is built here, on every rank

SMALL = ModelConfig(
    vocab_size=64,
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    num_experts=6,
    top_k=2,
    expert_dim=64,
    shared_expert_dim=32,
    z_loss_coeff=1e-3,
)


def layout(replicate: int = 1, shard: int = 1, expert: int = 1) -> MeshPlan:
    return MeshPlan(replicate=replicate, shard=shard, expert=expert, idle=0, micro_batch=2, rounds=1)


def build(
    config: ModelConfig, plan: MeshPlan, precision: Precision | None = None, sharing: ShareRule | None = None
) -> tuple[Decoder, Meshes]:
    """A model of `config` on `plan`'s mesh, its weights from seed 0."""
    meshes = build_mesh(plan, "cpu")
    with torch.device("meta"):
        model = Decoder(config)
    parallelize(model, meshes, precision, sharing)
    materialize(model, "cpu")
    init_weights(model, seed=0)
    return model, meshes


def batch(config: ModelConfig, num_sequences: int, num_positions: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (num_sequences, num_positions + 1), generator=draw)


def objective(model: Decoder, tokens: Tensor, num_sequences: int) -> Tensor:
    """The loss of this rank's sequences as a part of the global batch's."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    out = model(inputs)
    real = torch.ones(len(tokens), dtype=torch.bool)
    num_tokens = num_sequences * inputs.shape[1]
    config = model.config
    return (
        token_loss(out.logits_BSV, targets, real) / num_tokens
        + config.balance_coeff * out.balance / num_sequences
        + config.z_loss_coeff * out.z / num_tokens
    )


def gradients(
    config: ModelConfig, plan: MeshPlan, num_rounds: int = 1, keep_gathered: bool = False, max_norm: float | None = None
) -> tuple[dict[str, Tensor], float]:
    """Whole gradients, and their norm before clipping, of a batch of 8 that is split over ranks and rounds."""
    model, meshes = build(config, plan)
    tokens = batch(config, num_sequences=8, num_positions=16)
    mine = tokens.tensor_split(dist.get_world_size())[dist.get_rank()]
    parts = mine.tensor_split(num_rounds)
    for i, part in enumerate(parts):
        begin_round(model, last=i + 1 == num_rounds, keep_gathered=keep_gathered)
        objective(model, part, num_sequences=8).backward()
    norm = clip_gradients(model.parameters(), meshes, max_norm)
    return gather_full(dict(grads(model))), norm


def grads(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every gradient; a rank that holds no expert has none of theirs."""
    for name, param in model.named_parameters():
        yield name, torch.zeros_like(param) if param.grad is None else param.grad


class Leg(NamedTuple):
    """What one world saw of a run: losses and gradient norms by step, and whole parameters and moments at its end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def train_leg(job: JobConfig, plan: MeshPlan, first: int, last: int, folder: Path) -> Leg:
    """Steps `first` to `last` of `job` on one mesh, from and to stock DCP checkpoints in `folder`."""
    stepper, progress = set_up(job, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    state = training_state(stepper.model, stepper.optimizer, progress)
    if first:
        dcp.load(state, checkpoint_id=folder / str(first))
        set_step(stepper.optimizer, progress.step)
    else:
        init_weights(stepper.model, job.train.seed)
    results = [stepper.step(step) for step in range(first, last)]
    progress.step = last
    dcp.save(state, checkpoint_id=folder / str(last))
    moments = {f"{of} {name}": tensor for of, named in state["optim"].items() for name, tensor in named.items()}
    weights = gather_full({**stepper.model.state_dict(), **moments})
    return Leg([r.loss for r in results], [r.grad_norm for r in results], weights)


def fitted(job: JobConfig, replicate: int = 1, shard: int = 1, expert: int = 1) -> MeshPlan:
    """A plan of the given degrees that holds the job's global batch."""
    per_rank = -(-job.train.global_batch // (replicate * shard * expert))
    micro_batch = min(per_rank, job.train.micro_batch_limit or per_rank)
    return MeshPlan(replicate, shard, expert, 0, micro_batch, rounds=-(-per_rank // micro_batch))
