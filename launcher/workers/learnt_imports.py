"""Has the zygote import ahead what the first worker's script has imported beyond torch, so that later workers have it.

The worker tells by a connection of its own, and the zygote tries those imports in a fork before it makes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import sysconfig
import time
from collections.abc import Collection, Mapping

from launcher.workers import paths
from launcher.workers.imports_ahead import Imports, settle_threads, unfit_to_fork

_LEARN_S, _LOOK_S = 10.0, 0.1
_LEARN_AFTER_S = 10.0
_TOLD_MAX_BYTES = 16 * 1024 * 1024


def _digest(value: str | None) -> str:
    """What stands for a variable's value, which may be a secret."""
    return hashlib.blake2b((value or "").encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _line_of(variable: str, value: str | None) -> str:
    """What is told of a variable, whose name may be any bytes: a line of its own."""
    return f"={os.fsencode(variable).hex()} {_digest(value)}"


def _variable_in(line: str) -> tuple[str, str]:
    """The name, and the digest of the value, in what `_line_of` has made. Raises ValueError."""
    name, digest = line[1:].split(" ")
    return os.fsdecode(bytes.fromhex(name)), digest


class ImportReporter:
    """In a worker: tells the zygote, for a while, which installed modules the script imports, and which variables it
    has set.

    It looks whenever the script imports something, on the script's own thread: a thread of ours would show.
    """

    def __init__(self, zygote: socket.socket, environment: Mapping[str, str]) -> None:
        self._zygote = zygote
        self._environment = environment
        self._told = set(sys.modules)
        self._variables: set[str] = set()
        self._next_s = time.monotonic()
        self._ends_s = self._next_s + _LEARN_S
        self._roots = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})

    def look(self) -> None:
        """Tell what has been imported and set since the last look."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + _LOOK_S
        if now_s > self._ends_s:
            self._next_s = float("inf")
            self._zygote.close()
            return
        names = [name for name in list(sys.modules) if name not in self._told]
        self._told.update(names)
        new = {n for n, v in os.environ.items() if self._environment.get(n) != v} - self._variables
        self._variables |= new
        lines = [
            *(_line_of(name, os.environ.get(name)) for name in new),
            *(name for name in names if name.isprintable() and self._is_installed(name)),
        ]
        for start in range(0, len(lines), 100):
            with contextlib.suppress(OSError):
                text = "\n".join(lines[start : start + 100]) + "\n"
                self._zygote.send(text.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _is_installed(self, name: str) -> bool:
        """Whether a module is an installed one. What a script's own do on import is theirs to do, once, in a worker."""
        origin = getattr(getattr(sys.modules.get(name), "__spec__", None), "origin", None) or ""
        own = name.partition(".")[0] in paths.OWN_PACKAGES and origin.startswith(paths.HOME)
        return name != "__main__" and (origin.startswith(self._roots) or own)


class ImportLearner:
    """In the zygote: hears of the first worker's imports, and tries them in a process that is thrown away."""

    def __init__(self) -> None:
        self.connection: socket.socket | None = None
        """What to hear by; None before the first worker, and once it has told all."""
        self.due_s = float("inf")
        """When enough has been heard, by the monotonic clock."""
        self._has_begun = False
        self._told = bytearray()
        self._trial: tuple[int, list[str]] | None = None  # the process that tries these imports

    def open(self) -> tuple[socket.socket, socket.socket] | None:
        """Make a connection for the first worker, the zygote's end first; None for all others."""
        return None if self._has_begun else socket.socketpair()

    def begin(self, connection: socket.socket) -> None:
        """Begin to hear the first worker, which has been forked with the other end."""
        self._has_begun = True
        self.connection = connection
        self.due_s = time.monotonic() + _LEARN_AFTER_S

    def hear(self) -> None:
        """Take what the worker has told; there is no more to come when it closes its end."""
        assert self.connection is not None
        part = self.connection.recv(65536)
        self._told += part[: _TOLD_MAX_BYTES - len(self._told)]
        if not part:
            self.due_s = float("-inf")

    def learn(self, waiting: Collection[str]) -> None:
        """Hear no more, and try what was heard in a fork, after the imports that are still `waiting` to be made."""
        assert self.connection is not None
        self.connection.close()
        self.connection, self.due_s = None, float("inf")
        lines = self._told.decode(errors="replace").split("\n")[:-1]
        set_otherwise = dict(_variable_in(line) for line in lines if line.startswith("="))
        names = [name for name in lines if name and not name.startswith("=") and name not in sys.modules]
        if not names:
            return
        pid = os.fork()
        if pid == 0:
            tried = Imports()
            for name in (*waiting, *names):
                tried.make(name)
            settle_threads()
            # what an import itself has set to the same value (torch's compiler does) is nobody's wish
            known = {name: _digest(os.environ.get(name)) for name in tried.recorder.read}
            depends = sorted(name for name, told in set_otherwise.items() if known.get(name, told) != told)
            if depends:
                print(f"zygote: imports nothing more: that reads {', '.join(depends)}", file=sys.stderr)
            os._exit(1 if depends or unfit_to_fork() else 0)
        self._trial = (pid, names)

    def reap(self) -> list[str]:
        """Return what may be imported, once the trial has ended well."""
        if self._trial is None:
            return []
        pid, names = self._trial
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return []
        self._trial = None
        return names if status == 0 else []
