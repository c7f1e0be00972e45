"""Commands as forks of one process that has made an agent's imports: real ones, at a tenth of the processor time.

`python -m tests.template SOCKET_FD` takes one message a command: {"program", "argv", "env", "cwd", "host"} with the
descriptors of a pipe that gets the exit status, of its output and its errors, and perhaps of a network namespace. The
fork enters that namespace, is its own session, and runs `elastic-moe`, torchrun or a script from there on as a new
process would; no thread and no gRPC exist before. An agent's imports_ahead is a fork of it, as ever, with nothing more
to import. What cannot be seen so is how a new interpreter comes to that point: tests of that start one.
The commands end with this process, and this process with the one that holds the other end of its socket.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tests.chaos.network import CLONE_NEWNET, Host

_CLONE_NEWUTS, _CLONE_NEWNS = 0x04000000, 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MAX_MESSAGE_BYTES = 1 << 18

Program = Literal["elastic-moe", "torchrun", "python"]
"""What is run; of python only `SCRIPT [ARGUMENT...]`."""
HERE = Host("here", "127.0.0.1", None)
_AT_START = dict(os.environ)  # before the first test has changed it


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for one that it starts, which is to find the same modules, and `more`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


class Forked:
    """A command, seen from the test: as much of `subprocess.Popen` as `tests.cluster.Node` uses."""

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
                raise subprocess.TimeoutExpired(f"command {self.pid}", timeout)
            told = os.read(self._status, 64)
            self._selector.close()
            os.close(self._status)
            self.returncode = os.waitstatus_to_exitcode(int(told)) if told else -signal.SIGKILL
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """As Popen does: not to a process that has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # reaped, and not yet told
                os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Template:
    """The forking process, seen from the test."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**_AT_START, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.template", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )

    def start(
        self,
        program: Program,
        argv: Sequence[str],
        env: Mapping[str, str],
        output: int | tuple[int, int],
        *,
        cwd: Path | None = None,
        host: Host = HERE,
    ) -> Forked:
        """Run `PROGRAM ARGV` on a host, with the descriptor `output` for all it says, or one each for both streams."""
        status_r, status_w = os.pipe()
        out, err = output if isinstance(output, tuple) else (output, output)
        fds = [status_w, out, err] + ([] if host.namespace is None else [host.namespace])
        told = {"program": program, "argv": list(argv), "env": dict(env), "cwd": str(cwd or Path.cwd())}
        message = json.dumps({**told, "host": host.name, "files": dict(host.files)}).encode()
        try:
            socket.send_fds(self._socket, [message], fds)
            answer = self._socket.recv(64)
        finally:
            os.close(status_w)
        if not answer:
            raise RuntimeError("the template ended")
        return Forked(int(answer), status_r)

    def run(
        self,
        program: Program,
        *argv: str,
        folder: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, as `subprocess.run` does; what it says goes through files in `folder`."""
        with (
            (folder / "forked.out").open("w+", errors="replace") as out,
            (folder / "forked.err").open("w+", errors="replace") as err,
        ):
            forked = self.start(program, argv, env or child_environment(), (out.fileno(), err.fileno()), cwd=cwd)
            try:
                code = forked.wait(timeout_s)
            finally:
                forked.kill()
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess([program, *argv], code, out.read(), err.read())

    def close(self) -> None:
        """End it, and every command."""
        self._socket.close()
        self._process.wait(60)


@functools.cache
def template() -> Template:
    """The one of this process, which is started when it is first asked for."""
    made = Template()
    atexit.register(made.close)
    return made


# --- in the template


def _serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a command a message; returns in the fork only."""
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
                message, fds, _, _ = socket.recv_fds(requests, _MAX_MESSAGE_BYTES, 4)
            except BlockingIOError:
                continue
            if not message:
                os._exit(0)  # the kernel ends the commands with us
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
    from launcher.workers import tied

    tied.die_with(os.getppid())
    os.setsid()
    out, err, *namespace = fds
    if namespace:
        _move_to(namespace[0], request["host"], request["files"])
    for fd, target in ((out, 1), (err, 2)):
        os.dup2(fd, target)
    for fd in fds:
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["program"], *request["argv"]]


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


def _run(program: Program) -> object:
    """What the command's `__main__` would do; its exit code, or what Python takes for one."""
    if program == "elastic-moe":
        from elastic_moe.cli.main import main as elastic_moe

        return elastic_moe()
    if program == "torchrun":
        from torch.distributed.run import main as torchrun

        return torchrun()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    return None


def main() -> object:
    """Serve; in each fork, run one command."""
    import torch.distributed.run  # noqa: F401

    import elastic_moe.cli.main  # noqa: F401
    import launcher.launch  # noqa: F401
    from launcher.workers import imports_ahead

    imports = imports_ahead.Imports()
    for name in imports_ahead.MODULES:
        imports.make(name)
    imports_ahead.settle_threads()
    assert not imports_ahead.unfit_to_fork(), imports_ahead.unfit_to_fork()
    request, fds = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(request, fds)
    return _run(request["program"])


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[arg-type]
