"""The training loop: `train(job)` on every rank, under `elastic-moe run`, torchrun, or plain Python."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from typing import Any

import torch

from elastic_moe import worker
from elastic_moe.config import JobConfig
from elastic_moe.errors import NotFinite, NotSaved
from elastic_moe.events import TrainerEvent
from elastic_moe.huggingface.folder import WeightFolder
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import build_mesh, init_weights, read_weights
from elastic_moe.trainer.health import first_not_finite, go_back_to
from elastic_moe.trainer.metrics import MetricsFile, StepMetrics
from elastic_moe.trainer.optimizer import set_step
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.state import DataProgress, training_state
from elastic_moe.trainer.step import Stepper, StepResult
from elastic_moe.trainer.world import choose_device, choose_plan, from_rank_0, process_group
from storage import Access, Checkpointer, JobIdentity, NoCheckpoint, StorageError, locate, summaries

log = logging.getLogger(__name__)


def train(job: JobConfig) -> None:
    """Train `job` to its last step, or until the launcher asks for a stop.

    Starts from the newest good checkpoint at `checkpoint.url`, whatever world and mesh wrote it. On a stop it saves
    at that step boundary, says so to the agent, and returns: the caller exits with 0 either way.

    Raises:
        UserError: the job does not fit the world, the data or the checkpoint.
        NotSaved: the last step could not be saved.
        NotFinite: too many steps in a row were skipped, or the last one, or the model holds what is not finite.
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
                        job=JobIdentity(mesh={"replicate": plan.replicate, "shard": plan.shard, "expert": plan.expert}),
                        access=Access.TAKE_OVER if job.checkpoint.take_over else Access.CLAIM,
                    )
                )
            if checkpointer is None or not restore(checkpointer, state, stepper, progress):
                first_weights(stepper.model, job)
            run_steps(job, here, stepper, progress, state, checkpointer, metrics)


def first_weights(model: Decoder, job: JobConfig) -> None:
    """Give a model that is trained for the first time its weights.

    Raises:
        UserError: `train.init_from` is not a folder of weights for `job.model`.
    """
    if job.train.init_from is None:
        init_weights(model, job.train.seed)
        return
    folder = WeightFolder(job.train.init_from)
    folder.check_model(job.model)
    read_weights(model, folder)
    log.info("the weights in %s are trained on", job.train.init_from)


def restore(checkpointer: Checkpointer, state: dict[str, Any], stepper: Stepper, progress: DataProgress) -> bool:
    """Load the newest good checkpoint; whether there is one.

    Raises:
        UserError: it was trained on other data.
    """
    step = checkpointer.restore(state)
    if step == 0:
        return False
    if progress.loaded is not None:
        progress.data.check(progress.loaded)
    progress.step = step
    set_step(stepper.optimizer, progress.updates)
    if stepper.optim.decay_steps is not None:
        progress.horizon = stepper.optim.decay_steps
    elif progress.horizon != stepper.train.steps:
        log.warning(
            "train.steps is %d, and the learning rate decays until step %d as before: optim.decay_steps changes that",
            stepper.train.steps,
            progress.horizon,
        )
    stepper.horizon = progress.horizon
    return True


def run_steps(
    job: JobConfig,
    here: worker.WorkerContext,
    stepper: Stepper,
    progress: DataProgress,
    state: dict[str, Any],
    checkpointer: Checkpointer | None,
    metrics: MetricsFile | None,
) -> None:
    """Steps from `progress.step` to the last, or to a stop.

    At the boundary after a skipped step nothing is saved, and nobody stops: whether its state is any good shows in the
    next one. The last step has no next one, so its state counts as unhealthy then.
    """
    if progress.step >= job.train.steps:
        log.info("the checkpoint is of step %d and train.steps is %d: nothing is left", progress.step, job.train.steps)
    is_due = False
    while progress.step < job.train.steps:
        began_s = time.perf_counter()
        result = stepper.step(progress.step)
        progress.count(skipped=bool(result.skipped))
        step = progress.step
        step_s = time.perf_counter() - began_s
        worker.heartbeat(step, step_s=step_s)
        if here.rank == 0:
            _report(job, here, stepper, step, result, step_s, metrics)
        reason = worker.should_stop()
        last = step == job.train.steps
        is_due = is_due or step % job.checkpoint.every == 0
        if result.skipped:
            _tell_skipped(job, here, progress, result)
            if progress.skipped_in_row >= job.train.max_skipped:
                why = f"{progress.skipped_in_row} steps in a row were skipped up to step {step}, since {result.skipped}"
                raise _give_up(job, progress, checkpointer, why)
            if not last:
                if reason:
                    worker.event(TrainerEvent.STOP_POSTPONED, step=step, reason=reason)
                continue
        if checkpointer is not None and (reason or last or is_due):
            is_due = False
            if reason == "drain" or last:
                checkpointer.announce_end()  # whoever is to go on elsewhere waits for the save
            with worker.untimed():
                bad = first_not_finite(state)
                healthy = worker.on_all_ranks(not bad and not result.skipped)
                checkpointer.save(step, state, wait=bool(reason) or last, healthy=healthy)
                if last and not worker.on_all_ranks(checkpointer.wait()):
                    raise NotSaved(f"step {step} is the last and could not be saved to {job.checkpoint.url}")
                if not healthy and not result.skipped:
                    raise _give_up(job, progress, checkpointer, _tell_bad(step, bad))
        if result.skipped:
            why = f"step {step}, the last, was skipped, since {result.skipped}"
            raise _give_up(job, progress, checkpointer, why)
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
        if worker.on_all_ranks(checkpointer.wait()):
            return True
    log.warning("step %d could not be saved: the stop (%s) waits for the next step boundary", step, reason)
    worker.event(TrainerEvent.STOP_POSTPONED, step=step, reason=reason)
    return False


def _tell_skipped(job: JobConfig, here: worker.WorkerContext, progress: DataProgress, result: StepResult) -> None:
    """An event from rank 0, and one from each rank in whose own sequences it began: its data, or its hardware."""
    in_row = progress.skipped_in_row
    if not math.isfinite(result.own_loss):
        log.warning("step %d: the loss of this rank's sequences is %s", progress.step, result.own_loss)
        worker.event(TrainerEvent.LOSS_NOT_FINITE, step=progress.step, loss=str(result.own_loss))
    if here.rank == 0:
        limit = job.train.max_skipped
        log.warning(
            "step %d is skipped (%d in a row; %d end the job): %s", progress.step, in_row, limit, result.skipped
        )
        worker.event(TrainerEvent.STEP_SKIPPED, step=progress.step, reason=result.skipped, in_row=in_row, limit=limit)


def _tell_bad(step: int, bad: str) -> str:
    """`bad`: this rank's first tensor with what is not finite, "" where it has none but another rank does."""
    if bad:
        log.warning("step %d: %s is not finite on this rank", step, bad)
        worker.event(TrainerEvent.STATE_NOT_FINITE, step=step, tensor=bad)
    return f"the state after step {step} is not finite" + (f" ({bad})" if bad else "")


def _give_up(job: JobConfig, progress: DataProgress, checkpointer: Checkpointer | None, why: str) -> NotFinite:
    """The error that ends the job, and names the checkpoint to go back to. A collective."""
    worker.gave_up()
    url = job.checkpoint.url
    if checkpointer is None or url is None:
        return NotFinite(f"{why}; there is no checkpoint, since checkpoint.url is not set")
    checkpointer.wait()
    newest, good = from_rank_0(lambda: go_back_to(_healthy_steps(url), progress.step, progress.skipped_in_row))
    if newest < 0:
        return NotFinite(f"{why}; there is no healthy checkpoint in {url}")
    told = f"{why}; the newest healthy checkpoint in {url} is of step {newest}"
    if good != newest:
        told += f", the very state that fails: to go on from that of step {good}, remove it"
    return NotFinite(told)


def _healthy_steps(url: str) -> list[int]:
    try:
        with locate(url) as location:
            rows = summaries(location)
    except NoCheckpoint:
        return []
    except StorageError as error:
        log.warning("the checkpoints in %s cannot be listed: %s", url, error)
        return []
    return [row.step for row in rows if row.step is not None and row.state in ("committed", "stock")]


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
                loss=result.loss if math.isfinite(result.loss) else None,
                grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
                lr=result.lr,
                tokens=step * job.train.global_batch * job.train.seq_len,
                load_max=float((result.load_LE.amax(dim=1) / result.load_LE.mean(dim=1)).max()),
                step_s=step_s,
                generation=here.generation,
                world_size=here.world_size,
                mesh={"replicate": plan.replicate, "shard": plan.shard, "expert": plan.expert},
                ts=time.time(),
                skipped=result.skipped,
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
