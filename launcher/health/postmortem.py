"""Finds out why workers failed, from what they left: error files, logs, exit codes, the kernel's count of OOM kills.

Nothing is changed. A worker's error is found in torch's error file, else in its redirected stderr. The file is written
by `torch.distributed.elastic.multiprocessing.errors.record`, and by `launcher.workers.program` for scripts without it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.rounds.failures import (
    MESSAGE_MAX_CHARS,
    Death,
    WorkerError,
    classify,
    error_in,
    first_line,
    place_of,
    shorten,
)
from launcher.rounds.policy import severity
from launcher.rounds.records import Failure
from launcher.torch_private import WorkerProcess
from launcher.workers.channel import Progress

log = logging.getLogger(__name__)

_LOG_TAIL_BYTES = 16 * 1024
_ERROR_FILE_MAX_BYTES = 1024 * 1024
_MAX_VICTIMS = 8
_VICTIM_MESSAGE_MAX_CHARS = 160


@dataclass(frozen=True)
class WorkerExit:
    """One worker as its agent sees it, whether it has ended or not."""

    rank: int
    pid: int
    exit_code: int | None
    """As Popen has it; None while the worker runs."""
    error_file: str
    """Where the worker writes its error; there may be no such file."""
    stderr_log: str
    """The file that gets its stderr, "" where none does."""
    progress: Progress


@dataclass(frozen=True)
class NodeCircumstances:
    """What holds for all workers of a node."""

    lived_s: float
    """How long ago they were started."""
    oom_kills: int = 0
    """How many processes the kernel has killed for memory since then."""
    draining: bool = False


def worker_exits(
    processes: Sequence[WorkerProcess], ranks: Mapping[int, int], progress: Mapping[int, Progress]
) -> list[WorkerExit]:
    """Note how the workers are, before torch stops the others because one has failed.

    Args:
        processes: those that stand for the workers.
        ranks: their global ranks, by local rank.
        progress: what they said last, by local rank.
    """
    return [
        WorkerExit(
            rank=ranks[p.local_rank],
            pid=p.process.pid,
            exit_code=p.process.poll(),
            error_file=p.error_file,
            stderr_log=p.stderr,
            progress=progress[p.local_rank],
        )
        for p in processes
    ]


def examine(workers: Sequence[WorkerExit], around: NodeCircumstances) -> list[Failure]:
    """Find the failures among a node's workers, in such order that causes come before what follows from them.

    A worker counts once it has ended with an error, and even before if its error file is written: a program that
    unwinds lets go of its peers long before its process ends, and they may be the first to be gone.
    """
    failures = []
    for worker in workers:
        written_ts = _written_ts(worker.error_file)
        if worker.exit_code or (worker.exit_code is None and written_ts is not None):
            failures.append(_failure(worker, around, written_ts))
    return sorted(failures, key=lambda f: (severity(f.kind), f.ts, f.rank))


def summarise(failures: Sequence[Failure]) -> Failure | None:
    """Put failures into one, small enough for a record: the first, with the others as its victims. None for none."""
    if not failures:
        return None
    victims = tuple(
        replace(f, traceback="", victims=(), message=f.message[:_VICTIM_MESSAGE_MAX_CHARS])
        for f in failures[1 : _MAX_VICTIMS + 1]
    )
    return replace(failures[0], victims=victims)


def _failure(worker: WorkerExit, around: NodeCircumstances, written_ts: float | None) -> Failure:
    tail = _tail(worker.stderr_log)
    error = _error_file(worker.error_file) if written_ts is not None else error_in(tail, worker.exit_code)
    death = Death(
        exit_code=worker.exit_code,
        error=error,
        phase=worker.progress.phase,
        lived_s=around.lived_s,
        oom_kills=around.oom_kills,
        draining=around.draining,
    )
    last_words = [line for line in tail.splitlines() if line.strip()][-1:]
    return Failure(
        rank=worker.rank,
        exit_code=1 if worker.exit_code is None else worker.exit_code,
        message=first_line(error.message if error else "".join(last_words)),
        ts=written_ts or time.time(),
        kind=classify(death),
        step=worker.progress.step,
        place=place_of(death)[:MESSAGE_MAX_CHARS],
        pid=worker.pid,
        traceback=shorten(error.traceback) if error else "",
    )


def _written_ts(error_file: str) -> float | None:
    with contextlib.suppress(OSError):
        return os.stat(error_file).st_mtime
    return None


def _error_file(path: str) -> WorkerError | None:
    """Read what torch's `record` wrote: {"message": {"message", "extraInfo": {"py_callstack"}}}, or a plain text."""
    try:
        with open(path, "rb") as file:
            told: Any = json.loads(file.read(_ERROR_FILE_MAX_BYTES))["message"]
        if not isinstance(told, Mapping):
            return WorkerError(str(told))
        return WorkerError(str(told["message"]), str(told.get("extraInfo", {}).get("py_callstack", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("error file %s cannot be read: %s", path, error)
        return None


def _tail(path: str) -> str:
    if not path or path == os.devnull:
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
            return file.read(_LOG_TAIL_BYTES).decode(errors="replace")
    except OSError as error:
        log.warning("log %s cannot be read: %s", path, error)
        return ""


def oom_kills(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the processes that the kernel has killed for memory in this cgroup, or on the host if no cgroup tells.

    The line `oom_kill N` is read from cgroup v2's `memory.events`, v1's `memory.oom_control`, or `/proc/vmstat`.
    """
    for path in (*_cgroup_files(proc, cgroups), proc / "vmstat"):
        with contextlib.suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def _cgroup_files(proc: Path, cgroups: Path) -> list[Path]:
    files = []
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(cgroups / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                files.append(cgroups / "memory" / path.lstrip("/") / "memory.oom_control")
    return files
