"""Measure for the mesh planner how fast this machine is: `python -m elastic_moe.calibrate JOB.toml --out FILE`.

On several ranks under `elastic-moe run`, as many as the node has cores or devices: what they share is shared then.
Two layers of the job's own model go forward and backward, compiled where the job has them so, on two numbers of tokens,
whose difference is what tokens cost, and the rest what a layer does; a copy and collectives tell the rest.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from elastic_moe import heap
from elastic_moe.config import JobConfig, load, mesh_spec
from elastic_moe.errors import UserError
from elastic_moe.machine import write_calibration
from elastic_moe.model import ModelConfig
from elastic_moe.model.compile_cache import cache_obstacle
from elastic_moe.model.decoder import Decoder, token_loss
from elastic_moe.parallel import Meshes, Precision, begin_round, build_mesh, init_weights, materialize, parallelize
from elastic_moe.parallel.collectives import GatherByMailbox, ReduceByExchange
from elastic_moe.parallel.mailbox import open_mailbox
from elastic_moe.pool import Pool
from elastic_moe.trainer.setup import compile_layers
from elastic_moe.trainer.world import choose_device, process_group
from elastic_moe.urls import local_path
from launcher import MeshPlan, MeshSpec, UsageError, step_time, whole_number

_MIB = 1 << 20
_COPY_BYTES = 64 * _MIB
_MESSAGE_BYTES = 8 * _MIB
_NUM_LAYERS = 2
_SEQUENCES = (1, 4)
_REPEATS = 5
_TRIES = 3
_LEAST_S = 1e-6

log = logging.getLogger(__name__)


def measure(job: JobConfig, device: torch.device) -> dict[str, float]:
    """The fields of `MachineSpeed` that this world can tell, the same on every rank. A collective."""
    found = {"memory_bytes_per_s": _memory_speed(device), **_links(device)}
    if device.type == "cpu":
        found["cores_per_node"] = len(os.sched_getaffinity(0))
    return found | _layers(job, device, mesh_spec(job).replace(**{**found, "cores_per_node": None}))


def _memory_speed(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _least_s(lambda: target.copy_(source), device)


def _links(device: torch.device) -> dict[str, float]:
    """Latency and bandwidths, by what a step's own collectives take; nothing where there is one rank."""
    num_ranks = dist.get_world_size()
    if num_ranks == 1:
        return {}
    small = torch.zeros(1, device=device)
    fixed_s = _least_s(lambda: dist.all_reduce(small), device)
    part = torch.zeros(_MESSAGE_BYTES // 4, device=device)
    whole = torch.zeros(num_ranks * part.numel(), device=device)
    gather, reduce = _over_shards(whole, part)
    gather_s, reduce_s = _least_s(gather, device), _least_s(reduce, device)
    replicas_s = _least_s(lambda: dist.all_reduce(whole), device)
    moved = (num_ranks - 1) * _MESSAGE_BYTES
    # What the first rank beyond this one costs stands for each: a collective of one rank talks to nobody.
    hop_s = fixed_s / num_ranks
    return {
        "latency_s": hop_s,
        "hop_s": hop_s,
        # A step gathers twice as often as it reduces.
        "intra_node_bytes_per_s": moved / max(_LEAST_S, (2 * gather_s + reduce_s) / 3 - fixed_s),
        "replica_bytes_per_s": 2 * moved / max(_LEAST_S, replicas_s - 2 * fixed_s),
    }


def _over_shards(whole: torch.Tensor, part: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """A layer's gathering and its reduction, as `parallelize` has FSDP2 do them. A collective."""
    # torch 2.13 has new names for both, and warns of the old ones.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    if whole.device.type != "cpu":
        return lambda: all_gather(whole, part), lambda: reduce_scatter(part, whole)
    group, pool = dist.group.WORLD, Pool()
    assert group is not None, "there is a process group"
    mailbox = open_mailbox(group)
    reduce = ReduceByExchange(mailbox, pool)
    tensors: dict[str, Any] = {"output_tensor": part, "input_tensor": whole, "group": group, "op": dist.ReduceOp.SUM}
    if mailbox is None:
        return lambda: all_gather(whole, part), lambda: reduce(**tensors)
    gather = GatherByMailbox(mailbox, pool)
    return lambda: gather(output_tensor=whole, input_tensor=part, group=group), lambda: reduce(**tensors)


def _layers(job: JobConfig, device: torch.device, spec: MeshSpec) -> dict[str, float]:
    """What tokens and layers cost, without any communication: every rank is a replica that reduces nothing."""
    num_layers = min(_NUM_LAYERS, job.model.num_layers)
    config = job.model.model_copy(update={"num_layers": num_layers})
    meshes = build_mesh(MeshPlan(dist.get_world_size(), 1, 1, 0, 1, 2), device)
    model = _model(job, config, meshes, device)
    times_s = _times_s(job, model, device)
    spec = spec.replace(
        num_layers=num_layers, dense_params=config.num_dense_params, expert_params=config.num_expert_params
    )
    few, many = (sequences * job.train.seq_len for sequences in _SEQUENCES)
    token_s = max(_LEAST_S / many, (times_s[1] - times_s[0]) / (many - few))
    one = step_time(MeshPlan(1, 1, 1, 0, 1, 1), spec.replace(flops_per_s=1.0), ranks_per_node=1)
    flops_per_token = one.compute / spec.tokens_per_sample
    num_launches = one.launch / spec.layer_launch_s  # more than layers, where these are computed anew
    launch_s = (times_s[0] - few * token_s - one.weights) / num_launches
    return {"flops_per_s": flops_per_token / token_s, "layer_launch_s": max(_LEAST_S, launch_s)}


def _times_s(job: JobConfig, model: Decoder, device: torch.device) -> list[float]:
    """What a pass takes, by `_SEQUENCES`: looked at again where more take no longer, as beside another program."""
    least_s = [math.inf] * len(_SEQUENCES)
    for _ in range(_TRIES):
        for index, sequences in enumerate(_SEQUENCES):
            if job.train.compile:
                torch.compiler.reset()  # a job's micro-batches have one size: no graph is made for several
            least_s[index] = min(least_s[index], _pass_s(model, sequences, job.train.seq_len, device))
        if least_s[0] < least_s[-1]:
            return least_s
    if not dist.is_initialized() or dist.get_rank() == 0:  # all have found the same
        log.warning(
            "passes of %d sequences take no longer than those of %d, and flops_per_s is no measurement: let nothing "
            "else run, or measure a job of longer sequences (train.seq_len)",
            _SEQUENCES[-1],
            _SEQUENCES[0],
        )
    return least_s


def _model(job: JobConfig, config: ModelConfig, meshes: Meshes, device: torch.device) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    compute = torch.bfloat16 if job.train.dtype == "bfloat16" else torch.float32
    parallelize(model, meshes, Precision(compute=compute, exact=job.train.exact))
    materialize(model, device)
    init_weights(model, job.train.seed)
    model.recompute = job.train.recompute
    if job.train.compile:
        compile_layers(model, device)
    return model


def _pass_s(model: Decoder, sequences: int, positions: int, device: torch.device) -> float:
    tokens = torch.randint(model.config.vocab_size, (sequences, positions + 1), device=device)
    real = torch.ones(sequences, dtype=torch.bool, device=device)

    def once() -> None:
        begin_round(model, last=False)
        out = model(tokens[:, :-1], real)
        token_loss(out.logits_BSV, tokens[:, 1:], real).backward()

    return _least_s(once, device)


def _least_s(action: Callable[[], object], device: torch.device) -> float:
    """The least time of a few, all ranks at once: what disturbs one is not the machine's. The slowest rank's."""
    times_s = []
    for turn in range(_REPEATS + 1):
        dist.barrier()
        _finish(device)
        began_s = time.perf_counter()
        action()
        _finish(device)
        if turn:  # the first one allocates
            times_s.append(time.perf_counter() - began_s)
    least = torch.tensor(min(times_s), dtype=torch.float64)
    dist.all_reduce(least, op=dist.ReduceOp.MAX)
    return max(_LEAST_S, float(least))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compute_as_training_does(job: JobConfig, device: torch.device) -> None:
    if job.train.exact:
        torch.set_num_threads(1)
    if device.type == "cpu":
        heap.keep_freed()
    cache_obstacle()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the file from rank 0."""
    parser = argparse.ArgumentParser(prog="python -m elastic_moe.calibrate", description=__doc__)
    parser.add_argument("job", metavar="JOB.toml", help="whose model's layers are measured")
    parser.add_argument("--out", default="machine.json", metavar="FILE", help="default machine.json")
    args = parser.parse_args(argv)
    try:
        try:
            local_path(args.out)
        except ValueError as error:
            raise UserError(f"--out {error}") from None
        job = load(args.job, environ=os.environ)
        device = choose_device(job.train.device, whole_number(os.environ, "LOCAL_RANK"))
        _compute_as_training_does(job, device)
        with process_group(device):
            found = measure(job, device)
            if dist.get_rank() == 0:
                write_calibration(args.out, found)
    except (UserError, UsageError) as error:
        sys.stderr.write(f"calibrate: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
