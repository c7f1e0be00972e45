"""Watches workers that run but make no progress, and has their stacks written before they are ended."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.events import Emit, EventName
from launcher.health import stacks
from launcher.health.hangs import Evidence, Hang, HangRules, HangWatch, suspects
from launcher.rounds.failures import FailureClass
from launcher.rounds.records import HANG, Failure, Status
from launcher.workers.local_workers import LocalWorkers

log = logging.getLogger(__name__)

Announce = Callable[..., None]
"""`Member.announce`."""
_OUTPUT_PERIOD_S = 1.0
_NUM_DESCRIBED = 3


@dataclass(frozen=True)
class WatchedWorkers:
    """The workers of one generation on this node."""

    generation: int
    ranks: Mapping[int, int]
    """Their global ranks, by local rank."""
    pids: Mapping[int, int]
    """The agent's child processes that stand for them, by local rank."""
    workers: LocalWorkers
    outputs: Sequence[Path] = ()
    """The files that get their output, where silence is watched on this node."""


class Watchdog:
    """Finds hangs among this node's workers, and collects what they show. For the agent's thread only."""

    def __init__(self, rules: HangRules, log_dir: Path | None, emit: Emit) -> None:
        """`log_dir` gets a folder `stacks`; None: a folder is made where temporary files go, once there is a hang."""
        self._watch = HangWatch(rules)
        self._log_dir = log_dir
        self._emit = emit
        self._watched: WatchedWorkers | None = None
        self._output: tuple[tuple[int, int], ...] | None = None
        self._output_due_s = 0.0
        self._dumped = False

    @property
    def rules(self) -> HangRules:
        """The limits that the user asked for."""
        return self._watch.rules

    def begin(self, watched: WatchedWorkers) -> None:
        """Watch the workers of a new generation, started now."""
        self._watched = watched
        self._output, self._output_due_s = None, 0.0
        self._dumped = False
        self._watch.begin()

    def look(self, now_s: float, *, exited: Collection[int], paused: bool) -> Hang | None:
        """Return a hang once workers have made no progress for too long; the caller decides what to do about it."""
        assert self._watched is not None
        if self._watched.outputs and now_s >= self._output_due_s:
            self._output = tuple(_size_and_time(path) for path in self._watched.outputs)
            self._output_due_s = now_s + _OUTPUT_PERIOD_S
        progress = self._watched.workers.progress()
        return self._watch.look(progress, now_s, exited=exited, output=self._output, paused=paused)

    def dump_stacks(self, reason: str) -> tuple[Evidence, ...]:
        """Have the workers' stacks written to the log directory, once a generation, and return the evidence in them.

        Bounded to a few seconds, whatever the workers do.
        """
        if self._dumped or self._watched is None:
            return ()
        self._dumped = True
        watched, progress = self._watched, self._watched.workers.progress()
        workers = {
            local_rank: stacks.StackTarget(
                rank=rank,
                pid=watched.workers.forked_pid(local_rank) or watched.pids[local_rank],
                path=watched.workers.stacks_path(local_rank),
                step=progress[local_rank].step,
            )
            for local_rank, rank in watched.ranks.items()
        }
        found = stacks.collect(workers)
        evidence = tuple(stack.evidence for stack in found.values())
        folder, failed = "", ""
        try:
            folder = str(stacks.write(found, self._folder() / f"generation-{watched.generation}"))
        except OSError as error:
            failed = str(error)
            log.error("stacks are not kept: %s\n%s", error, "\n".join(stack.text for stack in found.values()))
        self._emit(
            EventName.STACKS_DUMPED,
            generation=watched.generation,
            reason=reason,
            ranks=[e.rank for e in evidence],
            path=folder,
            missing=[e.rank for e in evidence if not e.frame],
            frames={str(e.rank): e.frame for e in evidence},
            error=failed,
        )
        return evidence

    def report(self, hang: Hang, announce: Announce) -> str:
        """Announce a hang: the others hear of it first, so that all have stacks written before any worker is ended.

        Returns:
            The reason for which this node's workers are to be ended.
        """
        assert self._watched is not None
        late = [self._watched.ranks[local_rank] for local_rank in hang.ranks]
        reason = f"{HANG}{hang}"
        announce(Status.STOPPING, reason=reason, failure=_failure(late[0], hang.step, str(hang)))
        evidence = self.dump_stacks(reason)
        failure, behind = _blame(evidence, str(hang)) or _failure(late[0], hang.step, str(hang)), suspects(evidence)
        announce(Status.STOPPING, reason=reason, failure=failure)
        self._emit(
            EventName.HANG_DETECTED,
            generation=self._watched.generation,
            kind=hang.kind,
            ranks=late,
            suspects=list(behind),
            step=hang.step,
            seconds=round(hang.seconds, 3),
            limit_s=round(hang.limit_s, 3),
            message=failure.message,
        )
        return reason

    def answer(self, reason: str, announce: Announce) -> None:
        """Explain a hang that another node has found: the cause may be among workers of this one, about to be ended."""
        failure = _blame(self.dump_stacks(reason), "it makes no progress")
        if failure is not None and failure.kind is FailureClass.HANG:
            announce(Status.STOPPING, failure=failure)

    def _folder(self) -> Path:
        if self._log_dir is None:
            self._log_dir = Path(tempfile.mkdtemp(prefix="elastic-moe-log-"))
        return self._log_dir / "stacks"


def _blame(evidence: Sequence[Evidence], what: str) -> Failure | None:
    """Make the failure of the rank that the others probably wait for, or of a victim where all of this node's wait."""
    if not evidence:
        return None
    behind = suspects(evidence)
    telling = [e for e in evidence if e.rank in behind] or [e for e in evidence if not e.waits] or list(evidence)
    first, is_victim = telling[0], all(e.waits and not e.stopped for e in telling)
    message = "; ".join([what, *(_describe(e) for e in telling[:_NUM_DESCRIBED])])
    return _failure(first.rank, first.step, message, FailureClass.LOST_PEER if is_victim else FailureClass.HANG)


def _failure(rank: int, step: int, message: str, kind: FailureClass = FailureClass.HANG) -> Failure:
    return Failure(rank=rank, exit_code=-signal.SIGKILL, message=message, ts=time.time(), kind=kind, step=step)


def _describe(e: Evidence) -> str:
    if e.stopped:
        return f"rank {e.rank} is stopped, after step {e.step}"
    if e.waits:
        return f"rank {e.rank} waits for others at {e.frame}"
    return f"rank {e.rank} is behind: after step {e.step}, " + (f"at {e.frame}" if e.frame else "without a stack")


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (-1, 0)
    return found.st_size, found.st_mtime_ns
