"""The demo's processes: nodes that can be killed whole, and that never outlive the demo."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from launcher import Environment, tied_command

_STOP_GRACE_S = 10.0


class Process:
    """One child with its output in a file. The kernel kills it when the demo dies, however that dies."""

    def __init__(
        self, name: str, arguments: Sequence[str], *, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.killed = False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._child = subprocess.Popen(
                tied_command([sys.executable, *arguments]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environ(os.environ) | dict(environment or {}),
                start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends its children in order
            )

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._child.poll()

    def kill(self) -> None:
        """SIGKILL it and all its descendants at one moment, as a machine that loses power; harmless if it has ended."""
        self.killed = True
        self._send(signal.SIGKILL)
        self._child.wait()

    def freeze(self) -> None:
        """SIGSTOP it and all its descendants, as a machine that hangs: its connections stay, and nobody answers."""
        self._send(signal.SIGSTOP)

    def _send(self, signum: signal.Signals) -> None:
        if self._child.poll() is not None:
            return
        for pid in (self._child.pid, *descendants(self._child.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def interrupt(self) -> None:
        """Send SIGINT, on which an agent stops its workers at once and leaves nothing behind."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Wait until the process has ended; kill it after a grace."""
        try:
            self._child.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def tail(self, num_lines: int) -> list[str]:
        """Return the last lines of its output."""
        return self.log_path.read_text(errors="replace").splitlines()[-num_lines:]


class Processes:
    """All children of the demo, by name; leaving the context stops those that still run."""

    def __init__(self) -> None:
        self.all: dict[str, Process] = {}

    def start(
        self, name: str, arguments: Sequence[str], *, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Start a child, with more variables if there are any; one of the same name must have ended before."""
        process = Process(name, arguments, log_path=log_path, environment=environment)
        self.all[name] = process
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.all.values():
            process.interrupt()
        for process in self.all.values():
            process.wait()


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on, whatever sessions they are in; children before their own."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (command) state ppid ...", where the command may hold blanks and parentheses
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        born = children.get(waiting.pop(0), [])
        found += born
        waiting += born
    return found


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would make a child part of somebody else's job, on one thread a worker."""
    foreign = (Environment.prefix, "TORCHELASTIC_", "TORCH_ELASTIC_")
    ranks = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in environ.items() if not name.startswith(foreign) and name not in ranks}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
