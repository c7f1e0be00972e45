"""Before the first step: the device, the process group, and the mesh that this world trains on."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from elastic_moe.config import JobConfig, mesh_spec
from elastic_moe.errors import UserError
from elastic_moe.model.config import ModelConfig
from elastic_moe.trainer.room import plan_in_room
from elastic_moe.worker import WorkerContext
from launcher import Infeasible, MeshPlan, placement_obstacle, whole_number

# fp32 numbers that two AVX-512 registers hold; torch's CPU kernels work on one or two at a time.
_VECTOR_WIDTH = 32
_BY_WHOM = "`elastic-moe run` and torchrun set all of them; to train alone, set none"


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Choose the device that this rank trains on.

    Raises:
        UserError: cuda is asked for and there is none, or not one for each local rank.
    """
    num_cuda = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and num_cuda == 0):
        return torch.device("cpu")
    if local_rank >= num_cuda:
        raise UserError(
            f"train.device is {wanted!r} and this node has {num_cuda} CUDA devices, too few for local rank "
            f"{local_rank}: start fewer workers a node, or set train.device to 'cpu'"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group, from torchrun's environment or, without one, of this process alone."""
    # Checkpoints and the launcher talk over CPU tensors, also where the model is on GPUs.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check_meeting(os.environ)
    if os.environ.get("RANK"):
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # public, and missing from its __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    except BaseException:
        # NCCL would wait here for peers that may be gone, and the process is about to end with the error.
        if device.type == "cpu":
            dist.destroy_process_group()
        raise
    # gloo aborts now and then when a rank leaves while another still reads from it.
    dist.barrier()
    dist.destroy_process_group()


def check_meeting(environ: Mapping[str, str]) -> None:
    """Look at the variables by which ranks find each other: torch tells of some of them by a traceback, others late.

    Raises:
        UserError, launcher.UsageError: one of them is missing, or is not what it must be.
    """
    world_size = whole_number(environ, "WORLD_SIZE", 1, at_least=1)
    if not environ.get("RANK"):
        if world_size > 1:
            raise UserError(f"WORLD_SIZE is {world_size} and RANK is not set: {_BY_WHOM}")
        return
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name, "").strip():
            raise UserError(f"RANK is set and {name} is not: {_BY_WHOM}")
    rank = whole_number(environ, "RANK")
    if rank >= world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {world_size}: ranks are counted from 0 on; {_BY_WHOM}")
    port = whole_number(environ, "MASTER_PORT", at_least=1)
    if port >= 1 << 16:
        raise UserError(f"MASTER_PORT is {port}; a port is below {1 << 16}")


def from_rank_0(numbers: Callable[[], Sequence[int]]) -> list[int]:
    """What rank 0 makes of it, two numbers; a collective over CPU tensors."""
    told = torch.tensor(numbers() if dist.get_rank() == 0 else [0, 0])
    dist.broadcast(told, 0)
    return [int(number) for number in told]


def choose_plan(job: JobConfig, here: WorkerContext, ranks_per_node: int, share_bytes: int | None = None) -> MeshPlan:
    """The agent's mesh plan, or one of our own where no agent made one; checked against the world and the job.

    Args:
        share_bytes: memory of one rank, the same on all; None where that is not known.

    Raises:
        UserError: no plan fits, or the agent's does not: it was made for another job.
    """
    spec = mesh_spec(job)
    if here.mesh is None:
        try:
            # All workers have been started already: none of them can stay idle.
            spec = spec.replace(max_idle=0)
            return plan_in_room(here.world_size, spec, ranks_per_node=ranks_per_node, share_bytes=share_bytes)
        except Infeasible as error:
            raise UserError(str(error)) from None
    check_plan(here.mesh, job, here.world_size)
    return here.mesh


def check_plan(mesh: MeshPlan, job: JobConfig, world_size: int) -> None:
    """Raises UserError where `mesh` cannot train `job` in a world of `world_size` ranks."""
    advice = "give `elastic-moe run --mesh` the same job file and settings as `train`"
    if mesh.world_size != world_size:
        raise UserError(
            f"the mesh plan ({mesh}) needs {mesh.world_size} ranks and WORLD_SIZE is {world_size}: {advice}"
        )
    widths = (job.model.dim, job.model.expert_dim)
    if why := placement_obstacle(job.model.num_experts, widths, expert=mesh.expert, shard=mesh.shard):
        raise UserError(f"the mesh plan ({mesh}) does not fit the model: {why}; {advice}")
    held = mesh.micro_batch * mesh.rounds * world_size
    if held < job.train.global_batch:
        raise UserError(
            f"the mesh plan holds {held} sequences a step and train.global_batch is {job.train.global_batch}: {advice}"
        )
    limit = job.train.micro_batch_limit
    if limit is not None and mesh.micro_batch > limit:
        raise UserError(f"the mesh plan's micro-batch is {mesh.micro_batch} and the job allows {limit}: {advice}")


def check_exact(model: ModelConfig) -> None:
    """Raises UserError where exact mode could not keep its promise for a model of this shape."""
    for name in ("dim", "expert_dim", "shared_expert_dim"):
        if (width := getattr(model, name)) % _VECTOR_WIDTH:
            raise UserError(
                f"train.exact = true needs model.{name} in multiples of {_VECTOR_WIDTH}, not {width}: what a CPU "
                "computes in a vector and in the rest that fills none differs in the last bit"
            )


def missing_compiler(device: torch.device, environ: Mapping[str, str]) -> str:
    """Say which C++ compiler torch.compile would not find, which it needs for the CPU; "" if nothing is missing."""
    name = environ.get("CXX") or "g++"  # as inductor looks for it
    if device.type != "cpu" or shutil.which(name):
        return ""
    return f"it needs a C++ compiler on the CPU, and there is no {name}"


def check_same_everywhere(fingerprint: str, device: torch.device) -> None:
    """Make sure that all ranks read the same data. A collective.

    Raises:
        UserError: on every rank, if one has another fingerprint.
    """
    value = int(fingerprint[:15], 16)
    both = torch.tensor([value, -value], dtype=torch.int64, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    if int(both[0]) != -int(both[1]):
        raise UserError(
            "data.url does not hold the same data on every node, or data.tokenizer is not the same: copy them, or (for "
            "'stdlib') install one Python version everywhere"
        )
