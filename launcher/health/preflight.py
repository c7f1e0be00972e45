"""Checks before every round whether this node is fit to run workers; one that is not says why, and stays out.

A check is anything that keeps the contract of `Check`; `LaunchOptions.checks` takes more of them. Those that only ask
the kernel run at once (microseconds); those that start a process run beside one another, after the old workers have
ended, so that a user's own test finds the devices free.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.events import Emit, EventName
from launcher.health import devices

log = logging.getLogger(__name__)

_PAUSE_S, _PAUSE_S_MAX = 1.0, 60.0
PATIENCE_S = 10.0
"""With the graces that workers and their device memory have, this stays below a leader's patience with a node."""
_RUNS = "preflight runs"
_OVERTIME_S = 2.0
_LOOK_S = 0.1
_OUTPUT_MAX_CHARS = 300
_MIB = 1024 * 1024
_running: set[int] = set()  # process groups of commands that run now
_starting = threading.Lock()
_START_S = 1.0  # how long whoever ends all commands waits for one that is being started


class Check(Protocol):
    """One thing that must be well before workers start."""

    @property
    def name(self) -> str:
        """How events and logs name what is checked."""

    @property
    def timeout_s(self) -> float:
        """How long the check is waited for, beside others; 0 for one that answers at once."""

    def run(self) -> str:
        """Say why this node should not run workers now, "" if nothing speaks against it."""


@dataclass(frozen=True)
class PreflightRules:
    """What the user wants to have checked."""

    min_shm_mib: float = 16.0
    """Free in /dev/shm; a container has 64 MiB of it by default. 0: not checked."""
    min_disk_mib: float = 64.0
    """Free where logs and where temporary files go. 0: not checked."""
    commands: tuple[str, ...] = ()
    timeout_s: float = 60.0
    """For each command, and for the GPUs' driver."""


def standard_checks(rules: PreflightRules, folders: Sequence[Path]) -> tuple[Check, ...]:
    """Make the checks that the rules ask for; `folders` are those that need room on disk."""
    shm = [FreeSpace(Path("/dev/shm"), rules.min_shm_mib)] if rules.min_shm_mib else []
    disk = [FreeSpace(folder, rules.min_disk_mib) for folder in folders] if rules.min_disk_mib else []
    return (*shm, *disk, Gpus(rules.timeout_s), *(Command(c, rules.timeout_s) for c in rules.commands))


@dataclass(frozen=True)
class FreeSpace:
    """Checks that a file system has room: shared memory for data loaders and staging, disk for logs."""

    path: Path
    min_free_mib: float
    timeout_s: float = 0.0

    @property
    def name(self) -> str:
        """The check and its folder."""
        return f"free space in {self.path}"

    def run(self) -> str:
        """Say how little space is left, or that no inode is."""
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        free_mib = found.f_bavail * found.f_frsize / _MIB
        if free_mib < self.min_free_mib:
            return f"{self.path} has {free_mib:.0f} MiB free, and {self.min_free_mib:g} MiB are asked for"
        if found.f_files and not found.f_favail:
            return f"{self.path} has no inode free"
        return ""


class Gpus:
    """Checks that the driver answers for every GPU for which it has answered before. Costs nothing without a GPU."""

    name = "gpu"

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s if devices.present() else 0.0
        self._num_gpus = 0

    def run(self) -> str:
        """Say what the driver reports, that it does not answer, or that a GPU is missing."""
        if not self.timeout_s:
            return ""
        try:
            num_gpus = len(devices.query("gpu", ("index", "uuid"), self.timeout_s))
        except devices.DriverError as error:
            return str(error)
        if num_gpus < self._num_gpus or num_gpus == 0:
            return f"{num_gpus} GPUs answer, {self._num_gpus} did before"
        self._num_gpus = num_gpus
        return ""


@dataclass(frozen=True)
class Command:
    """A command of the user's, run by `sh`: exit code 0 means that the node is well. All its children end with it."""

    command: str
    timeout_s: float

    @property
    def name(self) -> str:
        """The command line."""
        return self.command

    def run(self) -> str:
        """Say how the command failed, with the last line that it wrote."""
        with _starting:  # it runs already while Popen returns: nobody may miss it meanwhile
            process = subprocess.Popen(
                ["sh", "-c", self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            _running.add(process.pid)
        try:
            output, _ = process.communicate(timeout=self.timeout_s)
        except subprocess.TimeoutExpired:
            return f"{self.command!r} did not end within {self.timeout_s:g} s"
        finally:
            _end(process.pid)
            _running.discard(process.pid)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if process.returncode == 0:
            return ""
        last = output.decode(errors="replace").strip().rpartition("\n")[2][:_OUTPUT_MAX_CHARS]
        return f"{self.command!r} ended with exit code {process.returncode}" + (f": {last}" if last else "")


@dataclass(frozen=True)
class CheckResult:
    """What a check has found: why this node should not run workers, "" if nothing speaks against it."""

    check: str
    reason: str


def examine(checks: Sequence[Check], is_over: Callable[[], bool] = lambda: False) -> tuple[CheckResult, ...]:
    """Run all checks, and return the results of those that failed.

    A check that raises has failed, and so has one that outlasts its time.

    Args:
        checks: those without a time limit run first, the others beside one another.
        is_over: asked every 0.1 s while checks are waited for. Once it is true, nothing is waited for any more, and
            what is returned means nothing.
    """
    findings = [_run(check) for check in checks if not check.timeout_s]
    if slow := [check for check in checks if check.timeout_s]:
        findings += _run_together(slow, is_over)
    return tuple(finding for finding in findings if finding.reason)


def _run_together(checks: Sequence[Check], is_over: Callable[[], bool]) -> list[CheckResult]:
    findings = [CheckResult(check.name, f"{check.name} did not end within {check.timeout_s:g} s") for check in checks]

    def run(place: int) -> None:
        findings[place] = _run(checks[place])

    threads = [threading.Thread(target=run, args=(i,), name="preflight", daemon=True) for i in range(len(checks))]
    try:
        for thread in threads:
            thread.start()
        ends_s = time.monotonic() + max(check.timeout_s for check in checks) + _OVERTIME_S
        for thread in threads:
            while thread.is_alive() and not is_over() and (left_s := ends_s - time.monotonic()) > 0:
                thread.join(min(left_s, _LOOK_S))
        if is_over():
            end_commands()
    except BaseException:  # a signal ends this node: its commands go with it
        end_commands()
        raise
    return list(findings)


def end_commands() -> None:
    """Kill every command that runs, with its children. Not to be called by the threads that run commands."""
    held = _starting.acquire(timeout=_START_S)
    try:
        for pid in tuple(_running):
            _end(pid)
    finally:
        if held:
            _starting.release()


def _run(check: Check) -> CheckResult:
    try:
        return CheckResult(check.name, check.run())
    except Exception as error:
        log.exception("preflight check %s", check.name)
        return CheckResult(check.name, f"{type(error).__name__}: {error}")


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class Preflight:
    """Keeps a node that is not well out of rounds. For the agent's thread only."""

    def __init__(self, checks: Sequence[Check], emit: Emit) -> None:
        self._checks = checks
        self._emit = emit
        self._passed = False  # and no round has begun since

    def first(self) -> str:
        """Check before the node joins; returns why it must join as one that may not take part, "" if it may."""
        reason = self._tell(examine(self._checks), generation=0, attempt=1, retry_s=_PAUSE_S)
        self._passed = not reason
        return reason

    def pass_or_wait(
        self,
        hold_back: Callable[[str], None],
        wait: Callable[[float], None],
        is_over: Callable[[], bool],
        generation: int,
        patience_s: float = PATIENCE_S,
    ) -> bool:
        """Check again and again until all checks pass; meanwhile the node's record says that it stays out, and why.

        Checks that run for long keep the node out too, as the others wait for a node whose workers they think still
        run.

        Args:
            hold_back: `Member.hold_back`.
            wait: sleeps for at most so many seconds.
            is_over: whether there is nothing left to take part in.
            generation: for the events.
            patience_s: for how long the others may wait for the checks.

        Returns:
            False if they never did, and there is nothing left to take part in.
        """
        if self._passed:
            self._passed = False
            return True
        pause_s, attempt, began_s = _PAUSE_S, 1, time.monotonic()
        held_back = False

        def look() -> bool:
            nonlocal held_back
            if not held_back and time.monotonic() >= began_s + patience_s:
                held_back = True
                hold_back(_RUNS)
                self._emit(EventName.PREFLIGHT_SLOW, generation=generation, seconds=patience_s)
            return is_over()

        while True:
            findings = examine(self._checks, look)
            if is_over():
                return False
            reason = self._tell(findings, generation, attempt, pause_s)
            if not reason:
                break
            held_back = True
            hold_back(reason)
            ends_s = time.monotonic() + pause_s
            while (left_s := ends_s - time.monotonic()) > 0:
                if is_over():
                    return False
                wait(left_s)
            pause_s, attempt = min(2 * pause_s, _PAUSE_S_MAX), attempt + 1
        if held_back:
            seconds = round(time.monotonic() - began_s, 3)
            hold_back("")
            self._emit(EventName.PREFLIGHT_PASSED, generation=generation, attempt=attempt, seconds=seconds)
        return True

    def _tell(self, findings: Sequence[CheckResult], generation: int, attempt: int, retry_s: float) -> str:
        for finding in findings:
            self._emit(
                EventName.PREFLIGHT_FAILED,
                generation=generation,
                check=finding.check,
                reason=finding.reason,
                attempt=attempt,
                retry_s=retry_s,
            )
        return "; ".join(f"preflight: {finding.reason}" for finding in findings)
