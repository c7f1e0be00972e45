"""The training loop: `train(job)` on every rank, under `elastic-moe run`, torchrun, or plain Python."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import Any

import torch

from elastic_moe import worker
from elastic_moe.config import JobConfig
from elastic_moe.errors import NotSaved
from elastic_moe.parallel import build_mesh
from elastic_moe.trainer.metrics import MetricsFile, StepMetrics
from elastic_moe.trainer.optimizer import set_step
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.state import DataProgress, training_state
from elastic_moe.trainer.step import Stepper, StepResult
from elastic_moe.trainer.world import choose_device, choose_plan, on_all_ranks, process_group
from storage import Checkpointer

log = logging.getLogger(__name__)


def train(job: JobConfig) -> None:
    """Train `job` to its last step, or until the launcher asks for a stop.

    Starts from the newest good checkpoint at `checkpoint.url`, whatever world and mesh wrote it. On a stop it saves
    at that step boundary, says so to the agent, and returns: the caller exits with 0 either way.

    Raises:
        UserError: the job does not fit the world, the data or the checkpoint.
        NotSaved: the last step could not be saved.
    """
    here = worker.context(set_device=False)  # the job says which
    if job.train.exact:
        # A CPU kernel that splits a sum over threads rounds it by their number.
        torch.set_num_threads(1)
    device = choose_device(job.train.device, here.local_rank)
    with process_group(device):
        plan = choose_plan(job, here, ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        meshes = build_mesh(plan, device)
        stepper, progress = set_up(job, meshes, here.rank, device)
        state = training_state(stepper.model, stepper.optimizer, progress)
        with contextlib.ExitStack() as stack:
            metrics = None
            if here.rank == 0 and job.train.metrics is not None:
                metrics = stack.enter_context(MetricsFile(job.train.metrics))
            checkpointer = None
            if job.checkpoint.url is not None:
                checkpointer = stack.enter_context(
                    Checkpointer(
                        job.checkpoint.url,
                        keep=job.checkpoint.keep,
                        mesh={"replicate": plan.replicate, "shard": plan.shard, "expert": plan.expert},
                        on_event=_forward_event,
                        take_over=job.checkpoint.take_over,
                    )
                )
                restore(checkpointer, state, stepper, progress)
            run_steps(job, here, stepper, progress, state, checkpointer, metrics)


def restore(checkpointer: Checkpointer, state: dict[str, Any], stepper: Stepper, progress: DataProgress) -> None:
    """Load the newest good checkpoint, if there is one.

    Raises:
        UserError: it was trained on other data.
    """
    step = checkpointer.restore(state)
    if step == 0:
        return
    if progress.loaded is not None:
        progress.data.check(progress.loaded)
    progress.step = step
    set_step(stepper.optimizer, step)


def run_steps(
    job: JobConfig,
    here: worker.WorkerContext,
    stepper: Stepper,
    progress: DataProgress,
    state: dict[str, Any],
    checkpointer: Checkpointer | None,
    metrics: MetricsFile | None,
) -> None:
    """Steps from `progress.step` to the last, or to a stop."""
    if progress.step >= job.train.steps:
        log.info("the checkpoint is of step %d and train.steps is %d: nothing is left", progress.step, job.train.steps)
    first = progress.step + 1
    while progress.step < job.train.steps:
        began_s = time.perf_counter()
        result = stepper.step(progress.step)
        progress.step = step = progress.step + 1
        step_s = time.perf_counter() - began_s
        worker.heartbeat(step)
        if here.rank == 0:
            if step == first:
                worker.event("first_step", step=step, step_s=step_s)
            _report(job, here, stepper, step, result, step_s, metrics)
        reason = worker.should_stop()
        last = step == job.train.steps
        if checkpointer is not None and (reason or last or step % job.checkpoint.every == 0):
            if reason == "drain" or last:
                checkpointer.announce_end()  # whoever is to go on elsewhere waits for the save
            with worker.untimed():
                checkpointer.save(step, state, wait=bool(reason) or last)
                if last and not on_all_ranks(checkpointer.wait()):
                    raise NotSaved(f"step {step} is the last and could not be saved to {job.checkpoint.url}")
        if reason and not last and _may_stop(checkpointer, reason, step):
            if checkpointer is not None and reason == "drain":
                checkpointer.close()  # if all nodes drain, the job's next launch need not ask whether this one lives
            worker.yielded(step)
            return


def _may_stop(checkpointer: Checkpointer | None, reason: str, step: int) -> bool:
    """Whether the state of this step is safe, the same on all ranks; else the training goes on to the next boundary.

    The agent bounds how often that can happen: it asks for so long only.
    """
    if checkpointer is None:
        log.warning("asked to stop (%s) without a checkpoint.url: the next run begins at step 0", reason)
        return True
    with worker.untimed():
        if on_all_ranks(checkpointer.wait()):
            return True
    log.warning("step %d could not be saved: the stop (%s) waits for the next step boundary", step, reason)
    worker.event("stop_postponed", step=step, reason=reason)
    return False


def _report(
    job: JobConfig,
    here: worker.WorkerContext,
    stepper: Stepper,
    step: int,
    result: StepResult,
    step_s: float,
    metrics: MetricsFile | None,
) -> None:
    plan = stepper.meshes.plan
    if metrics is not None:
        metrics.append(
            StepMetrics(
                step=step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.lr,
                tokens=step * job.train.global_batch * job.train.seq_len,
                load_max=float((result.load_LE.amax(dim=1) / result.load_LE.mean(dim=1)).max()),
                step_s=step_s,
                generation=here.generation,
                world_size=here.world_size,
                mesh={"replicate": plan.replicate, "shard": plan.shard, "expert": plan.expert},
                ts=time.time(),
            )
        )
    if step % job.train.log_every == 0 or step == job.train.steps:
        log.info(
            "step %d/%d  loss %.4f  grad norm %.3f  %.0f tokens/s",
            step,
            job.train.steps,
            result.loss,
            result.grad_norm,
            job.train.global_batch * job.train.seq_len / step_s,
        )


def _forward_event(name: str, fields: dict[str, Any]) -> None:
    worker.event(name, **fields)
