"""Keeps a zygote for the agent, and says at which socket a worker's boot should ask for a fork."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from launcher.events import Emit, EventName
from launcher.lifecycle import Lifecycle
from launcher.workers import guardian, paths, zygote
from launcher.workers.imports_ahead import Imports, settle_threads, unfit_to_fork
from launcher.workers.process_tree import ProcessesByPid, descendants, hear_of_children

log = logging.getLogger(__name__)

COLD = "-"
_GUARDIAN = (sys.executable, "-I", "-S", guardian.__file__)
_MESSAGE_MAX_BYTES = 64 * 1024
_LOOK_S = 0.005
_START = (sys.executable, "-u", "-c")
# A new process has to find our packages before it may look for anything.
_PROGRAM = """
import sys
home, sys.path[:], found = sys.argv[1], [sys.argv[1]], sys.path[:]
from launcher.workers.paths import keep_to_own
sys.path[:] = found
keep_to_own()
from launcher.workers.zygote import start
start(int(sys.argv[2]), int(sys.argv[3]))
"""


class ForkedZygote:
    """A fork of this process that stands over another one, the zygote. It has what is needed of Popen.

    It waits for what `hand_over` gives it, and ends if this process ends before that.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection

    def hand_over(self, listener: socket.socket, news: socket.socket) -> None:
        """Let the zygote serve on a listener, and tell its news to the agent."""
        with contextlib.suppress(OSError):  # it is dead, which is found soon
            socket.send_fds(self._connection, [b"serve"], [listener.fileno(), news.fileno(), 1, 2])
        self._connection.close()

    def poll(self) -> int | None:
        """Return the exit code as Popen does, None while the fork runs."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """Wait for the fork to end; returns its exit code as Popen does."""
        while self.poll() is None:
            time.sleep(_LOOK_S)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Kill the fork, and with it all that is below it."""
        self._connection.close()
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def fork_zygote(imports: Imports) -> ForkedZygote | None:
    """Fork a zygote off this process, which has just imported torch and has done nothing else.

    In a worker this raises SystemExit, or whatever else ends its script.

    Returns:
        The fork; None if this process is not fit to be forked.
    """
    hear_of_children()
    options = sys.orig_argv[1:2]
    if options and options[0].startswith("-") and not options[0].startswith("-m"):
        return None  # `python -X ...`: a worker's interpreter is not given these
    settle_threads()
    if unfit_to_fork():
        return None
    agent_pid = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid:
        theirs.close()
        return ForkedZygote(pid, ours)
    ours.close()
    return guardian.run_here(lambda: _wait_and_serve(theirs, imports), agent_pid)


def _wait_and_serve(connection: socket.socket, imports: Imports) -> None:
    _, fds, _, _ = socket.recv_fds(connection, 16, 4)
    connection.close()
    if len(fds) < 4:
        os._exit(0)
    for fd in fds:
        os.set_inheritable(fd, False)
    devnull = os.open(os.devnull, os.O_RDONLY)
    for fd, stream in ((devnull, 0), (fds[2], 1), (fds[3], 2)):  # where the agent's own output goes by now
        os.dup2(fd, stream)
        os.close(fd)
    zygote.main(socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1]), imports)


class WarmStart(Lifecycle):
    """A zygote that is started when workers are first wanted and replaced if it is found dead, or out of date.

    For the agent's main thread only: the kernel ties the zygote to the thread that started it.
    """

    def __init__(self, runtime_dir: Path, emit: Emit, first: ForkedZygote | None = None) -> None:
        self._path = runtime_dir / "zygote.sock"
        self._emit = emit
        self._first = first
        self._process: subprocess.Popen[bytes] | ForkedZygote | None = None
        self._news: socket.socket | None = None
        self._ready = False
        self._zygote_pid: int | None = None
        self._cold = ""
        self._stale = ""

    def socket_path(self) -> str:
        """Return the socket at which to ask for a worker; `COLD` if there is no zygote, or a fork would not do."""
        self.listen()
        if self._cold:
            self.close()
            return COLD
        if self._process is not None and self._stale:
            self._emit(EventName.WARM_START_RENEWED, reason=self._stale)
            self.close()
        if self._process is not None and self._process.poll() is not None:
            self._emit(EventName.WARM_START_LOST, exit_code=self._process.returncode)
            self._process = None
        if self._process is None:
            self.start()
        return str(self._path) if self._process is not None else COLD

    def start(self) -> None:
        """Start the zygote; workers may ask it at once and are forked when it has imported torch."""
        self._path.unlink(missing_ok=True)
        self._forget()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                self._news = ours
                _bind(listener, self._path)
                listener.listen(256)
                first, self._first = self._first, None
                if first is not None and first.poll() is None:
                    first.hand_over(listener, theirs)
                    self._process = first
                else:
                    fds = (listener.fileno(), theirs.fileno())
                    self._process = subprocess.Popen(
                        [*_GUARDIAN, str(os.getpid()), *_START, _PROGRAM, paths.HOME, *map(str, fds)],
                        stdin=subprocess.DEVNULL,
                        pass_fds=fds,
                    )
        except OSError as error:
            log.warning("workers start cold: %s", error)

    def listen(self) -> None:
        """Hear what the zygote and its workers tell, and tell of it."""
        while self._news is not None:
            try:
                data = self._news.recv(_MESSAGE_MAX_BYTES, socket.MSG_DONTWAIT)
                message = json.loads(data) if data else {}
            except (OSError, ValueError):
                return
            if not data:
                return
            self._zygote_pid = self._zygote_pid or message.get("pid")
            self._ready = self._ready or bool(message.get("ready"))
            self._stale = self._stale or str(message.get("stale", ""))
            cold = str(message.get("cold", ""))
            if cold and not self._cold:
                self._cold = cold
                self._emit(EventName.WARM_START_OFF, reason=cold)

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the zygote has made its imports, or has died of them; returns whether it is ready.

        A node that joins before that only makes the others wait for it with their workers stopped.
        """
        ends_s = time.monotonic() + timeout_s
        if self._news is not None:
            with contextlib.suppress(OSError):
                self._news.send(b"!", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        while self._process is not None and self._news is not None:
            self.listen()
            left_s = ends_s - time.monotonic()
            if self._ready or left_s <= 0 or self._process.poll() is not None:
                break
            select.select([self._news], [], [], min(left_s, 1.0))
        return self._ready

    def orphans(self) -> ProcessesByPid:
        """Find what workers have left: orphans come to the zygote's guardian, and so are beside the zygote."""
        zygote_pid = self.zygote_pid()
        return (
            descendants([self._process.pid], without=[zygote_pid]) if self._process is not None and zygote_pid else {}
        )

    def zygote_pid(self) -> int | None:
        """The pid of the process that forks workers; None before it can."""
        self.listen()
        return self._zygote_pid

    def _forget(self) -> None:
        if self._news is not None:
            self._news.close()
        self._news, self._ready, self._stale, self._zygote_pid = None, False, "", None

    def close(self) -> None:
        """End the zygote, and with it every worker that it forked."""
        self._forget()
        for process in (self._process, self._first):
            if process is not None:
                process.kill()
                process.wait()
        self._process = self._first = None


def _bind(listener: socket.socket, path: Path) -> None:
    """Bind by way of the folder: a socket's address holds 107 bytes, and TMPDIR may be longer."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
    os.chmod(path, 0o600)
