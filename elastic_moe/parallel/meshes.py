"""The device meshes of a plan.

The world is seen twice: the dense parameters are sharded over shard x expert ranks, and the experts are split
`expert` ways and each part sharded over `shard` ranks. Both views number the ranks alike (rank =
(replicate * shard + s) * expert + e), so that an expert-parallel group holds consecutive ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from elastic_moe.errors import UserError
from elastic_moe.parallel.collectives import add_up
from elastic_moe.parallel.mailbox import Mailbox, open_mailbox
from launcher import MeshPlan

REPLICATE, FSDP, EXPERT_FSDP, EXPERT = "replicate", "fsdp", "efsdp", "ep"
_WORLD = "world"


@dataclass(frozen=True)
class Meshes:
    """Two device meshes over the same ranks.

    Attributes:
        plan: what they were built from.
        dense: (replicate, fsdp), of shape (R, FS * EP).
        sparse: (replicate, efsdp, ep), of shape (R, FS, EP).
    """

    plan: MeshPlan
    dense: DeviceMesh
    sparse: DeviceMesh
    _mailboxes: dict[str, Mailbox | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def for_dense(self) -> DeviceMesh:
        """What FSDP2 shards the dense parameters over: with a replicate dimension only where there are replicas."""
        return self.dense if self.plan.replicate > 1 else self.dense[FSDP]

    @property
    def for_experts(self) -> DeviceMesh:
        """What FSDP2 shards each expert-parallel part over."""
        return self.sparse[REPLICATE, EXPERT_FSDP] if self.plan.replicate > 1 else self.sparse[EXPERT_FSDP]

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that together hold all experts once, if not sharded further."""
        return self.sparse.get_group(EXPERT)

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks that together hold every parameter exactly once."""
        return self.dense.get_group(FSDP)

    def mailbox(self, name: str) -> Mailbox | None:
        """Of the ranks along a dimension, where they are processors of one machine. The first time a collective."""
        mesh = self.sparse if name in (EXPERT_FSDP, EXPERT) else self.dense
        return self._mailbox(name, mesh.get_group(name))

    def sum_over_replica(self, tensor: Tensor) -> None:
        """Add up, in place, what the ranks of `replica_group` have. A collective."""
        add_up(tensor, self.replica_group, self.mailbox(FSDP))

    def sum_over_ranks(self, tensor: Tensor) -> None:
        """Add up, in place, what all ranks have. A collective."""
        if self.plan.replicate == 1:
            self.sum_over_replica(tensor)
            return
        world = dist.group.WORLD
        assert world is not None, "these meshes are built on it"
        add_up(tensor, world, self._mailbox(_WORLD, world))

    def _mailbox(self, name: str, group: dist.ProcessGroup) -> Mailbox | None:
        if name not in self._mailboxes:
            self._mailboxes[name] = open_mailbox(group) if self.dense.device_type == "cpu" else None
        return self._mailboxes[name]


def build_mesh(plan: MeshPlan, device: torch.device | str) -> Meshes:
    """Build the meshes of `plan` on the default process group. A collective.

    Raises:
        UserError: the plan is for another number of ranks than the world has.
    """
    world_size = dist.get_world_size()
    if plan.world_size != world_size:
        raise UserError(
            f"the mesh plan {plan} is for {plan.world_size} ranks but WORLD_SIZE is {world_size}: "
            "start as many workers as the plan has ranks"
        )
    kind = torch.device(device).type
    rows, columns = plan.replicate, plan.shard * plan.expert
    return Meshes(
        plan=plan,
        dense=init_device_mesh(kind, (rows, columns), mesh_dim_names=(REPLICATE, FSDP)),
        sparse=init_device_mesh(kind, (rows, plan.shard, plan.expert), mesh_dim_names=(REPLICATE, EXPERT_FSDP, EXPERT)),
    )
