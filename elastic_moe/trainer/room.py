"""Whether the state of a node's ranks can lie in its memory at all: the kernel would end them without a word."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from elastic_moe.errors import UserError
from launcher import Infeasible, MeshPlan, MeshSpec, memory_use, plan

log = logging.getLogger(__name__)

_GIB = 1 << 30
_USABLE = 0.85
_MEMORY = Path("/proc/meminfo")
_LIMITS = Path("/sys/fs/cgroup")  # of the container, where there is one


def check_room(mesh: MeshPlan, spec: MeshSpec, *, num_ranks: int, room_bytes: int, may_grow: bool) -> None:
    """Compare what ranks hold for good, parameters and AdamW's moments, with the memory that there is.

    Args:
        num_ranks: those that share it.
        may_grow: whether other nodes may come, on which the job fits: then it is only told.

    Raises:
        UserError: it surely does not suffice.
    """
    use = memory_use(mesh, spec)
    held_bytes = num_ranks * (use.params + use.optimizer)
    if held_bytes <= room_bytes:
        return
    told = (
        f"parameters and AdamW's moments alone are {held_bytes / _GIB:.1f} GiB here ({num_ranks} of {mesh.world_size} "
        f"ranks; mesh {mesh}), and there are {room_bytes / _GIB:.1f}: `elastic-moe train --dry-run` shows on how many "
        "nodes the job fits"
    )
    if not may_grow:
        raise UserError(told)
    log.warning("%s; mesh.memory_gib keeps the job from being planned for too few", told)


def plan_in_room(
    world_size: int,
    spec: MeshSpec,
    *,
    ranks_per_node: int | Sequence[int],
    share_bytes: int | None,
    previous: MeshPlan | None = None,
) -> MeshPlan:
    """As `plan`, but a job that says nothing of memory is planned for what there is, and not for any batch at once.

    Args:
        share_bytes: of one rank; None where that is not known. Where nothing fits, the leanest plan is taken, since
            memory is modelled and not known.

    Raises:
        Infeasible: as `plan`.
    """
    free = plan(world_size, spec, ranks_per_node=ranks_per_node, previous=previous)
    if spec.memory_cap_bytes is not None or share_bytes is None or memory_use(free, spec).total <= share_bytes:
        return free
    try:
        capped = spec.replace(memory_cap_bytes=share_bytes)
        found = plan(world_size, capped, ranks_per_node=ranks_per_node, previous=previous)
    except Infeasible as error:
        found = error.leanest.plan if error.leanest is not None else free
    if found != free:
        log.info(
            "the mesh is %s with micro-batches of %d: more does not fit %.1f GiB a rank (or set mesh.memory_gib)",
            found,
            found.micro_batch,
            share_bytes / _GIB,
        )
    return found


def share_of(room_bytes: int, num_ranks: int) -> int:
    """What a rank of so many may take of memory: not all, as others run there, and memory is modelled."""
    return round(_USABLE * room_bytes / num_ranks)


def room_of(device: torch.device) -> int:
    """Bytes of memory that all ranks on this device have, those of a processor with what they may swap."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _MEMORY.read_text(), re.MULTILINE))
    # A container's memory is limited without what it may swap, and that by itself.
    return _least("memory.max", int(found["MemTotal"])) + _least("memory.swap.max", int(found.get("SwapTotal", 0)))


def _least(limit: str, num_kib: int) -> int:
    """Bytes that the machine has of something, or less, where the container may have no more."""
    try:
        return min(num_kib * 1024, int((_LIMITS / limit).read_text()))
    except (OSError, ValueError):  # there is none, or it is "max"
        return num_kib * 1024
