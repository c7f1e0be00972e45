"""The agent of one node: torch's `LocalElasticAgent`, with a run loop of our own.

torch starts, redirects and reaps the worker processes; when to start and stop them is decided here, from the local
view of the membership (`Member`) and from the workers' channels. The loop differs from torch's in four ways: it
reacts to a lost peer and not to the collective's error that follows; a failure is announced before anything is
killed; workers that know how are asked to stop at a step boundary; and an agent that may no longer hold its lease
kills its workers.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError

from launcher.coordination.member import Member
from launcher.drain.signals import handle_signals, stop_at_once
from launcher.elastic.parts import AgentParts
from launcher.elastic.supervisor import Supervisor
from launcher.environment import Environment
from launcher.errors import Drained, JobClosed, RendezvousTimeout
from launcher.events import EventName
from launcher.health import postmortem
from launcher.health.devices import DeviceMemory
from launcher.health.watchdog import WatchedWorkers
from launcher.node.supervision import EndWorkers, FinishJob
from launcher.rounds.records import HANG, SUCCEEDED, Failure, Round, Status
from launcher.text import name_some
from launcher.torch_private import AgentSteps
from launcher.workers import boot
from launcher.workers.local_workers import LocalWorkers
from launcher.workers.process_tree import GRACE_AFTER_SUCCESS_S, GRACE_S
from launcher.workers.warm import COLD

log = logging.getLogger(__name__)

_POLL_S = 0.05
_LINGER_S = 30.0
_DEVICE_MEMORY_S = 15.0
_KILL_S = 5.0


class ElasticAgent(AgentSteps, LocalElasticAgent):
    """One per node. `run` returns when the job is done, failed, or this node has left it."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        member: Member,
        parts: AgentParts,
        *,
        start_method: str,
        log_line_prefix_template: str | None = None,
    ) -> None:
        super().__init__(
            spec,
            logs_specs,
            start_method=start_method,
            log_line_prefix_template=log_line_prefix_template,
            shutdown_timeout=int(parts.graces.stop_s),
        )
        self._member = member
        self._rendezvous_handler = parts.rendezvous
        self._events = parts.events
        self._runtime_dir = parts.runtime_dir
        self._graces = parts.graces
        self._command = tuple(parts.command)
        self._warm = parts.warm
        self._leftovers = parts.leftovers
        self._watchdog = parts.watchdog
        self._vitals = parts.vitals
        self._sidecar = parts.sidecar
        self._device_memory = DeviceMemory()
        self._pids: list[int] = []
        self._workers = LocalWorkers(parts.runtime_dir, 0, ())
        self._started_s = 0.0
        self._drain, self._signals = parts.drain, parts.signals
        self._supervisor = Supervisor(member, parts.drain, parts.graces, self._emit, parts.watchdog)
        self._supervising = False
        self._oom_kills_before = 0
        self._failures: list[Failure] = []

    # --- torch's steps, with what ours know better

    def assign_ranks(self, group_rank: int, spec: WorkerSpec) -> list[Worker]:
        """Ranks follow from the round: no exchange through the store, and nodes may run different numbers."""
        current = self._current_round()
        slots = [participant.slots for participant in current.participants]
        base_rank = sum(slots[:group_rank])
        spec.local_world_size = slots[group_rank]
        return [
            Worker(
                local_rank=local_rank,
                global_rank=base_rank + local_rank,
                role_rank=base_rank + local_rank,
                world_size=current.world_size,
                role_world_size=current.world_size,
            )
            for local_rank in range(slots[group_rank])
        ]

    def start_workers(self) -> dict[int, Any]:
        """Start the workers of the round that was joined, warm if that can be, and have them watched."""
        current, group = self._current_round(), self.get_worker_group()
        self._workers.close()
        local_ranks = [worker.local_rank for worker in group.workers]
        self._workers = LocalWorkers(self._runtime_dir, current.generation, local_ranks)
        self._failures = []
        self._expect(current)
        self._oom_kills_before = postmortem.oom_kills()
        zygote = self._warm.socket_path() if self._warm else COLD
        group.spec.args = tuple(boot.command(self._command, zygote)[1:])
        # Scripts and log folders see the same count on every node: the rounds that ran before this one.
        pids = self.start_group(group.spec.max_restarts - (current.generation - 1))
        self.install_signal_handlers()  # torch has just installed its own
        self._started_s = time.monotonic()
        self._supervisor.begin(self._workers, self._started_s)
        self._vitals.begin(current)
        self._pids = list(pids.values())
        self._watch_workers(current)
        self._emit(
            EventName.WORKERS_STARTED,
            ranks=[worker.global_rank for worker in group.workers],
            pids=list(pids.values()),
            world_size=current.world_size,
            warm=zygote != COLD,
        )
        return pids

    def _expect(self, current: Round) -> None:
        """Tell the sidecar that its part in a restore comes: not before the first round, when there is none."""
        if self._sidecar is not None and current.generation > 1:
            self._sidecar.expect()

    def add_environment(self, environment: dict[str, str | None], local_rank: int) -> None:
        """Add the round, this node, and the paths that the worker shares with its agent."""
        current = self._current_round()
        told = Environment(
            generation=current.generation,
            lineage=current.lineage,
            run_id=self._rendezvous_handler.get_run_id(),
            node=self._member.node_id,
            zone=self._member.zone,
            address=self._member.address,
            mesh=current.mesh.to_json() if current.mesh else None,
            channel=self._workers.path(local_rank),
            stacks=self._workers.stacks_path(local_rank),
            events=self._events.path,
            checkpoint=self._vitals.checkpoint_path,
            service=Path(self._sidecar.address) if self._sidecar else None,
        )
        environment.update(told.to_env())

    def _current_round(self) -> Round:
        current = self._rendezvous_handler.round
        assert current is not None, "no round was joined"
        return current

    # --- the loop

    def run_generations(self) -> RunResult:
        """Form rounds and supervise their workers, until the job is done or this node leaves it."""
        self._device_memory.take_baseline()
        while True:
            try:
                self._leave_if_asked()  # a signal that came while the last generation was ended is only noted down
                self.form_group()
            except RendezvousClosedError:
                return self._closed()
            except RendezvousTimeoutError as error:
                raise RendezvousTimeout(str(error)) from error
            except Drained:
                self._leave_if_asked()
                raise
            self._supervising = True
            try:
                end = self._supervise(self._current_round().generation)
                if isinstance(end, RunResult):
                    return end
                self._end_generation(end)
            finally:
                self._supervising = False

    def _leave_if_asked(self) -> None:
        """Leave, if this node was asked to, where no workers run that would have to stop first."""
        if request := self._drain.current:
            self._supervisor.tell_drain(request)
            raise Drained(request.reason, request.exit_code)

    def _closed(self) -> RunResult:
        """End as the job did, which ended without this node: it was a spare, or another node's failure was the last."""
        outcome = self._member.outcome()
        if outcome == SUCCEEDED:
            self.get_worker_group().workers = []
            return RunResult(WorkerState.SUCCEEDED)
        raise JobClosed(outcome)

    def _supervise(self, generation: int) -> RunResult | EndWorkers:
        """Watch one generation to its end: the job's result, or why there has to be another round."""
        while True:
            self._member.wait(self._supervisor.pause_s)
            if self._warm is not None:
                self._warm.listen()
            self._vitals.look(self._workers)
            exit_codes = [worker.exit_code for worker in self._worker_exits()]
            match self._supervisor.look(generation, exit_codes, self._exited):
                case EndWorkers() as end:
                    return end
                case FinishJob():
                    return self._finish(generation)

    def _end_generation(self, end: EndWorkers) -> None:
        """Stop what still runs and be ready for another round, or leave if this node drains."""
        if not end.reason.startswith(HANG):  # what follows from another node's failure may have its cause here
            self._report_failures()  # before SIGTERM blurs it
        self._member.announce(Status.STOPPING, reason=end.reason)
        self._capture(end.capture_s)
        began_s = time.monotonic()
        self.stop_workers(signal.SIGTERM, end.grace_s)
        # Forked workers must be gone as well before anybody hears that this node is ready (torch waited only for what
        # stands for them): they would train, or hold memory, beside the new ones.
        linger_s = max(0.0, self._drain.kill_by(began_s + end.grace_s + _LINGER_S) - time.monotonic())
        if pids := self._workers.end_forked_workers(linger_s):
            self._emit(EventName.WORKERS_LINGER, pids=pids, seconds=round(linger_s, 3))
        ended = self._end_leftovers(GRACE_S if end.grace_s else 0.0)
        self.get_worker_group().state = WorkerState.STOPPED
        last = self._workers.last_step_fields()
        self._emit(EventName.WORKERS_STOPPED, reason=end.reason, seconds=round(time.monotonic() - began_s, 3), **last)
        if request := self._drain.current:
            if not self._supervisor.have_yielded:
                self._emit(EventName.DRAIN_CUT_SHORT, reason=end.reason, step=last["step"], seconds=request.grace_s)
            raise Drained(request.reason, request.exit_code)
        # Only now is the node ready: new workers would run out of device memory that the old ones still hold.
        if held := self._device_memory.wait_free(
            [*self._pids, *self._workers.claimed_pids(), *ended], _DEVICE_MEMORY_S
        ):
            self._emit(EventName.DEVICE_MEMORY_HELD, reason=held, seconds=_DEVICE_MEMORY_S)

    def _finish(self, generation: int) -> RunResult | EndWorkers:
        """Wait until the other nodes' workers are done too: the job's result, or that another round is needed."""
        self._emit(EventName.WORKERS_DONE, **self._workers.last_step_fields())
        self._member.announce(Status.DONE)
        while self._member.outcome() != SUCCEEDED:
            if self._member.broken(generation) or self._supervisor.is_overdue():
                return EndWorkers("its workers are done, the job is not", self._graces.stop_s)
            self._member.wait(_POLL_S)
        # Not asked before all have ended well: where one has failed it ends the others in its own way.
        result = self.check_group()
        self.get_worker_group().state = result.state
        return result

    # --- failures

    def _worker_exits(self) -> list[postmortem.WorkerExit]:
        return postmortem.worker_exits(self.processes(), self._global_ranks(), self._workers.progress())

    def _report_failures(self) -> None:
        """Tell the others before anything is killed, and find out whether a peer's death is the cause."""
        around = postmortem.NodeCircumstances(
            lived_s=time.monotonic() - self._started_s,
            oom_kills=postmortem.oom_kills() - self._oom_kills_before,
            draining=self._drain.current is not None,
        )
        failures = postmortem.examine(self._worker_exits(), around)
        known = {failure.rank for failure in self._failures}
        news = [failure for failure in failures if failure.rank not in known]
        if not news:
            return
        self._failures = failures
        self._member.announce(Status.STOPPING, reason="worker failed", failure=postmortem.summarise(failures))
        self._member.doubt_peers()
        for failure in news:
            self._emit(
                EventName.WORKER_FAILED,
                rank=failure.rank,
                exit_code=failure.exit_code,
                pid=failure.pid,
                step=failure.step,
                message=failure.message,
                failure_class=failure.kind.value,
                place=failure.place,
            )

    def error_file_of(self, rank: int) -> str:
        """Say where a worker of the last generation wrote the error that ended it, "" if it was not this node's."""
        return next((worker.error_file for worker in self._worker_exits() if worker.rank == rank), "")

    # --- hangs

    def _watch_workers(self, current: Round) -> None:
        """Have the workers that were just started watched, and on the node of rank 0 their output too."""
        processes = self.processes()
        files = (*(p.stdout for p in processes), *(p.stderr for p in processes))
        silence = self._watchdog.rules.silence_s is not None and current.place_of(self._member.node_id) == 0
        self._watchdog.begin(
            WatchedWorkers(
                generation=current.generation,
                ranks=self._global_ranks(),
                pids={p.local_rank: p.process.pid for p in processes},
                workers=self._workers,
                outputs=[Path(file) for file in files if file not in ("", os.devnull)] if silence else (),
            )
        )

    def _exited(self) -> set[int]:
        """Return the local ranks of the workers that have ended."""
        return {p.local_rank for p in self.processes() if not p.is_alive}

    def _global_ranks(self) -> dict[int, int]:
        return {worker.local_rank: worker.global_rank for worker in self.get_worker_group().workers}

    # --- signals

    def install_signal_handlers(self) -> None:
        """Have SIGTERM, SIGHUP and others drain this node; a second one, SIGINT and SIGQUIT stop it at once."""
        handle_signals(self._on_signal, self._signals)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        received = signal.Signals(signum)
        gentle = received not in (signal.SIGINT, signal.SIGQUIT)
        if gentle and self._drain.ask_signal(received, time.monotonic()) and self._supervising:
            return
        stop_at_once(signum, frame)

    # --- the rest

    def _capture(self, timeout_s: float) -> None:
        """Have the state of workers kept that are about to be ended, unless this node has no time for it."""
        began_s = time.monotonic()
        if self._sidecar is None or timeout_s <= 0:
            return
        capture = self._sidecar.capture(timeout_s)
        if capture is None:
            return
        while not capture.done() and time.monotonic() < self._drain.kill_by(began_s + timeout_s):
            if self._member.fenced():
                break
            time.sleep(0.002)
        seconds = round(time.monotonic() - began_s, 3)
        self._emit(EventName.LIVE_STATE_CAPTURED, seconds=seconds, **capture.told())

    def stop_workers(self, signum: signal.Signals, timeout_s: float) -> None:
        """Stop the workers as torch does, but within what a drain or the lease leaves, as it is known by then."""
        ends_s = time.monotonic() + timeout_s
        alive = [process for process in self.processes() if process.is_alive]
        for process in alive:
            process.send(signum)
        while any(p.is_alive for p in alive) and time.monotonic() < self._drain.kill_by(ends_s):
            if self._member.fenced():
                break
            time.sleep(0.005)
        if self._workers.kill():  # then what stands for them ends by itself, and takes along what they have started
            ends_s = time.monotonic() + _KILL_S
            while any(p.is_alive for p in alive) and time.monotonic() < self._drain.kill_by(ends_s):
                time.sleep(0.005)
        self.kill_group(_KILL_S)

    def _end_leftovers(self, grace_s: float) -> list[int]:
        """End what the workers have left running; returns the pids of all that was there."""
        now_s = time.monotonic()
        found, left = self._leftovers.end(
            self._pids, max(0.0, min(grace_s, self._drain.kill_by(now_s + grace_s) - now_s))
        )
        if found:
            seconds = round(time.monotonic() - now_s, 3)
            self._emit(
                EventName.CHILDREN_ENDED,
                processes=name_some([str(p) for p in found]),
                left=name_some([str(p) for p in left]),
                seconds=seconds,
            )
        return [process.pid for process in found]

    def _emit(self, event: EventName, /, **fields: Any) -> None:
        self._events(event, generation=self._rendezvous_handler.generation, **fields)

    def close(self) -> None:
        """End what the gone workers have left running, and let go of their channels."""
        succeeded = self.get_worker_group().state is WorkerState.SUCCEEDED
        self._end_leftovers(GRACE_AFTER_SUCCESS_S if succeeded else GRACE_S)
        self._workers.close()
