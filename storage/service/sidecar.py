"""The checkpoint service as an agent's sidecar: started with it, kept running, drained when it leaves."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from storage.service import address, starting

if TYPE_CHECKING:
    from storage.service.capture_request import CaptureRequest
    from storage.service.messages import ServiceMessage

log = logging.getLogger(__name__)

Tell = Callable[[str], object]
"""Told in one line what has become of the service."""

_RESTART_S = (0.0, 0.5, 2.0, 5.0)
_LOOK_S = 0.5
_SETTLED_S = 3.0
"""After a worker's first word its job is likely to train, and no more to start."""
_END_S = 5.0
_LINGER_S = 1.0
_ANSWER_S = 5.0


class CheckpointService:
    """The service of one node, from `start` to `close`. It ends by itself, too, where its agent is killed.

    Until a worker saves something it is one small process that waits.

    Args:
        rate_bytes_per_s: at most so much is sent to stores.
    """

    def __init__(self, rate_bytes_per_s: float | None = None) -> None:
        self._rate_bytes_per_s = rate_bytes_per_s
        self._path = Path()
        self._tell: Tell = log.warning
        self._lifeline: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._is_drained = False
        self._is_closing = threading.Event()

    @property
    def address(self) -> str:
        """Where it listens: what workers are told."""
        return str(self._path)

    def start(self, folder: Path, tell: Tell) -> None:
        """Start it with its socket below `folder`, the agent's own; `tell` hears when it has to be started again."""
        self._path, self._tell = folder / "service" / "service.sock", tell
        ends = os.pipe()
        self._lifeline = ends[1]
        self._process = self._run(ends[0])
        calls = (functools.partial(self._watch, ends[0]), self._prepare)
        self._threads = [threading.Thread(target=call, name="checkpoint-service", daemon=True) for call in calls]
        for thread in self._threads:
            thread.start()

    def expect(self) -> None:
        """Have the service's process started, though nobody has asked it anything: so no restore waits for its imports.

        Where the job has saved nothing so far it costs one process that waits.
        """
        if self._process is None or address.used(self._path).exists():
            return
        with (
            contextlib.suppress(OSError),  # it does not listen yet, and its first caller will start it
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as caller,
            address.short_path(self._path) as path,
        ):
            caller.connect(path)

    def capture(self, timeout_s: float) -> CaptureRequest | None:
        """Have the live state of all workers kept, within that time; it goes on by itself. None: there is no worker."""
        if self._process is None or not address.used(self._path).exists():
            return None
        from storage.service.capture_request import CaptureRequest  # a service that nobody used has cost nothing

        return CaptureRequest(self._path, timeout_s).start()

    def drain(self, grace_s: float) -> None:
        """Have it finish what is under way, and give up what is not finished in time, which it then tells."""
        if self._process is None or not address.used(self._path).exists():
            return
        from storage.service.messages import Drained, ProtocolError  # one that nobody used has cost the agent nothing

        self._is_drained = True  # from here on it may end in order, before whoever drains it comes to close it
        ends_s, drained = time.monotonic() + grace_s, None
        try:
            while drained is None:
                drained = self._drained(max(0.0, ends_s - time.monotonic()))
                if drained is None and time.monotonic() >= ends_s:
                    raise OSError("it has crashed meanwhile, and there is no more time")
        except (OSError, ProtocolError) as error:
            self._tell(f"it cannot be drained: {error}")
            return
        if isinstance(drained, Drained) and drained.num_abandoned:
            self._tell(f"{drained.num_abandoned} saves were given up, as there was no more time")

    def _drained(self, grace_s: float) -> ServiceMessage | None:
        """The answer to a drain; None of a service that has crashed, whose next one knows nothing of it."""
        from storage.service.channel import connect
        from storage.service.messages import Drain, Hello

        channel, _ = connect(self._path, Hello(pid=os.getpid()))
        with contextlib.closing(channel):
            channel.limit_receive(grace_s + _ANSWER_S)
            try:
                channel.send(Drain(grace_s=grace_s))
                received = channel.receive()
            except ConnectionError:
                received = None
        return None if received is None else received[0]

    def close(self) -> None:
        """End it. Closing twice is harmless."""
        self._is_closing.set()
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)
        if self._process is None:
            return
        try:
            self._process.wait(_LINGER_S + _END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # what it has forked goes with it
            self._process.wait()
        for thread in self._threads:
            thread.join()

    def _run(self, lifeline: int) -> subprocess.Popen[bytes]:
        rate = [] if self._rate_bytes_per_s is None else ["--rate-limit", str(self._rate_bytes_per_s)]
        command = [*starting.command_line(self._path), "--lifeline", str(lifeline), "--linger", str(_LINGER_S), *rate]
        return subprocess.Popen(command, env=starting.environment(os.environ), pass_fds=[lifeline])

    def _prepare(self) -> None:
        """Import what a capture needs, pydantic for one: when it is needed a job waits for it."""
        while not address.used(self._path).exists():
            if self._is_closing.wait(_LOOK_S):
                return
        if not self._is_closing.wait(_SETTLED_S):
            importlib.import_module("storage.service.capture_request")

    def _watch(self, lifeline: int) -> None:
        """Start it again where it has ended before its time."""
        num_ends = 0
        try:
            while True:
                assert self._process is not None
                code = self._process.wait()
                if self._is_drained and code == 0:
                    return
                if self._is_closing.wait(_RESTART_S[min(num_ends, len(_RESTART_S) - 1)]):
                    return
                num_ends += 1
                self._tell(f"it has ended (exit code {code}), and is started again")
                try:
                    self._process = self._run(lifeline)
                except OSError as error:
                    self._tell(f"it cannot be started: {error}")
                    return
        finally:
            os.close(lifeline)
