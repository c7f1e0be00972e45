"""Gets the Python stacks of workers that hang: asks by a signal, waits in bounded time, and puts them into files.

A process is sent the signal only if it handles it (proc(5), SigCgt): it would end any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.health.hangs import Evidence
from launcher.torch_private import FILES_OF_WRAPPERS
from launcher.workers.program import STACKS_SIGNAL

log = logging.getLogger(__name__)

_WAIT_S = 3.0
_SETTLED_S = 0.1
_LOOK_S = 0.02
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>.+)$')
_BLOCK = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_COLLECTIVES = ("/torch/distributed/", "/storage/ranks/nearby.py", "/elastic_moe/parallel/barrier.py")
"""Where ranks wait for each other: in torch's files, or in those of ours that do without it."""


@dataclass(frozen=True)
class StackTarget:
    """A worker whose stacks are wanted."""

    rank: int
    pid: int
    """The process that runs the script."""
    path: Path
    """Where it writes its stacks."""
    step: int
    """The last step that it has completed."""


@dataclass(frozen=True)
class Stack:
    """What was found out about one worker: a text for a person, and the evidence in it."""

    text: str
    evidence: Evidence


def collect(workers: Mapping[int, StackTarget], wait_s: float = _WAIT_S) -> dict[int, Stack]:
    """Have all workers write their stacks at once, and wait for these for at most `wait_s`.

    A worker that is stopped (SIGSTOP) is let go on, as it cannot write otherwise: the caller is about to end it.

    Returns:
        What is known of each worker, with its stacks or without, by the keys of `workers`.
    """
    threads = {key: _threads(worker.pid) for key, worker in workers.items()}
    written = {key: _size_bytes(worker.path) for key, worker in workers.items()}
    asked = {key for key, worker in workers.items() if _ask(worker.pid, is_stopped=_is_stopped(threads[key]))}
    settled_s = {key: time.monotonic() for key in asked}
    sizes = dict(written)
    ends_s = time.monotonic() + wait_s
    waited_for = set(asked)
    while waited_for and time.monotonic() < ends_s:
        time.sleep(_LOOK_S)
        for key in tuple(waited_for):
            size_bytes = _size_bytes(workers[key].path)
            if size_bytes != sizes[key]:
                sizes[key], settled_s[key] = size_bytes, time.monotonic()
            elif size_bytes > written[key] and time.monotonic() - settled_s[key] > _SETTLED_S:
                waited_for.discard(key)
    return {
        key: _describe(worker, threads[key], _read(worker.path, written[key]), asked=key in asked)
        for key, worker in workers.items()
    }


def write(stacks: Mapping[int, Stack], folder: Path) -> Path:
    """Put each worker's text into `folder`/rank-R.txt (0600).

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for stack in stacks.values():
        path = folder / f"rank-{stack.evidence.rank}.txt"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(stack.text)
    return folder


def innermost(text: str) -> tuple[str, bool]:
    """Find the innermost frame of the main thread that says something.

    `faulthandler` writes the main thread last, and each thread's most recent call first.

    Returns:
        The frame as "file:line in function", "" if there is none; and whether it is a collective's.
    """
    frames: list[re.Match[str]] = []
    for line in text.splitlines():
        if _BLOCK.match(line):
            frames = []
        elif frame := _FRAME.match(line):
            frames.append(frame)
    for frame in frames:
        if not frame["file"].endswith(FILES_OF_WRAPPERS):
            waits = any(part in frame["file"] for part in _COLLECTIVES)
            return f"{frame['file']}:{frame['line']} in {frame['name']}", waits
    return "", False


def _is_stopped(threads: list[tuple[int, str, str, str]]) -> bool:
    return bool(threads) and threads[0][2] == "T"


def _ask(pid: int, *, is_stopped: bool) -> bool:
    """Ask a process for its stacks; returns False if it cannot write them."""
    if not _handles_signal(pid):
        return False
    try:
        os.kill(pid, STACKS_SIGNAL)
        if is_stopped:
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def _handles_signal(pid: int) -> bool:
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (STACKS_SIGNAL - 1) & 1) and "\nState:\tZ" not in status
    return False


def _threads(pid: int) -> list[tuple[int, str, str, str]]:
    """The id, name and state of each thread, and the kernel function it waits in, as far as the kernel tells."""
    found = []
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda t: int(t.name)):
            with contextlib.suppress(OSError):
                name, _, rest = (task / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
                waits_in = (task / "wchan").read_text() or "0"
                found.append((int(task.name), name, rest.split()[0], waits_in))
    return found


def _describe(worker: StackTarget, threads: list[tuple[int, str, str, str]], stack: str, *, asked: bool) -> Stack:
    frame, waits = innermost(stack)
    stopped = _is_stopped(threads)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [f"rank {worker.rank}, pid {worker.pid}, step {worker.step}, {now}"]
    lines += [f"thread {tid} ({name}): state {state}, in {waits_in}" for tid, name, state, waits_in in threads]
    if stopped:
        lines.append("the process was stopped by a signal (SIGSTOP or SIGTSTP)")
    if stack:
        lines.append(stack)
    elif asked:
        lines.append("it did not write its Python stacks in time")
    else:
        lines.append("it cannot write Python stacks: not a Python program, still starting, or already gone")
    evidence = Evidence(worker.rank, worker.step, stopped=stopped, frame=frame, waits=waits)
    return Stack("\n".join(lines) + "\n", evidence)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, offset_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset_bytes)
            return file.read().decode(errors="replace")
    except OSError as error:
        log.warning("stacks in %s cannot be read: %s", path, error)
        return ""
