"""A process that has imported torch and forks workers: a restart costs a tenth of a second, not an import of torch.

It is a fork of an agent that has just imported torch itself (`launcher.workers.warm`), or a new process; either way
below a guardian. It serves `boot.py` on a Unix socket, one connection a worker:

    boot -> zygote   a frame with a `ForkRequest`, and boot's stdin, stdout and stderr (SCM_RIGHTS)
    zygote -> boot   "pid PID", or "cold WHY" if a fork would not be what a new process is; at the end "status STATUS"
    boot -> zygote   a frame with the number of a signal; a closed connection means SIGKILL

Its agent hears by another socket when all is imported, and why workers start cold. It serves before that, between one
import and the next: the first workers of a job need not wait for what they may not use.

It stays fit to fork by what it does not do: no thread, no CUDA, no gRPC, nothing but imports. What the workers
imported from installed packages is learnt from the first one and imported here too, after a probe in a fork of its
own has shown that this starts no thread, touches no CUDA and reads no variable that workers have set otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from launcher.environment import Environment
from launcher.frames import receive_body, send_body
from launcher.workers import early_variables, freshness, paths, program
from launcher.workers.fork_request import ForkRequest
from launcher.workers.forked import Zygote, become, tell
from launcher.workers.imports_ahead import MODULES, Imports, settle_threads, unfit_to_fork
from launcher.workers.learnt_imports import ImportLearner

_SET_BY_AGENTS = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    Environment.prefix,
    "TORCHELASTIC_",
    "TORCH_NCCL_",
)
_FIRST_S = 5.0  # the first request is served with what is there, if it comes within this time
_QUIET_S = 2.0  # between a request and further imports: workers that start have the processors to themselves
_MAX_FRAME_BYTES = 16 * 1024 * 1024
_FRAME_TIMEOUT_S = 10.0


class _Server:
    """Serves boots and hears workers, on one thread; a fork of it leaves `serve` with what it is to become."""

    def __init__(self, listener: socket.socket, news: socket.socket, imports: Imports) -> None:
        self.connection: socket.socket | None = None  # in a child: to the boot that stands for it
        self.import_reports: socket.socket | None = None  # in a child: where it tells what it imports
        self._listener = listener
        self._news = news
        self._imports = imports
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(news, selectors.EVENT_READ)
        self._workers: dict[int, socket.socket] = {}
        self._to_import: deque[str] = deque(n for n in (*MODULES, *imports.also) if n not in sys.modules)
        self._ready = False
        self._import_at_s = time.monotonic() + _FIRST_S
        self._files = freshness.ImportedFiles()
        self._files.note()
        self._learner = ImportLearner()
        self._wake_r, self._wake_w = os.pipe()
        for fd in (self._wake_r, self._wake_w):
            os.set_blocking(fd, False)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._importing = False
        signal.signal(signal.SIGCHLD, self._child_ended)
        signal.set_wakeup_fd(self._wake_w)

    def serve(self) -> ForkRequest:
        """Serve until this process is a forked child; returns what it is to become."""
        while True:
            for key, _ in self._selector.select(self._idle_s()):
                if key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fileobj is self._news:
                    self._hear_agent()
                elif key.fd == self._wake_r:
                    self._reap()
                elif key.fileobj is self._learner.connection:
                    self._learner.hear()
                else:
                    self._hear(key.data)
            self._go_on()

    def _idle_s(self) -> float | None:
        """How long there is nothing to do if nothing happens; None for ever."""
        now_s = time.monotonic()
        if not self._ready or self._to_import:
            return max(0.0, self._import_at_s - now_s)
        return max(0.0, self._learner.due_s - now_s) if self._learner.connection is not None else None

    def _go_on(self) -> None:
        """Make the next import, unless workers are being started."""
        now_s = time.monotonic()
        if now_s >= self._import_at_s:
            if self._to_import:
                self._importing = True
                self._child_ended()
                self._imports.make(self._to_import.popleft())
                settle_threads()
                self._importing = False
                self._files.note()
            if not self._to_import and not self._ready:
                self._ready = True
                tell(self._news, ready=True)
        if self._learner.connection is not None and now_s >= self._learner.due_s:
            self._selector.unregister(self._learner.connection)
            self._learner.learn(self._to_import)

    def _hear_agent(self) -> None:
        """The agent says that it waits for all imports, or has gone: make them without a pause."""
        self._import_at_s = float("-inf")
        try:
            is_gone = not self._news.recv(1)
        except ConnectionResetError:  # it is, and had not read all that it was told
            is_gone = True
        if is_gone:
            self._selector.unregister(self._news)

    def _accept(self) -> ForkRequest | None:
        connection, _ = self._listener.accept()
        connection.settimeout(_FRAME_TIMEOUT_S)
        self._import_at_s = time.monotonic() + _QUIET_S
        try:
            request = ForkRequest.receive(connection)
        except (OSError, EOFError, ValueError) as error:
            print(f"zygote: dropped a request: {error}", file=sys.stderr)
            connection.close()
            return None
        if unfit := unfit_to_fork() or self._differs(request):
            self._answer(connection, f"cold {unfit}")
            connection.close()
        elif self._fork(connection):
            return request
        for fd in request.fds:
            os.close(fd)
        return None

    def _differs(self, request: ForkRequest) -> str:
        """Say why a fork would not be to its script what a new process is, "" if it is; the agent is told as well."""
        if stale := self._files.changed():
            tell(self._news, stale=stale)
            return stale
        if lasting := self._imports.half_imported or self._hidden(request) or self._set_too_late(request):
            tell(self._news, cold=lasting)
        return lasting

    def _hidden(self, request: ForkRequest) -> str:
        folders = [request.cwd if request.script is None else os.path.dirname(os.path.realpath(request.script))]
        return paths.hidden_by([*folders, *paths.folders_before_installed()], freshness.files_of_packages())

    def _set_too_late(self, request: ForkRequest) -> str:
        read = self._imports.recorder.read
        now, before = _inherited(request.env), _inherited(self._imports.environment)
        if names := early_variables.changed_early(now, before, read):
            return f"{', '.join(names)} is not what it was when torch was imported ahead"
        script = request.script or request.module_file
        names = early_variables.set_in_source(Path(script), request.env, read) if script else []
        return f"the script sets {', '.join(names)} before it imports torch" if names else ""

    def _fork(self, connection: socket.socket) -> bool:
        """Fork a worker for `connection`; returns True in the child."""
        ours, theirs = self._learner.open() or (None, None)
        gc.freeze()  # a worker's collector need not go through (and so copy) what all share: its end takes a third
        pid = os.fork()
        if pid == 0:
            self._leave_parent(ours)
            self.connection, self.import_reports = connection, theirs
            return True
        if ours is not None and theirs is not None:
            theirs.close()
            self._learner.begin(ours)
            self._selector.register(ours, selectors.EVENT_READ)
        self._workers[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, data=pid)
        self._answer(connection, f"pid {pid}")
        return False

    def _leave_parent(self, learning: socket.socket | None) -> None:
        """In the child: let go of everything that is the zygote's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for other in (*self._workers.values(), self._listener, learning, self._learner.connection):
            if other is not None:
                other.close()
        for fd in (self._wake_r, self._wake_w):
            os.close(fd)

    def _answer(self, connection: socket.socket, told: str) -> None:
        with contextlib.suppress(OSError):  # boot is gone: its closed connection is heard next
            send_body(connection, told.encode(errors="replace"))

    def _child_ended(self, *_: object) -> None:
        """Reap at once even during an import, which takes a second: the boot of the worker that ended waits for it."""
        if self._importing:
            with contextlib.suppress(ChildProcessError):  # it has come in the middle of itself
                self._reap()

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        for pid in list(self._workers):
            try:
                done, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # a signal has come in between, whose handler is this
                continue
            if done:
                connection = self._workers.pop(pid)
                with contextlib.suppress(KeyError):  # its boot is gone
                    self._selector.unregister(connection)
                self._answer(connection, f"status {status}")
                connection.close()
        self._to_import.extend(self._learner.reap())

    def _hear(self, pid: int) -> None:
        connection = self._workers.get(pid)
        if connection is None:
            return  # reaped in the same round
        try:
            signum = int(receive_body(connection, _MAX_FRAME_BYTES))
        except (OSError, EOFError, ValueError):
            signum = signal.SIGKILL
            self._selector.unregister(connection)
        try:
            os.killpg(pid, signum)
        except ProcessLookupError:  # it has no group of its own yet; it is ours to reap, so the pid is its
            os.kill(pid, signum)


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Leave out of an environment what agents set for each worker."""
    return {name: value for name, value in environment.items() if not name.startswith(_SET_BY_AGENTS)}


def main(listener: socket.socket, news: socket.socket, imports: Imports | None = None) -> None:
    """Serve on the listener that the agent opened; returns only in a worker, when its script has ended."""
    tell(news, pid=os.getpid())
    imports = imports or Imports()
    if "torch" not in sys.modules:  # nobody can be served without
        imports.make("torch")
    settle_threads()
    server = _Server(listener, news, imports)
    zygote_pid = os.getpid()
    request = server.serve()
    assert server.connection is not None
    read, with_torch = frozenset(imports.recorder.read), frozenset(imports.with_torch)
    zygote = Zygote(zygote_pid, imports.environment, read, with_torch, news)
    become(request, zygote, server.connection, server.import_reports)
    program.run(request.argv)


def start(listener_fd: int, news_fd: int) -> None:
    """Run `main` in a new process, on descriptors that it was given."""
    for fd in (listener_fd, news_fd):
        os.set_inheritable(fd, False)
    main(socket.socket(fileno=listener_fd), socket.socket(fileno=news_fd))
