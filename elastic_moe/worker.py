"""The worker's side of the launcher's contract.

Under `elastic-moe run` these calls tell the agent how far this worker is and learn from it when to stop at a step
boundary; under plain `torchrun` or `python` every one of them is a no-op with a sensible answer, so a script that
uses them needs no second code path::

    for step in range(start, steps):
        train_one_step()
        worker.heartbeat(step + 1)
        if reason := worker.should_stop():
            checkpoint(step + 1)
            worker.yielded(step + 1)
            break
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from elastic_moe.errors import UserError
from elastic_moe.steps import StepTeller, claim
from launcher.environment import Environment
from launcher.events import EventName, append_event
from launcher.health.stragglers import WINDOW, Pace, Straggler, find, pack, unpack
from launcher.rounds.mesh import MeshPlan
from launcher.workers.channel import Channel, StopReason
from storage.errors import UsageError
from storage.format.layout import as_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerContext:
    """Who this worker is. `mesh` is the agent's plan for this generation, None where no agent made one."""

    rank: int
    local_rank: int
    world_size: int
    generation: int
    lineage: str
    run_id: str
    mesh: MeshPlan | None


def context(*, set_device: bool = True) -> WorkerContext:
    """Read the environment that the agent (or torchrun, or nobody) gave this process.

    Call it early, before `init_process_group`: the agent learns from it that this script reports its progress, and will
    not be stopped in the middle of a long start. The first call also makes the accelerator of this local rank torch's
    current device (as `torch.accelerator.set_device_index(local_rank)` does), where there is one and the script has not
    chosen another before; `set_device=False` leaves that to the script. Without an accelerator, also where torch is
    built for one, it touches none.

    Raises:
        ValueError: a variable does not hold what it must.
    """
    _channel()
    here = _context()
    if set_device and "LOCAL_RANK" in os.environ:
        _set_device(here.local_rank)
    return here


@functools.cache
def _set_device(local_rank: int) -> None:
    from storage.ranks.devices import use_own_device

    use_own_device(local_rank)


def _context() -> WorkerContext:
    env, told = os.environ, Environment.from_env(os.environ)
    return WorkerContext(
        rank=int(env.get("RANK", "0")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        world_size=int(env.get("WORLD_SIZE", "1")),
        generation=told.generation,
        lineage=told.lineage,
        run_id=told.run_id or env.get("TORCHELASTIC_RUN_ID", ""),
        mesh=MeshPlan.from_json(told.mesh) if told.mesh else None,
    )


@functools.cache
def _channel() -> Channel | None:
    path = Environment.from_env(os.environ).channel
    if not path:
        return None
    try:
        channel = Channel.attach(path)
    except (OSError, ValueError) as error:
        log.warning("no heartbeat to the agent: %s", error)
        return None
    atexit.register(channel.set_untimed, True)  # an interpreter with torch in it takes longer to end than many a step
    return channel


def heartbeat(step: int, *, busy_s: float | None = None, step_s: float | None = None) -> None:
    """Tell the agent that `step` steps are complete, counted over the whole job. Costs a few stores to memory.

    A number that comes again is a step that is done again: `elastic-moe report` counts it as such. Now and then how far
    this node is goes to `events.jsonl` as well.

    `busy_s`: the seconds of this step in which this rank did not wait for others, where the script knows them (on a GPU
    from events around its own kernels); `should_stop` finds stragglers by it. Without it they are found by CPU time.
    `step_s`: how long this step took, if the script knows; of the first one nobody else can.

    Raises:
        UserError: `step` is no whole number from 0 to 2**63 - 1; without an agent, too.
    """
    step = _checked(step)
    if channel := _channel():
        channel.beat(step)
        _tell_step(step, step_s)
    if busy_s is not None:
        _pace().tell_busy(busy_s)


def _checked(step: object) -> int:
    try:
        return as_step(step)
    except UsageError as error:
        raise UserError(str(error)) from None


@functools.cache
def _teller() -> StepTeller | None:
    told = Environment.from_env(os.environ)
    return StepTeller() if told.events and told.channel and claim(str(told.channel), told.generation) else None


def _tell_step(step: int, step_s: float | None) -> None:
    if (teller := _teller()) and (told := teller.beat(step, time.monotonic(), step_s)):
        event(told[0], **told[1])


@functools.cache
def _pace() -> Pace:
    return Pace()


_num_untimed = 0


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """What happens inside may take much longer than a step: saving, evaluating.

    The agent then does not take its length for a hang before it is as long as a start-up may be, nor learns from it
    how long a step is.
    """
    global _num_untimed
    channel = _channel()
    _num_untimed += 1  # one may lie within another: an evaluation that saves
    if channel:
        channel.set_untimed(True)
    try:
        yield
    finally:
        _num_untimed -= 1
        if channel and not _num_untimed:
            channel.set_untimed(False)


def should_stop() -> str | None:
    """Whether to stop at this step boundary, and why: "membership", "drain", or None.

    A collective: every rank must call it at the same step, and every rank gets the same answer, because the agents'
    requests reach the ranks at different moments. One all-reduce of one number on the default process group; every 32nd
    is longer by two numbers a rank, and tells which rank keeps the others waiting (`launcher.health.stragglers`).
    """
    channel = _channel()
    reason = channel.stop_request() if channel else StopReason.NONE
    if Environment.from_env(os.environ).channel and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        reason = _agree(reason)
    return None if reason is StopReason.NONE else reason.name.lower()


def _agree(reason: StopReason) -> StopReason:
    import torch
    import torch.distributed as dist

    from storage.ranks.devices import collective_device

    if not dist.is_initialized():
        return reason
    figures = _pace().arrive(time.perf_counter(), time.thread_time())
    told = [float(reason)] + (pack(figures, dist.get_rank(), dist.get_world_size()) if figures else [])
    agreed = torch.tensor(told, dtype=torch.float64, device=collective_device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    everybody: list[float] = agreed.tolist()
    _pace().leave(time.perf_counter(), time.thread_time())
    if figures:
        _tell_straggling(unpack(everybody[1:]), dist.get_rank())
    return StopReason(int(everybody[0]))


_straggling: Straggler | None = None


def _tell_straggling(figures: list[tuple[float, float]], rank: int) -> None:
    """Whoever is slow says so itself, once when it begins and once when it ends: it knows its host."""
    global _straggling
    before, _straggling = _straggling, next((s for s in find(figures) if s.rank == rank), None)
    if _straggling and not before:
        log.warning(
            "rank %d is slow: %.3f s a step of its own, the others %.3f s",
            rank,
            _straggling.own_s,
            _straggling.others_s,
        )
        event(
            EventName.STRAGGLER,
            by=_straggling.by,
            factor=round(_straggling.factor, 2),
            own_s=round(_straggling.own_s, 6),
            others_s=round(_straggling.others_s, 6),
            step_s=round(_straggling.step_s, 6),
            num_steps=WINDOW,
        )
    elif before and not _straggling:
        event(EventName.STRAGGLER_RECOVERED, by=before.by, num_steps=WINDOW)


def yielded(step: int) -> None:
    """Say that this worker saved its state after `step` steps and exits with 0 in order to be run again.

    Without it an exit with 0 means that the job is done. Raises UserError as `heartbeat`.
    """
    step = _checked(step)
    if channel := _channel():
        channel.beat(step)
        channel.yielded()


def gave_up() -> None:
    """Say that this worker is about to end with an error that would come again: the agent ends the job (exit code 70)
    instead of restarting it. Every rank that fails so should say it.
    """
    if channel := _channel():
        channel.gave_up()


def event(name: str, **fields: Any) -> None:
    """Append an event to the agent's `events.jsonl`; a no-op without an agent."""
    told = Environment.from_env(os.environ)
    if told.events:
        here = _context()
        append_event(
            told.events,
            run_id=here.run_id,
            node=told.node,
            generation=told.generation,
            event=name,
            fields={"rank": here.rank, **fields},
        )
        if reporter := sys.modules.get("storage.events"):
            reporter.note_written(name)  # a Checkpointer's listener, perhaps: it writes the same event itself else
