"""`train(job)` on every rank, under `elastic-moe run`, torchrun, or plain Python."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from elastic_moe import heap
from elastic_moe.config import JobConfig, mesh_spec
from elastic_moe.errors import Stopped, UserError
from elastic_moe.events import TrainerEvent
from elastic_moe.huggingface.config import Upcycling
from elastic_moe.huggingface.folder import WeightFolder
from elastic_moe.model.compile_cache import cache_obstacle
from elastic_moe.model.decoder import Decoder
from elastic_moe.parallel import build_mesh, init_weights, read_weights
from elastic_moe.trainer.changes import changes
from elastic_moe.trainer.config import CheckpointConfig
from elastic_moe.trainer.loop import Loop
from elastic_moe.trainer.metrics import SaveCounts
from elastic_moe.trainer.optimizer import set_step
from elastic_moe.trainer.room import check_room, room_of, share_of
from elastic_moe.trainer.schedule import may_move
from elastic_moe.trainer.setup import set_up
from elastic_moe.trainer.signals import StopSignals
from elastic_moe.trainer.state import DataProgress, DataState, training_state
from elastic_moe.trainer.step import Stepper
from elastic_moe.trainer.telling import open_teller
from elastic_moe.trainer.trackers import check_installed
from elastic_moe.trainer.world import choose_device, choose_plan, process_group
from launcher import Environment, MeshPlan, whole_number, worker
from storage import Access, Checkpointer, JobIdentity, SavingOptions, StorageError, UsageError, WrongModel

log = logging.getLogger(__name__)


def train(job: JobConfig) -> None:
    """Train `job` to its last step, or until the launcher asks for a stop.

    Starts from the newest good checkpoint at `checkpoint.url`, whatever world and mesh wrote it. On a stop it saves
    at that step boundary, says so to the agent, and returns: the caller exits with 0 either way.

    Raises:
        UserError, launcher.UsageError: the job does not fit the world, the data or the checkpoint; or a variable by
            which ranks find each other is not what it must be.
        NotSaved: the last step could not be saved.
        NotFinite: too many steps in a row were skipped, or the last one, or the model holds what is not finite.
        Stopped: there is no agent, and a signal asked for a stop.
    """
    check_installed(job.train.tensorboard, job.train.wandb)
    here = worker.context(set_device=False)  # the job says which
    if job.train.exact:
        # A CPU kernel that splits a sum over threads rounds it by their number.
        torch.set_num_threads(1)
    device = choose_device(job.train.device, here.local_rank)
    if device.type == "cpu":
        heap.keep_freed()
    if (obstacle := cache_obstacle()) and not job.train.compile:  # else it is told where layers are to be compiled
        log.info("torch.compile could keep nothing here: %s", obstacle)
    under_agent = Environment.from_env(os.environ).channel is not None
    num_local = whole_number(os.environ, "LOCAL_WORLD_SIZE", 1, at_least=1)
    with StopSignals(under_agent=under_agent) as signals, process_group(device):
        num_sharing, room_bytes = num_local if device.type == "cpu" else 1, room_of(device)
        plan = choose_plan(job, here, num_local, _least_share(share_of(room_bytes, num_sharing), device))
        check_room(plan, mesh_spec(job), num_ranks=num_sharing, room_bytes=room_bytes, may_grow=under_agent)
        meshes = build_mesh(plan, device)
        stepper, progress = set_up(job, meshes, here.rank, device)
        state = training_state(stepper.model, stepper.optimizer, progress)
        with contextlib.ExitStack() as stack:
            saves = SaveCounts()
            checkpointer = _open_checkpoints(stack, job.checkpoint, plan, saves)
            if checkpointer is None or not restore(checkpointer, state, stepper, progress, job):
                first_weights(stepper.model, job)
            teller = stack.enter_context(open_teller(job, here, plan, device, progress.step))
            signals.begin()
            Loop(job, here, stepper, progress, state, checkpointer, teller, signals, saves).run()
        if signals.received and progress.step < job.train.steps:
            where = f"its state is in {job.checkpoint.url}" if job.checkpoint.url else "without a checkpoint.url"
            raise Stopped(f"{signals.received.name} stopped the training after step {progress.step}, {where}")


def _least_share(share_bytes: int, device: torch.device) -> int:
    """What the rank with the least memory may take: all make the same plan. A collective."""
    least = torch.tensor(share_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


def _open_checkpoints(
    stack: contextlib.ExitStack, config: CheckpointConfig, plan: MeshPlan, saves: SaveCounts
) -> Checkpointer | None:
    """Open what the run is saved to, until `stack` ends; None where it is not saved. A collective.

    Raises:
        UserError: it cannot be, by what the job says.
    """
    if config.url is None:
        if (said := sorted(config.model_fields_set - {"url"})) and dist.get_rank() == 0:
            log.warning("checkpoint.%s is set, but nothing is saved without a checkpoint.url", " and ".join(said))
        return None
    try:
        return stack.enter_context(
            Checkpointer(
                config.url,
                keep=config.keep,
                job=JobIdentity(mesh={"replicate": plan.replicate, "shard": plan.shard, "expert": plan.expert}),
                access=Access.TAKE_OVER if config.take_over else Access.CLAIM,
                on_event=saves.hear,
                **_saving_options(config),
            )
        )
    except UsageError as error:
        raise UserError(f"checkpoint.url: {error}") from error


def _saving_options(config: CheckpointConfig) -> SavingOptions:
    return {
        "every": config.every,
        "ram_every": config.ram_every,
        "backlog": config.backlog,
        "prefix_spread": config.prefix_spread,
        "staging": config.staging,
        "check_replicas": config.check_replicas,
    }


def first_weights(model: Decoder, job: JobConfig) -> None:
    """Give a model that is trained for the first time its weights.

    Raises:
        UserError: `train.init_from` is not a folder of weights for `job.model`.
    """
    if job.train.init_from is None:
        init_weights(model, job.train.seed)
        return
    try:
        folder = WeightFolder(job.train.init_from, Upcycling(job.model.num_experts, job.model.top_k))
        folder.check_model(job.model)
        read_weights(model, folder, job.train.seed)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error
    how = ", whose layers each become experts that begin alike," if folder.is_dense else ""
    log.info("the weights in %s%s are trained on", job.train.init_from, how)


def restore(
    checkpointer: Checkpointer, state: dict[str, Any], stepper: Stepper, progress: DataProgress, job: JobConfig
) -> bool:
    """Load the newest good checkpoint; whether there is one.

    Raises:
        UserError: it was trained on other data, or is of another model.
    """
    try:
        step = checkpointer.restore(state)
    except WrongModel:
        if job.checkpoint.url is not None:
            _explain_misfit(job.checkpoint.url, progress.data)
        raise
    if step == 0:
        return False
    if progress.loaded is not None:
        other_data = progress.data.check(progress.loaded, may_change=job.data.may_change)
        if dist.get_rank() == 0:
            _tell_changes(step, other_data, changes(progress.loaded, progress.data))
    progress.step = step
    set_step(stepper.optimizer, progress.updates)
    if stepper.optim.decay_steps is not None:
        progress.horizon = stepper.optim.decay_steps
    elif may_move(step, progress.horizon, stepper.train.steps, stepper.optim):
        progress.horizon = stepper.train.steps  # the rate has not begun to fall, so nothing jumps
    elif progress.horizon != stepper.train.steps:
        log.warning(
            "train.steps is %d, and the learning rate decays until step %d as before: optim.decay_steps changes that",
            stepper.train.steps,
            progress.horizon,
        )
    stepper.horizon = progress.horizon
    checkpointer.note(progress.step, state)
    return True


def _explain_misfit(url: str, data: DataState) -> None:
    """Raises UserError with the field of the model that makes a checkpoint's tensors others than the job's.

    Nothing where that cannot be found out: what does not fit has been told of the tensors.
    """
    from elastic_moe.trained import TrainedModel  # which a start that finds what it expects does not wait for

    try:
        with TrainedModel(url) as trained:
            saved = replace(data, model=trained.config.model_dump())
    except (StorageError, UserError) as error:
        log.info("the checkpoint's model is not known: %s", error)
        return
    data.check_model(saved)


def _tell_changes(step: int, other_data: str, changed: Sequence[str]) -> None:
    if other_data:
        log.warning(
            "the checkpoint of step %d was trained %s, and the job goes on with what it has now", step, other_data
        )
        worker.event(TrainerEvent.DATA_CHANGED, step=step, reason=other_data)
    for line in changed:
        log.info("%s", line)
    if changed:
        worker.event(TrainerEvent.JOB_CHANGED, step=step, reason="; ".join(changed))
