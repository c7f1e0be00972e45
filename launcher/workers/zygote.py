"""A process that has imported torch and forks workers: a restart costs a tenth of a second, not an import of torch.

`python -m launcher.workers.zygote LISTENER_FD READY_FD`, below a guardian, serves `boot.py` on a Unix socket, one
connection a worker:

    boot -> zygote   frame {"argv", "env", "cwd"} with boot's stdin, stdout and stderr (SCM_RIGHTS)
    zygote -> boot   frame {"pid"}, or {"cold": why} if forking is not safe here; at the end frame {"status"}
    boot -> zygote   frame {"signal"}; a closed connection means SIGKILL

It stays fit to fork by what it does not do: no thread, no CUDA, no gRPC, nothing but imports. What the workers
imported from installed packages is learnt from the first one and imported here too, after a probe in a fork of its
own has shown that this starts no thread and touches no CUDA. The child becomes `python SCRIPT` or `python -m MODULE` as
far as a script can tell.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from launcher.frames import HEADER_BYTES, receive, send
from launcher.workers.channel import Channel
from launcher.workers.family import die_with
from launcher.workers.program import run, write_stacks_on_signal

_MODULES = (
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",  # FSDP2 imports it when it first shards a module
)
_OWN_PACKAGES = ("elastic_moe", "launcher", "storage")
_LEARN_AFTER_S = 10.0
_MAX_FRAME_BYTES = 16 * 1024 * 1024
_FRAME_TIMEOUT_S = 10.0
_END = b"\0"


@dataclass(frozen=True)
class Request:
    """A worker to become: what `python ARGV...` would be, in this environment and folder."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    fds: tuple[int, ...]


def _settle_threads() -> None:
    """Fork once for nothing: libraries that are prepared for forks (OpenBLAS) end their idle threads at the first.

    They start them again when they next compute, which the zygote never does.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def unfit_to_fork() -> str:
    """Why a fork of this process might not work, "" if it will."""
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads > 1:
        return f"{num_threads - 1} thread(s) were started by an import"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA was initialised by an import"
    return ""


class _Zygote:
    def __init__(self, listener: socket.socket) -> None:
        self.connection: socket.socket | None = None  # in a child: to the boot that stands for it
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._workers: dict[int, socket.socket] = {}
        self._to_import: deque[str] = deque()
        self._learning: int | None = None  # read end of the pipe on which a worker will tell what it imported
        self._told = bytearray()
        self._learnt = False
        self._probe: tuple[int, list[str]] | None = None  # the process that tries these imports first
        self._wake_r, self._wake_w = os.pipe()
        for fd in (self._wake_r, self._wake_w):
            os.set_blocking(fd, False)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_w)

    def serve(self) -> Request:
        """Serve until this process is a forked child; what it is to become."""
        while True:
            timeout_s = 0.0 if self._to_import and self._workers else None
            ready = self._selector.select(timeout_s)
            if not ready and self._to_import:
                _import(self._to_import.popleft())
                if not self._to_import:
                    _settle_threads()
            for key, _ in ready:
                if key.fileobj is self._listener:
                    request = self._accept()
                    if request is not None:
                        return request
                elif key.fd == self._wake_r:
                    self._reap()
                elif key.fd == self._learning:
                    self._learn()
                else:
                    self._hear(key.data)

    def _accept(self) -> Request | None:
        connection, _ = self._listener.accept()
        connection.settimeout(_FRAME_TIMEOUT_S)
        try:
            request = _receive_request(connection)
        except (OSError, EOFError, ValueError) as error:
            print(f"zygote: dropped a request: {error}", file=sys.stderr)
            connection.close()
            return None
        if unfit := unfit_to_fork():
            self._answer(connection, {"cold": unfit})
            connection.close()
        elif self._fork(connection):
            return request
        for fd in request.fds:
            os.close(fd)
        return None

    def _fork(self, connection: socket.socket) -> bool:
        """Fork a worker for `connection`; True in the child."""
        learn_r, learn_w = (-1, -1) if self._learnt else os.pipe()
        gc.freeze()  # a worker's collector need not go through (and so copy) what all share: its end takes a third
        pid = os.fork()
        if pid == 0:
            self._leave_parent(learn_r)
            self.connection = connection
            if learn_w >= 0:
                _tell_imports_later(learn_w)
            return True
        if learn_w >= 0:
            os.close(learn_w)
            self._learnt = True
            self._learning = learn_r
            self._selector.register(learn_r, selectors.EVENT_READ)
        self._workers[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, data=pid)
        self._answer(connection, {"pid": str(pid)})
        return False

    def _leave_parent(self, learn_r: int) -> None:
        """In the child: let go of everything that is the zygote's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for other in (*self._workers.values(), self._listener):
            other.close()
        for fd in (self._wake_r, self._wake_w, learn_r, self._learning or -1):
            if fd >= 0:
                os.close(fd)

    def _answer(self, connection: socket.socket, message: dict[str, str]) -> None:
        with contextlib.suppress(OSError):  # boot is gone: its closed connection is heard next
            send(connection, message)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        for pid in list(self._workers):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                connection = self._workers.pop(pid)
                with contextlib.suppress(KeyError):  # its boot is gone
                    self._selector.unregister(connection)
                self._answer(connection, {"status": str(status)})
                connection.close()
        if self._probe is not None:
            pid, names = self._probe
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._probe = None
                self._to_import.extend(names if status == 0 else ())

    def _hear(self, pid: int) -> None:
        connection = self._workers.get(pid)
        if connection is None:
            return  # reaped in the same round
        try:
            signum = int(receive(connection, _MAX_FRAME_BYTES)["signal"])
        except (OSError, EOFError, ValueError, KeyError):
            signum = signal.SIGKILL
            self._selector.unregister(connection)
        try:
            os.killpg(pid, signum)
        except ProcessLookupError:  # it has no group of its own yet; it is ours to reap, so the pid is its
            os.kill(pid, signum)

    def _learn(self) -> None:
        """Hear what the first worker imported, and try it in a process that is thrown away."""
        assert self._learning is not None
        part = os.read(self._learning, 65536)
        self._told += part
        if part and not self._told.endswith(_END):
            return
        self._selector.unregister(self._learning)
        os.close(self._learning)
        self._learning = None
        told = self._told.removesuffix(_END).decode().split("\n")
        names = [name for name in told if name and name not in sys.modules]
        if not names:
            return
        pid = os.fork()
        if pid == 0:
            for name in (*self._to_import, *names):
                _import(name)
            _settle_threads()
            os._exit(1 if unfit_to_fork() else 0)
        self._probe = (pid, names)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 (whatever an import does, the worker may still want to do it)
        print(f"zygote: {name} is not imported ahead: {error}", file=sys.stderr)


def _tell_imports_later(learn_w: int) -> None:
    """In a worker: tell once which installed modules it uses. A short-lived thread of the worker, not of the zygote."""
    roots = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})

    def tell() -> None:
        names = []
        for name, module in list(sys.modules.items()):
            origin = getattr(getattr(module, "__spec__", None), "origin", None) or ""
            # Not the script's own modules: what they do on import is theirs to do, once, in a worker.
            if name != "__main__" and (origin.startswith(roots) or name.partition(".")[0] in _OWN_PACKAGES):
                names.append(name)
        with contextlib.suppress(OSError):
            os.write(learn_w, "\n".join(names).encode() + _END)
        os.close(learn_w)

    timer = threading.Timer(_LEARN_AFTER_S, tell)
    timer.daemon = True
    timer.start()


def _receive_request(connection: socket.socket) -> Request:
    header, fds, _, _ = socket.recv_fds(connection, HEADER_BYTES, 3)
    if not header:
        raise EOFError("closed")
    if len(fds) != 3:
        raise ValueError(f"{len(fds)} file descriptors, not 3")
    try:
        told = receive(connection, _MAX_FRAME_BYTES, header)
        return Request(list(told["argv"]), dict(told["env"]), str(told["cwd"]), tuple(fds))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _become(request: Request, zygote_pid: int, boot: socket.socket) -> None:
    """In the child: be what `python ARGV...` would be, up to the point where it runs the program."""
    os.setsid()
    die_with(zygote_pid)
    if path := request.env.get("ELASTIC_MOE_HEARTBEAT"):
        with contextlib.suppress(OSError, ValueError):
            Channel.attach(Path(path), announce=False).claim()
    # An agent that ends the boot looks for our claim afterwards: either it finds it, or we see here that boot is gone.
    boot.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        if not boot.recv(1, socket.MSG_PEEK):
            os._exit(1)
    boot.close()
    for target, fd in enumerate(request.fds):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request.env)
    time.tzset()
    os.chdir(request.cwd)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # a fork would repeat the zygote's sequence
    write_stacks_on_signal()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]


def main(argv: list[str]) -> None:
    """Serve on the listener that the agent opened: workers started meanwhile wait for these imports in its queue."""
    listener, ready_fd = socket.socket(fileno=int(argv[1])), int(argv[2])
    for name in _MODULES:
        _import(name)
    _settle_threads()
    zygote_pid = os.getpid()
    os.write(ready_fd, str(zygote_pid).encode())
    os.close(ready_fd)
    zygote = _Zygote(listener)
    request = zygote.serve()
    assert zygote.connection is not None
    _become(request, zygote_pid, zygote.connection)
    run(request.argv)


if __name__ == "__main__":
    main(sys.argv)
