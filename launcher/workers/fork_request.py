"""What `boot.py` asks the zygote for: a fork that becomes a worker. A frame with three descriptors on a Unix socket.

In it are lists of texts, each after its length, and a NUL between any two: what a program is given has none.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from launcher.frames import HEADER_BYTES, receive_body

_MAX_FRAME_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class ForkRequest:
    """A worker to become: what `python ARGV...` would be, in this environment and folder, started by that process."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    umask: int
    limits: list[tuple[int, int, int]]
    """For each resource: which one, and its soft and hard limit."""
    ignored: list[int]
    """The signals that are ignored."""
    fds: tuple[int, ...]
    """What becomes stdin, stdout and stderr."""

    @property
    def script(self) -> str | None:
        """The path of the script that is to run, None where a module is."""
        first = self.argv[1] if self.argv[:1] == ["-u"] else self.argv[0]
        return None if first == "-m" else os.path.join(self.cwd, first)

    @property
    def module_file(self) -> str | None:
        """The file of the module that is to run, if that is below the current folder."""
        module = self.argv[self.argv.index("-m") + 1].replace(".", os.sep)
        candidates = (os.path.join(self.cwd, f"{module}.py"), os.path.join(self.cwd, module, "__main__.py"))
        return next((path for path in candidates if os.path.isfile(path)), None)

    @classmethod
    def receive(cls, connection: socket.socket) -> ForkRequest:
        """Read a request; its descriptors are the caller's to close.

        Raises:
            EOFError: the connection was closed.
            TimeoutError: the request did not come in time.
            ValueError: it is not one.
        """
        header, fds, _, _ = socket.recv_fds(connection, HEADER_BYTES, 3)
        if not header:
            raise EOFError("closed")
        try:
            if len(fds) != 3:
                raise ValueError(f"{len(fds)} file descriptors, not 3")
            return cls._parse(receive_body(connection, _MAX_FRAME_BYTES, header), (fds[0], fds[1], fds[2]))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    @classmethod
    def _parse(cls, body: bytes, fds: tuple[int, int, int]) -> ForkRequest:
        """Raises ValueError."""
        texts = iter([os.fsdecode(text) for text in body.split(b"\0")])

        def some() -> list[str]:
            try:
                return [next(texts) for _ in range(int(next(texts)))]
            except (StopIteration, RuntimeError):
                raise ValueError("less than a request") from None

        argv, variables, (cwd, umask), limits, ignored = some(), some(), some(), some(), some()
        env = {name: value for name, _, value in (variable.partition("=") for variable in variables)}
        told = [(int(which), int(soft), int(hard)) for which, soft, hard in (limit.split() for limit in limits)]
        return cls(argv, env, cwd, int(umask), told, [int(signum) for signum in ignored], fds)
