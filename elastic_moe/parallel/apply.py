"""Turn a decoder into one that is spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from elastic_moe.errors import UserError
from elastic_moe.model.decoder import Decoder
from elastic_moe.model.experts import Experts
from elastic_moe.parallel.collectives import GatherByMailbox, ReduceByExchange
from elastic_moe.parallel.dispatch import AllToAllDispatch
from elastic_moe.parallel.mailbox import Mailbox
from elastic_moe.parallel.meshes import EXPERT, EXPERT_FSDP, FSDP, Meshes
from elastic_moe.parallel.sharing import SharingDispatch
from elastic_moe.parallel.turns import gather_by_turns
from elastic_moe.pool import Pool
from launcher import ShareRule, cuts_through, placement_obstacle


@dataclass(frozen=True)
class Precision:
    """What the model computes in. Parameters, gradients and optimizer state are kept in fp32 regardless.

    Attributes:
        compute: dtype of weights and activations in forward and backward.
        exact: add up every gradient in float64, so that its fp32 value does not depend on the mesh. For fp32
            compute and one sequence a micro-batch; costs memory and time.
    """

    compute: torch.dtype = torch.float32
    exact: bool = False

    def __post_init__(self) -> None:
        if self.exact and self.compute is not torch.float32:
            raise ValueError("exact needs fp32 compute")

    @property
    def dense_policy(self) -> MixedPrecisionPolicy:
        if self.exact:
            return MixedPrecisionPolicy(reduce_dtype=torch.float64, cast_forward_inputs=False)
        return MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=torch.float32)

    @property
    def router_policy(self) -> MixedPrecisionPolicy | None:
        """Of a unit of its own, where the block's would round the router's weights; None where the block's serves."""
        if self.compute is torch.float32:
            return None
        # Its output is fp32 weights and int64 indices, and stays so.
        return MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)

    @property
    def experts_policy(self) -> MixedPrecisionPolicy:
        if self.exact:
            # float64 weights, so that autograd adds the sources' gradients in float64: see `Experts`.
            return MixedPrecisionPolicy(
                param_dtype=torch.float64, reduce_dtype=torch.float64, cast_forward_inputs=False
            )
        return self.dense_policy


def parallelize(
    model: Decoder, meshes: Meshes, precision: Precision | None = None, sharing: ShareRule | None = None
) -> None:
    """Apply expert parallelism, FSDP2 and HSDP in place; best on a model built on the meta device. A collective.

    Gradients come out as plain sums over all ranks: divide the loss by the tokens of the global batch. (FSDP2's own
    averaging would make the experts' gradients EP times too large, for they saw the tokens of EP ranks.)

    Args:
        sharing: lets expert-parallel ranks share the rows of hot experts; None, or a rule of no guests, does not. The
            same on all ranks. Not in exact mode: which rows are computed together then depends on the mesh.

    Raises:
        UserError: the experts cannot be laid out on the mesh.
    """
    precision = precision or Precision()
    assert sharing is None or not sharing.guests or not precision.exact, "TrainConfig refuses both together"
    plan, num_experts = meshes.plan, model.config.num_experts
    widths = (model.config.dim, model.config.expert_dim)
    if why := placement_obstacle(num_experts, widths, expert=plan.expert, shard=plan.shard):
        raise UserError(f"the mesh {plan} does not fit the model: {why}")
    pool = Pool()
    is_on_cpu = meshes.dense.device_type == "cpu"
    dense = _View(meshes.for_dense, plan.shard * plan.expert, meshes.mailbox(FSDP), pool)
    # With one expert part both views are the same ranks, and FSDP2 wants the same mesh object for them.
    sparse = _View(meshes.for_experts, plan.shard, meshes.mailbox(EXPERT_FSDP), pool) if plan.expert > 1 else dense
    by_expert = meshes.mailbox(EXPERT)
    placement = _through if cuts_through(num_experts, widths, expert=plan.expert, shard=plan.shard) else None
    for block in model.blocks:
        experts = block.moe.experts
        experts.exact = precision.exact
        if is_on_cpu:
            experts.empty_like = pool.like
        if plan.expert > 1:
            _split_experts(experts, meshes.sparse[EXPERT])
            block.moe.dispatch = (
                SharingDispatch(meshes.expert_group, num_experts, sharing, by_expert)
                if sharing is not None and sharing.guests
                else AllToAllDispatch(meshes.expert_group, num_experts, by_expert)
            )
        if precision.router_policy is not None:
            _shard(block.moe.router, dense, precision.router_policy)
        if plan.expert > 1 or precision.exact:
            _shard(experts, sparse, precision.experts_policy, placement)
            _shard(block, dense, precision.dense_policy)
        else:  # one gather and one reduction a layer, in place of two
            _shard(block, dense, precision.dense_policy, placement and _of(experts, placement))
    _shard(model, dense, precision.dense_policy)
    if is_on_cpu:
        gather_by_turns(model, pool)


Placement = Callable[[nn.Parameter], Shard | None]


class _View(NamedTuple):
    """What a unit is sharded over, and how these ranks exchange if not by gloo."""

    mesh: DeviceMesh
    num_shards: int
    mailbox: Mailbox | None
    pool: Pool


def _shard(module: nn.Module, view: _View, policy: MixedPrecisionPolicy, placement: Placement | None = None) -> None:
    """Make a unit of `module`, whose gradients come out as sums."""
    unit = fully_shard(module, mesh=view.mesh, mp_policy=policy, shard_placement_fn=placement)
    if view.mesh.size() > 1:  # one rank divides by one of its own accord: into a copy, where a factor is given
        unit.set_gradient_divide_factor(1.0)
        # gloo has no pre-multiplied sum, which a divide factor would ask of it.
        unit.set_force_sum_reduction_for_comms(True)
    if view.mesh.device_type == "cpu":
        reduce: Any = ReduceByExchange(view.mailbox, view.pool)  # what FSDP2 types it by is private
        unit.set_custom_reduce_scatter(reduce)
        if view.mailbox is not None:
            gather: Any = GatherByMailbox(view.mailbox, view.pool)
            unit.set_custom_all_gather(gather)


def _split_experts(experts: Experts, mesh: DeviceMesh) -> None:
    for name, param in list(experts.named_parameters(recurse=False)):
        part = distribute_tensor(param, mesh, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(part))


def _through(param: nn.Parameter) -> Shard:
    """Have FSDP2 cut through each of the experts, and not between them, which is along dimension 0."""
    return Shard(1)


def _of(module: nn.Module, placement: Placement) -> Placement:
    """That placement for the parameters of `module` alone."""
    own = {id(param) for param in module.parameters()}
    return lambda param: placement(param) if id(param) in own else None
