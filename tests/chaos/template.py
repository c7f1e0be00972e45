"""Nodes as forks of one process that has made an agent's imports: real agents, at a tenth of the processor time.

`python -m tests.chaos.template SOCKET_FD` takes one message a node: {"argv", "env", "host"} with the descriptors of a
pipe that gets the exit status, the node's output, and perhaps a network namespace. The fork enters that namespace, is
its own session, and runs `elastic-moe` from there on as a new process would; no thread and no gRPC exist before. Its
imports_ahead is a fork of it, as ever, with nothing more to import.
The nodes end with this process, and this process with the one that holds the other end of its socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from typing import Any

from tests.chaos.network import CLONE_NEWNET, Host
from tests.cluster import child_environment

_CLONE_NEWUTS, _CLONE_NEWNS = 0x04000000, 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MAX_MESSAGE_BYTES = 1 << 18


class Forked:
    """A node's agent, seen from the test: as much of `subprocess.Popen` as `tests.cluster.Node` uses."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        self._selector = selectors.DefaultSelector()
        self._selector.register(status, selectors.EVENT_READ)

    def poll(self) -> int | None:
        """The exit code as Popen has it (negative: a signal), None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not self._selector.select(timeout):
                raise subprocess.TimeoutExpired(f"node {self.pid}", timeout)
            told = os.read(self._status, 64)
            self._selector.close()
            os.close(self._status)
            self.returncode = os.waitstatus_to_exitcode(int(told)) if told else -signal.SIGKILL
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """As Popen does: not to a process that has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Template:
    """The forking process, seen from the test."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = child_environment(OMP_NUM_THREADS="1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.template", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )

    def start(self, argv: list[str], env: dict[str, str], log: int, host: Host) -> Forked:
        """Run `elastic-moe ARGV` on a host, with `log` as its output."""
        status_r, status_w = os.pipe()
        fds = [status_w, log] + ([] if host.namespace is None else [host.namespace])
        message = json.dumps({"argv": argv, "env": env, "host": host.name, "files": dict(host.files)}).encode()
        try:
            socket.send_fds(self._socket, [message], fds)
            answer = self._socket.recv(64)
        finally:
            os.close(status_w)
        if not answer:
            raise RuntimeError("the template ended")
        return Forked(int(answer), status_r)

    def close(self) -> None:
        """End it, and every node."""
        self._socket.close()
        self._process.wait(30)


# --- in the template


def _serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a node a message; returns in the fork only."""
    wake_r, wake_w = os.pipe()
    for fd in (wake_r, wake_w):
        os.set_blocking(fd, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w)
    requests.setblocking(False)
    pipes: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(wake_r, selectors.EVENT_READ)
        while True:
            selector.select()
            with contextlib.suppress(BlockingIOError):
                os.read(wake_r, 4096)
            _reap(pipes)
            try:
                message, fds, _, _ = socket.recv_fds(requests, _MAX_MESSAGE_BYTES, 3)
            except BlockingIOError:
                continue
            if not message:
                os._exit(0)  # the kernel ends the nodes with us
            gc.freeze()  # a fork that ends need not look at what it did not make: a second of processor time each
            pid = os.fork()
            if pid == 0:
                break
            pipes[pid] = fds[0]
            for fd in fds[1:]:
                os.close(fd)
            requests.send(str(pid).encode())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for fd in (wake_r, wake_w, fds[0], requests.fileno(), *pipes.values()):
        os.close(fd)
    requests.detach()
    return json.loads(message), fds[1:]


def _reap(pipes: dict[int, int]) -> None:
    for pid in list(pipes):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            pipe = pipes.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, str(status).encode())
            os.close(pipe)


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """In the fork: what a new process on that host would be."""
    from launcher.workers import process_tree

    process_tree.die_with(os.getppid())
    os.setsid()
    if len(fds) > 1:
        _move_to(fds[1], request["host"], request["files"])
    for target in (1, 2):
        os.dup2(fds[0], target)
    for fd in fds:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["elastic-moe", *request["argv"]]


def _move_to(namespace: int, name: str, files: dict[str, str]) -> None:
    """Be on another host: its network, its name, its files."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> None:
        if result != 0:
            sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")

    check(libc.setns(namespace, CLONE_NEWNET), "setns")
    check(libc.unshare(_CLONE_NEWUTS | _CLONE_NEWNS), "unshare")
    socket.sethostname(name)
    check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "mount --make-rprivate")
    for path, source in files.items():
        check(libc.mount(source.encode(), path.encode(), None, _MS_BIND, None), f"mount --bind {source} {path}")


def main() -> int:
    """Serve; in each fork, run one node."""
    import torch.distributed.run  # noqa: F401

    import launcher.launch  # noqa: F401
    from elastic_moe.cli.main import main as elastic_moe
    from launcher.workers import imports_ahead

    imports = imports_ahead.Imports()
    for name in imports_ahead.MODULES:
        imports.make(name)
    imports_ahead.settle_threads()
    assert not imports_ahead.unfit_to_fork(), imports_ahead.unfit_to_fork()
    request, fds = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(request, fds)
    return elastic_moe()


if __name__ == "__main__":
    sys.exit(main())
