"""Tells from what a worker left which class its failure is of, and from where it came. Pure.

The texts are those of the libraries that raise them: gloo's transport (`gloo/transport/tcp/pair.cc`), NCCL's
`ncclGetErrorString` and its sockets, c10d's TCPStore and watchdog (`torch/csrc/distributed/c10d`), CUDA's
`cudaGetErrorString`, torch's CPU allocator, and ours where ranks of one host do without torch
(`storage/ranks/nearby.py`, `elastic_moe/parallel/barrier.py`).
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from enum import StrEnum

from launcher.workers.channel import WorkerPhase

USAGE_EXIT_CODE = 2
SETTLED_S = 300.0
"""A generation that lived for so long, of a script that reports no steps, has got past its start."""
TRACEBACK_MAX_CHARS = 4096
MESSAGE_MAX_CHARS = 500


class FailureClass(StrEnum):
    """Why a worker failed, as far as that decides what follows."""

    GAVE_UP = "gave_up"  # the program says that it would fail again
    USAGE = "usage"  # the program was given something that it cannot work with, and says so
    START_UP = "start_up"  # an exception before the first step that the same start would raise again
    PROGRAM = "program"  # an exception of the program, or an exit code of its own
    DEVICE = "device"  # the accelerator, its driver or its links
    OUT_OF_MEMORY = "out_of_memory"  # of the host; an accelerator's is a program error
    SIGNAL = "signal"  # killed, and nobody knows why
    HANG = "hang"  # the agent ended it because it made no progress
    PREEMPTION = "preemption"  # stopped together with its node
    LOST_PEER = "lost_peer"  # its connection to another rank broke or timed out: a victim


@dataclass(frozen=True)
class WorkerError:
    """The exception that ended a worker, as `torch.distributed.elastic`'s error file or a log tells it."""

    message: str
    """`TypeName: text`."""
    traceback: str = ""


@dataclass(frozen=True)
class Death:
    """What is known of a worker that failed. `exit_code`: negative for a signal, None while it still unwinds."""

    exit_code: int | None
    error: WorkerError | None
    phase: WorkerPhase
    lived_s: float
    oom_kills: int = 0
    """Processes that the kernel killed for memory on this node while the worker lived."""
    draining: bool = False
    """Its node was told to go."""


_DEVICE = re.compile(
    r"uncorrectable (?:ECC|NVLink) error|unspecified launch failure|cudaErrorECCUncorrectable|fallen off the bus"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device is detected|\bXid \d"
    r"|NVRM: |driver/library version mismatch|system not yet initialized|cudaErrorDevicesUnavailable"
    r"|CUDA driver initialization failed|GPU is lost|hipErrorNoDevice",
    re.IGNORECASE,
)
_NCCL_SYSTEM = re.compile(r"ncclSystemError|unhandled system error")
_LOST_PEER = re.compile(
    r"gloo/transport/|Gloo connectFullMesh failed|Connection closed by peer \["
    r"|ncclRemoteError|remote process exited or there was a network error|Connection closed by remote peer"
    r"|socketProgress|socketStartConnect|Got completion from peer|NCCL communicator was aborted"
    r"|Watchdog caught collective operation timeout|watchdog timeout|ncclCommAbort"
    r"|DistNetworkError|DistStoreError|recvValue(?:WithTimeout)? failed on SocketImpl|sendBytes failed on SocketImpl"
    r"|client socket has (?:failed to connect|timed out)|Did the remote server shutdown or crash"
    r"|wait timeout after \d+ ?ms|Some NCCL operations have failed or timed out"
    r"|failed to pass monitoredBarrier|reached monitoredBarrier, but received errors"
    r"|PeerGone: rank \d+ (?:has closed its connection|does not answer|cannot be told)"
)
_OWN_MISTAKE = re.compile(r"enforce fail at|failed to listen on any local network address")
"""Said in the same breath as the texts of a lost peer, but by a collective or a port that the program got wrong."""
_HOST_MEMORY = re.compile(r"^MemoryError\b|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory")

_NEVER_CURED = {
    *("ImportError", "ModuleNotFoundError", "NameError", "UnboundLocalError"),
    *("SyntaxError", "IndentationError", "TabError"),
}
_MAY_PASS = {
    *(
        "OSError",
        "InterruptedError",
        "BlockingIOError",
        "TimeoutError",
        "gaierror",
        "SSLError",
        "URLError",
        "HTTPError",
    ),
    *("ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError", "BrokenPipeError"),
}


def classify(death: Death) -> FailureClass:
    """Return the class of a failure."""
    if death.phase is WorkerPhase.GAVE_UP:
        return FailureClass.GAVE_UP
    text = f"{death.error.message}\n{death.error.traceback}" if death.error else ""
    signum = signal_of(death.exit_code)
    if _DEVICE.search(text):
        return FailureClass.DEVICE
    if _LOST_PEER.search(text) and not _OWN_MISTAKE.search(text):
        return FailureClass.LOST_PEER
    if _NCCL_SYSTEM.search(text):
        return FailureClass.DEVICE
    if _HOST_MEMORY.search(text) or (signum is signal.SIGKILL and death.oom_kills):
        return FailureClass.OUT_OF_MEMORY
    if signum is not None and death.error is None:
        return FailureClass.PREEMPTION if death.draining else FailureClass.SIGNAL
    started = death.phase in (WorkerPhase.RUNNING, WorkerPhase.YIELDED)
    if started or (death.lived_s >= SETTLED_S and death.phase is WorkerPhase.STARTING):
        return FailureClass.PROGRAM
    if death.exit_code == USAGE_EXIT_CODE:  # of its own accord, whatever it wrote down: Python ends an exception with 1
        return FailureClass.USAGE
    if death.error is not None and _is_bound_to_recur(death):
        return FailureClass.START_UP
    return FailureClass.PROGRAM


def _is_bound_to_recur(death: Death) -> bool:
    """Tell whether an exception at start would come again.

    Of a script that is known to report steps: any that no network or file system explains. Of one that may be past its
    start without saying so: only what no start survives.
    """
    assert death.error is not None
    kind = exception_type(death.error)
    if death.phase is WorkerPhase.ATTACHED:
        return kind not in _MAY_PASS
    return kind in _NEVER_CURED


def signal_of(exit_code: int | None) -> signal.Signals | None:
    """Return the signal that ended a process: its own exit code, or 128 + N of a shell that stood for it."""
    if exit_code is None:
        return None
    signum = -exit_code if exit_code < 0 else exit_code - 128
    try:
        return signal.Signals(signum) if signum > 0 else None
    except ValueError:
        return None


def exception_type(error: WorkerError) -> str:
    """Return the exception's name without its module: `OutOfMemoryError` of `torch.OutOfMemoryError: ...`."""
    return error.message.partition(":")[0].strip().rpartition(".")[2]


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>\S+))?')
_LIBRARY = re.compile(
    r"/site-packages/|/dist-packages/|/lib/python\d|^<|/launcher/workers/(?:zygote|boot|program)\.py$"
)


def place_of(death: Death) -> str:
    """Say where a failure came from, equal for two that have the same cause: the exception's type and the innermost
    frame of the program's own code; without a traceback the way in which the process ended."""
    if death.error is None:
        signum = signal_of(death.exit_code)
        return signum.name if signum else f"exit code {death.exit_code}"
    last = death.error.traceback.rpartition("Traceback (most recent call last)")[2]
    frames = list(_FRAME.finditer(last))
    own = [frame for frame in frames if not _LIBRARY.search(frame["file"])]
    kind = exception_type(death.error)
    if not frames:
        return kind
    frame = (own or frames)[-1]
    return f"{kind} at {frame['file']}:{frame['line']}" + (f" in {frame['function']}" if frame["function"] else "")


def error_in(log: str, exit_code: int | None) -> WorkerError | None:
    """Find what a worker's stderr says of its end.

    That is the last traceback if it ended as Python does after one, or the exception of a C++ library that aborted it.
    Of any other end a traceback in the log is an older story.
    """
    if exit_code == 1:
        return _traceback_in(log)
    if signal_of(exit_code) is signal.SIGABRT:
        for line in reversed(log.splitlines()):
            if line.lstrip().startswith("what():"):
                return WorkerError(line.strip()[:MESSAGE_MAX_CHARS])
    return None


def _traceback_in(log: str) -> WorkerError | None:
    head = log.rfind("Traceback (most recent call last)")
    if head < 0:
        return None
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in log[head:].splitlines()]
    for i, line in enumerate(lines[1:], start=1):
        if line and not line[0].isspace() and line[0] not in "|+":
            return WorkerError(line[:MESSAGE_MAX_CHARS], "\n".join(lines[: i + 1]))
    return None


def shorten(text: str, max_chars: int = TRACEBACK_MAX_CHARS) -> str:
    """Shorten a text to its beginning and, mostly, its end."""
    if len(text) <= max_chars:
        return text
    head = max_chars // 4
    return f"{text[:head]}\n  ... ({len(text) - max_chars} characters) ...\n{text[head - max_chars :]}"


def first_line(text: str) -> str:
    """Return the first line of a text, shortened."""
    lines = text.strip().splitlines()
    return lines[0][:MESSAGE_MAX_CHARS] if lines else ""
