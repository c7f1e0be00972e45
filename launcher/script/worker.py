"""What a script and the agent that runs it tell each other.

Under `elastic-moe run` these calls tell the agent how far this worker is and learn from it when to stop at a step
boundary; under plain `torchrun` or `python` every one of them is a no-op with a sensible answer, so a script that
uses them needs no second code path::

    from launcher import worker

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
import numbers
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from launcher.environment import Environment, whole_number
from launcher.errors import UsageError
from launcher.events import EventName, append_event
from launcher.rounds.mesh import MeshPlan
from launcher.script.step_events import StepTeller, claim
from launcher.script.stragglers import WINDOW, Pace, Straggler, find, pack, unpack
from launcher.workers.channel import Channel, StopReason

log = logging.getLogger(__name__)

_STEP_LIMIT = 1 << 63
_SHOWN_CHARS = 80


class Stop(StrEnum):
    """Why a script is asked to stop at a step boundary, and to be run again."""

    MEMBERSHIP = "membership"
    """Nodes have come or gone, and the next round is to be formed."""
    DRAIN = "drain"
    """A node is to leave, perhaps all of them: the job may go on elsewhere, or not."""


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


class Worker:
    """This process as a worker. A script needs no more than one, `launcher.worker`.

    The variables that the agent sets are read when they are needed, from `env`; the channel to it is opened once.
    `event` and `alive` may be called from any thread, all else from the training's.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self.on_event: Callable[[str], None] | None = None
        """Called with the name of each event that `event` has written, in the thread that wrote it."""
        self.num_signs = 0
        """How often `alive` was called."""
        self._env = env
        self._has_device = False
        self._pace = Pace()
        self._straggling: Straggler | None = None
        self._num_untimed = 0

    def context(self, *, set_device: bool = True) -> WorkerContext:
        """Read the environment that the agent (or torchrun, or nobody) gave this process.

        Call it early, before `init_process_group`: the agent learns from it that this script reports its progress, and
        will not stop it in the middle of a long start. The first call also makes the accelerator of this local rank
        torch's current device (as `torch.accelerator.set_device_index(local_rank)` does), where there is one and the
        script has not chosen another before; `set_device=False` leaves that to the script. Without an accelerator,
        also where torch is built for one, it touches none.

        Raises:
            UsageError: a variable does not hold what it must.
        """
        _ = self._channel  # which tells the agent that there is somebody
        here = self._context()
        if set_device and self._env.get("LOCAL_RANK") and not self._has_device:
            from launcher.script.ranks import use_own_device

            use_own_device(here.local_rank)
            self._has_device = True
        return here

    def heartbeat(self, step: int, *, busy_s: float | None = None, step_s: float | None = None) -> None:
        """Tell the agent that `step` steps are complete, counted over the whole job. Costs a few stores to memory.

        A number that comes again is a step that is done again: `elastic-moe report` counts it as such. Now and then how
        far this node is goes to `events.jsonl` as well.

        Args:
            step: a whole number from 0 to 2**63 - 1; numpy's count as such.
            busy_s: the seconds of this step in which this rank did not wait for others, where the script knows them (on
                a GPU from events around its own kernels); `should_stop` finds stragglers by it. Without it they are
                found by CPU time.
            step_s: how long this step took, if the script knows; of the first one nobody else can.

        Raises:
            UsageError: `step` is anything else; without an agent, too.
        """
        step = _checked(step)
        if self._channel:
            self._channel.beat(step)
            if self._teller and (told := self._teller.beat(step, time.monotonic(), step_s)):
                self.event(told[0], **told[1])
        if busy_s is not None:
            self._pace.tell_busy(busy_s)

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside may take much longer than a step: saving, evaluating. One may lie within another.

        The agent then does not take its length for a hang before it is as long as a start-up may be, nor learns from it
        how long a step is.
        """
        channel = self._channel
        self._num_untimed += 1
        if channel:
            channel.begin_untimed()
        try:
            yield
        finally:
            self._num_untimed -= 1
            if channel and not self._num_untimed:
                channel.end_untimed()

    def alive(self) -> None:
        """Tell the agent that this worker is at work, at what is no step: at its data before the first one, say.

        The time after which it counts as hung begins anew, and nothing is learnt of how long steps are. Costs as little
        as a heartbeat.
        """
        self.num_signs += 1
        if self._channel:
            self._channel.sign()

    def should_stop(self) -> Stop | None:
        """Whether to stop at this step boundary, and why (a `Stop` is a str, "membership" or "drain"); None goes on.

        A collective: every rank must call it at the same step, and every rank gets the same answer, because the agents'
        requests reach the ranks at different moments. One all-reduce of one number on the default process group; every
        32nd is longer by two numbers a rank, and tells which rank keeps the others waiting.
        """
        reason = self._channel.stop_request() if self._channel else StopReason.NONE
        if Environment.from_env(self._env).channel and whole_number(self._env, "WORLD_SIZE", 1) > 1:
            reason = self._agree(reason)
        return None if reason is StopReason.NONE else Stop[reason.name]

    def on_all_ranks(self, value: bool) -> bool:
        """Whether `value` is true on every rank. A collective on the default process group, where there is one."""
        from launcher.script.ranks import highest

        return not highest([float(not value)])[0]

    def yielded(self, step: int) -> None:
        """Say that this worker saved its state after `step` steps and exits with 0 in order to be run again.

        Without it an exit with 0 means that the job is done.

        Raises:
            UsageError: as `heartbeat`.
        """
        step = _checked(step)
        if self._channel:
            self._channel.beat(step)
            self._channel.yielded()

    def gave_up(self) -> None:
        """Say that this worker is about to end with an error that would come again: the agent ends the job (exit code
        70) instead of restarting it. Every rank that fails so should say it.
        """
        if self._channel:
            self._channel.gave_up()

    def event(self, name: str, **fields: Any) -> None:
        """Append an event to the agent's `events.jsonl`; a no-op without an agent."""
        told = Environment.from_env(self._env)
        if told.events:
            append_event(
                told.events,
                run_id=told.run_id,
                node=told.node,
                generation=told.generation,
                event=name,
                fields={"rank": whole_number(self._env, "RANK"), **fields},
            )
            if self.on_event is not None:
                self.on_event(name)

    # --- what the agent has set up

    def _context(self) -> WorkerContext:
        told = Environment.from_env(self._env)
        return WorkerContext(
            rank=whole_number(self._env, "RANK"),
            local_rank=whole_number(self._env, "LOCAL_RANK"),
            world_size=whole_number(self._env, "WORLD_SIZE", 1, at_least=1),
            generation=told.generation,
            lineage=told.lineage,
            run_id=told.run_id or self._env.get("TORCHELASTIC_RUN_ID", ""),
            mesh=_mesh(told.mesh) if told.mesh else None,
        )

    @functools.cached_property
    def _channel(self) -> Channel | None:
        path = Environment.from_env(self._env).channel
        if not path:
            return None
        try:
            channel = Channel.attach(path)
        except (OSError, ValueError) as error:
            log.warning("no heartbeat to the agent: %s", error)
            return None
        # An interpreter with torch in it takes longer to end than many a step.
        atexit.register(channel.begin_untimed)
        return channel

    @functools.cached_property
    def _teller(self) -> StepTeller | None:
        told = Environment.from_env(self._env)
        return StepTeller() if told.events and told.channel and claim(told.channel, told.generation) else None

    # --- stragglers

    def _agree(self, reason: StopReason) -> StopReason:
        import torch.distributed as dist

        from launcher.script.ranks import highest

        if not dist.is_initialized():
            return reason
        figures = self._pace.arrive(time.perf_counter(), time.thread_time())
        told = [float(reason)] + (pack(figures, dist.get_rank(), dist.get_world_size()) if figures else [])
        agreed = highest(told)
        self._pace.leave(time.perf_counter(), time.thread_time())
        if figures:
            self._tell_straggling(unpack(agreed[1:]), dist.get_rank())
        return StopReason(int(agreed[0]))

    def _tell_straggling(self, figures: list[tuple[float, float]], rank: int) -> None:
        """Whoever is slow says so itself, once when it begins and once when it ends: it knows its host."""
        before, self._straggling = self._straggling, next((s for s in find(figures) if s.rank == rank), None)
        if (slow := self._straggling) and not before:
            log.warning("rank %d is slow: %.3f s a step of its own, the others %.3f s", rank, slow.own_s, slow.others_s)
            self.event(
                EventName.STRAGGLER,
                by=slow.by,
                factor=round(slow.factor, 2),
                own_s=round(slow.own_s, 6),
                others_s=round(slow.others_s, 6),
                step_s=round(slow.step_s, 6),
                num_steps=WINDOW,
            )
        elif before and not slow:
            self.event(EventName.STRAGGLER_RECOVERED, by=before.by, num_steps=WINDOW)


def _mesh(text: str) -> MeshPlan:
    try:
        return MeshPlan.from_json(text)
    except ValueError as error:
        raise UsageError(f"{Environment.variable('mesh')} is {text[:_SHOWN_CHARS]!r}: {error}") from None


def _checked(step: object) -> int:
    """`step` as a plain int; a bool is no number of steps."""
    if not isinstance(step, bool) and isinstance(step, numbers.Integral) and 0 <= int(step) < _STEP_LIMIT:
        return int(step)
    shown = " ".join(repr(step).split())
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise UsageError(f"step is {shown} ({type(step).__name__}); it must be a whole number from 0 to 2**63 - 1")


worker = Worker()
"""The worker that this process is."""
