"""Turns a fork of the zygote into what `python ARGV...` would be, up to the point where that runs the script."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from launcher.environment import Environment
from launcher.workers import early_variables, paths, program, stash
from launcher.workers.channel import Channel
from launcher.workers.fork_request import ForkRequest
from launcher.workers.learnt_imports import ImportReporter
from launcher.workers.tied import die_with

_NEVER_IGNORED = (signal.SIGKILL, signal.SIGSTOP)
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


@dataclass(frozen=True)
class Zygote:
    """What a fork has to know of the zygote."""

    pid: int
    environment: Mapping[str, str]
    """Its variables while it imported."""
    variables_read: frozenset[str]
    """The names of the variables that its imports have read."""
    with_torch: frozenset[str]
    """The packages that `import torch` imports."""
    news: socket.socket
    """By which it, and its forks, tell the agent."""


def tell(news: socket.socket, **message: object) -> None:
    """Send the agent a message: at once, or not at all, and never with a SIGPIPE."""
    with contextlib.suppress(OSError):
        news.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def become(request: ForkRequest, zygote: Zygote, boot: socket.socket, import_reports: socket.socket | None) -> None:
    """Do all that `python ARGV...` does before it runs its program."""
    os.setsid()
    die_with(zygote.pid)
    told = Environment.from_env(request.env)
    if told.channel:
        with contextlib.suppress(OSError, ValueError):
            Channel.attach(told.channel, announce=False).claim()
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
    _settle_process(request)
    paths.be_a_scripts()
    if told.stacks:
        program.write_stacks_on_signal(str(told.stacks))
    _open_streams()
    seen = ImportReporter(import_reports, zygote.environment).look if import_reports is not None else _look_at_nothing

    worker_pid = os.getpid()

    def before(package: str) -> None:
        if os.getpid() != worker_pid:
            return  # a fork of the script's own: it is not the script that would begin anew
        names = early_variables.changed_early(early_variables.current(), request.env, zygote.variables_read)
        if names:
            _start_cold(names, package, request, zygote.news)

    sys.meta_path.insert(0, stash.Stash(zygote.with_torch, before, seen))


def _settle_process(request: ForkRequest) -> None:
    """Take over what a process takes over from the one that starts it, and renew what it has of its own."""
    time.tzset()
    os.umask(request.umask)
    for which, soft, hard in request.limits:
        with contextlib.suppress(ValueError, OSError):
            if resource.getrlimit(which) != (soft, hard):
                resource.setrlimit(which, (soft, hard))
    for signum in signal.valid_signals() - set(_NEVER_IGNORED):
        if signum in request.ignored:
            signal.signal(signum, signal.SIG_IGN)
        elif signal.getsignal(signum) is signal.SIG_IGN and signum not in _IGNORED_BY_PYTHON:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _go_to(request.cwd)
    tempfile.tempdir = None
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # a fork would repeat the zygote's sequence
    gc.enable()


def _go_to(folder: str) -> None:
    """Make it the current folder, unless it is: this user may be in one that it may not enter."""
    with contextlib.suppress(OSError):
        if os.getcwd() == folder:
            return
    os.chdir(folder)


def _open_streams() -> None:
    """Open stdin, stdout and stderr as `python -u` does (pylifecycle.c, create_stdio)."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, f"__{name}__")
        errors = old.errors if old is not None else "backslashreplace" if fd == 2 else "strict"
        encoding = old.encoding if old is not None else "utf-8"
        mode = "w" if fd else "r"
        raw = io.FileIO(fd, mode, closefd=False)
        if fd:
            new: Any = io.TextIOWrapper(raw, encoding, errors, newline="\n", write_through=True)
        else:
            new = io.TextIOWrapper(io.BufferedReader(raw), encoding, errors, write_through=True)
        raw.name = f"<{name}>"
        new.mode = mode
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    stash.rebind_log_handlers()


def _start_cold(names: list[str], package: str, request: ForkRequest, news: socket.socket) -> NoReturn:
    """Become a new process, which has imported nothing, by the same pid; the script begins anew."""
    why = f"the script sets {', '.join(names)} before it imports {package}"
    tell(news, cold=why)
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"started again, cold: {why}, which this process had imported ahead\n".encode())
    _go_to(request.cwd)
    command = [sys.executable, *request.argv]
    if stacks := Environment.from_env(request.env).stacks:
        command[2:2] = [program.__file__, str(stacks)]
    os.execve(sys.executable, command, request.env)


def _look_at_nothing() -> None:
    pass
