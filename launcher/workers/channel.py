"""A few bytes of shared memory between an agent and one of its workers.

The worker writes its progress (`beat`), the agent writes a request to stop at the next step boundary. The file is
mapped by both, so neither side ever waits for the other and a stopped (SIGSTOP) peer blocks nobody. Standard library
only: a worker imports this before it imports torch.

Layout, little endian, one field one writer::

    0   4s   magic            agent, once
    4   u32  stop request     agent    (StopReason)
    8   u32  phase            worker   (WorkerPhase)
    16  i64  step             worker   last completed step
    24  u64  beat_ns          worker   CLOCK_MONOTONIC of that step (one clock for all processes of a host)
    32  i64  pid              worker   of a forked worker, which is not the agent's own child
    40  u64  started_ticks    worker   when that process started (proc(5)): a pid alone may be another's by now
    48  u32  untimed          worker   1 while it does what may take long: a step's time limit does not hold
    52  u32  signs            worker   how often it has said that it is at work, at what is no step; wraps
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_MAGIC = b"EMC1"
_SIZE_BYTES = 64
_STOP, _PHASE, _STEP, _PID, _UNTIMED, _SIGNS = 4, 8, 16, 32, 48, 52


class StopReason(IntEnum):
    """Why an agent asks its workers to stop at a step boundary. Ranks that are asked for several act on the highest."""

    NONE = 0
    MEMBERSHIP = 1
    DRAIN = 2


class WorkerPhase(IntEnum):
    """What the worker says of itself."""

    STARTING = 0  # has not opened its channel: still importing, or a script that never will
    ATTACHED = 1
    RUNNING = 2
    YIELDED = 3
    GAVE_UP = 4  # fails, and would fail again


@dataclass(frozen=True)
class Progress:
    """What a worker has said last, as the agent reads it."""

    phase: WorkerPhase
    step: int
    """The last step that is complete, -1 before the first."""
    beat_s: float
    """When it was, by the monotonic clock; 0 before the first."""
    untimed: bool = False
    """The worker does something that may take much longer than a step, such as saving or evaluating."""
    signs: int = 0
    """Changes when the worker says that it is at work, though no step is complete."""


def started_ticks(pid: int) -> int | None:
    """Say when a process started, in clock ticks since boot; None if there is none, or only its zombie (proc(5)).

    A first thread that has ended is a zombie as well, while others still free what the process has had.
    """
    try:
        # a name, which may be cut within a letter, is before what is asked for
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" and int(fields[17]) <= 1 else int(fields[19])


class Channel:
    """One mapped file. The agent calls `create`, the worker `attach`; both `close`."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path = path
        self._memory = memory

    @classmethod
    def create(cls, path: Path) -> Channel:
        """Make a fresh channel file (0600) at `path`, replacing an older generation's."""
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _SIZE_BYTES)
            memory = mmap.mmap(fd, _SIZE_BYTES)
        finally:
            os.close(fd)
        memory[0:4] = _MAGIC
        struct.pack_into("<q", memory, _STEP, -1)
        return cls(path, memory)

    @classmethod
    def attach(cls, path: Path, *, announce: bool = True) -> Channel:
        """Map the channel that the agent has made; with `announce`, that tells the agent that a worker uses it.

        Raises:
            OSError: there is no such file.
            ValueError: it is not a channel of this version.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != _SIZE_BYTES:
                raise ValueError(f"{path} is not a worker channel")
            memory = mmap.mmap(fd, _SIZE_BYTES)
        finally:
            os.close(fd)
        if memory[0:4] != _MAGIC:
            memory.close()
            raise ValueError(f"{path} is not a worker channel of this version")
        if announce:
            struct.pack_into("<I", memory, _PHASE, WorkerPhase.ATTACHED)
        return cls(path, memory)

    # --- the worker's side

    def claim(self) -> None:
        """Say which process this worker is, so that the agent can make sure of its end."""
        pid = os.getpid()
        struct.pack_into("<qQ", self._memory, _PID, pid, started_ticks(pid) or 0)

    def beat(self, step: int) -> None:
        """Record that `step` is complete, now."""
        struct.pack_into("<qQ", self._memory, _STEP, step, time.monotonic_ns())
        struct.pack_into("<I", self._memory, _PHASE, WorkerPhase.RUNNING)

    def yielded(self) -> None:
        """Record that this worker stopped at a step boundary and wants to be run again."""
        struct.pack_into("<I", self._memory, _PHASE, WorkerPhase.YIELDED)

    def gave_up(self) -> None:
        """Record that this worker fails in a way that a restart would only repeat."""
        struct.pack_into("<I", self._memory, _PHASE, WorkerPhase.GAVE_UP)

    def begin_untimed(self) -> None:
        """Record that what begins now may take much longer than a step."""
        struct.pack_into("<I", self._memory, _UNTIMED, 1)

    def end_untimed(self) -> None:
        """Record that steps take their usual time again."""
        struct.pack_into("<I", self._memory, _UNTIMED, 0)

    def sign(self) -> None:
        """Record that this worker is at work."""
        (signs,) = struct.unpack_from("<I", self._memory, _SIGNS)
        struct.pack_into("<I", self._memory, _SIGNS, (signs + 1) % (1 << 32))

    def stop_request(self) -> StopReason:
        """Read what the agent asks for now."""
        return StopReason(min(struct.unpack_from("<I", self._memory, _STOP)[0], max(StopReason)))

    # --- the agent's side

    def forked_pid(self) -> int | None:
        """The pid that a worker has claimed, while that very process still runs; None before, and once it has ended."""
        pid, ticks = struct.unpack_from("<qQ", self._memory, _PID)
        return pid if pid and started_ticks(pid) == ticks else None

    def claimed_pid(self) -> int | None:
        """The pid that a worker has claimed, whether it still runs or not; None before it has."""
        return struct.unpack_from("<q", self._memory, _PID)[0] or None

    def request_stop(self, reason: StopReason) -> None:
        """Ask the worker to stop at its next step boundary."""
        struct.pack_into("<I", self._memory, _STOP, reason)

    def progress(self) -> Progress:
        """Read what the worker has said last."""
        phase = struct.unpack_from("<I", self._memory, _PHASE)[0]
        step, beat_ns = struct.unpack_from("<qQ", self._memory, _STEP)
        untimed, signs = struct.unpack_from("<II", self._memory, _UNTIMED)
        # the file is the script's to write: what it has there by mistake is no end of the agent
        known = WorkerPhase(phase) if phase <= max(WorkerPhase) else WorkerPhase.RUNNING
        return Progress(known, step, beat_ns / 1e9, bool(untimed), signs)

    def close(self) -> None:
        """Unmap the file, which stays until the agent removes its folder."""
        self._memory.close()
