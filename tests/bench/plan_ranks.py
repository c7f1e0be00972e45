"""What the ranks of `make bench-plan` do: measure their own memory, and how long their steps take."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from elastic_moe import heap
from elastic_moe.calibrate import measure
from elastic_moe.config import JobConfig
from elastic_moe.parallel import build_mesh, init_weights
from elastic_moe.pool import Pool
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.world import process_group
from launcher import MeshPlan

NUM_STEPS_OF_MEMORY = 2


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name + ":")).split()[1])


def a_few_steps(job: JobConfig, plan: MeshPlan) -> None:
    """All that a rank does for its first steps."""
    stepper, _ = set_up(job, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    init_weights(stepper.model, job.train.seed)
    for step in range(NUM_STEPS_OF_MEMORY):
        stepper.step(step)


def peak_of(job: JobConfig, plan: MeshPlan) -> int:
    """Bytes that a few steps add to this process at most, beyond what it had before there was a model."""
    heap.keep_freed()  # as the trainer does
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, see proc(5)
    before = memory("VmRSS")
    a_few_steps(job, plan)
    return memory("VmHWM") - before


def live_peak_of(job: JobConfig, plan: MeshPlan) -> int:
    """The most bytes that tensors have at once in a few steps, by torch's own account; the moments are not in it.

    As on a device, where nothing lies in a pool of ours: each tensor is made when it is needed.
    """
    gc.collect()  # what is freed meanwhile of an earlier account would count
    made = mock.patch.object(Pool, "take", lambda pool, size, dtype: torch.empty(*size, dtype=dtype))
    apart = mock.patch("elastic_moe.parallel.apply.gather_by_turns")
    with (
        made,
        apart,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        a_few_steps(job, plan)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


MEASURES = {"resident": peak_of, "live": live_peak_of}


def step_times(jobs: list[tuple[dict[str, Any], MeshPlan]], num_steps: int) -> list[float]:
    """Median seconds of a step of each job on its mesh, as the slowest rank sees it."""
    found = []
    for fields, plan in jobs:
        job = JobConfig.model_validate(fields)
        stepper, _ = set_up(job, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
        init_weights(stepper.model, job.train.seed)
        times_s = []
        for step in range(num_steps + 1):
            dist.barrier()
            began_s = time.perf_counter()
            stepper.step(step)
            if step:
                times_s.append(time.perf_counter() - began_s)
        slowest = torch.tensor(times_s, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found.append(statistics.median(slowest.tolist()))
    return found


def calibrated(fields: dict[str, Any]) -> dict[str, float]:
    """What the planner is told of this machine."""
    return measure(JobConfig.model_validate(fields), torch.device("cpu"))


def main() -> None:
    """One rank of one configuration of memory, in a process of its own; prints a line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("job", help="JSON of the job's sections")
    parser.add_argument("plan", help="JSON of the mesh plan")
    parser.add_argument("what", choices=list(MEASURES))
    args = parser.parse_args()
    job, plan = JobConfig.model_validate_json(args.job), MeshPlan.from_json(args.plan)
    with process_group(torch.device("cpu")):
        peak = MEASURES[args.what](job, plan)
    if os.environ["RANK"] == "0":
        sys.stdout.write(json.dumps(peak) + "\n")


if __name__ == "__main__":
    main()
