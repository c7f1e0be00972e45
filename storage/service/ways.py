"""The ways to the service of this node: the agent's, or one that this process starts for itself and its neighbours."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path
from typing import Protocol

from storage.service import address
from storage.service.channel import Channel, connect
from storage.service.messages import Hello, Welcome
from storage.service.starting import command_line, environment, log_of

log = logging.getLogger(__name__)

_RETRY_S = 0.05
_START_S = 60.0
_NOBODY = (FileNotFoundError, ConnectionRefusedError, ConnectionResetError)


class Connector(Protocol):
    """The way to the service.

    Attributes:
        path: the socket of the service.
        patience_s: for so long a save waits for the first connection, so that it is safe when it returns.
    """

    path: Path
    patience_s: float

    def connect(self, hello: Hello, timeout_s: float) -> tuple[Channel, Welcome]:
        """A connection, tried again until then. Raises OSError, ProtocolError."""


class ServiceAt:
    """The service that listens at a path, whoever has started it."""

    patience_s = 60.0

    def __init__(self, path: Path) -> None:
        self.path = path

    def connect(self, hello: Hello, timeout_s: float) -> tuple[Channel, Welcome]:
        """See `Connector.connect`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return connect(self.path, hello)
            except _NOBODY:
                if time.monotonic() >= deadline_s:
                    raise OSError(f"no checkpoint service listens at {self.path}") from None
            time.sleep(_RETRY_S)


class OwnService:
    """A service that the processes of this user share which ask for it by one name; the first of them starts it.

    It ends by itself when nobody is connected any more, and nothing is left to do. No save waits until it has started.
    """

    patience_s = 0.0

    def __init__(self, name: str, arguments: tuple[str, ...] = ()) -> None:
        self.path = address.path_for(name)
        self._arguments = arguments

    def connect(self, hello: Hello, timeout_s: float) -> tuple[Channel, Welcome]:
        """See `Connector.connect`."""
        try:
            return connect(self.path, hello)
        except _NOBODY:
            self.start()
        return ServiceAt(self.path).connect(hello, max(timeout_s, _RETRY_S))

    def start(self) -> None:
        """Start it, unless somebody else does at the same time. Raises OSError."""
        command = [*command_line(self.path), "--detach", *self._arguments]
        try:
            ended = subprocess.run(command, env=environment(os.environ), timeout=_START_S, check=False)
        except subprocess.TimeoutExpired:
            raise OSError(f"the checkpoint service did not start within {_START_S:.0f} s") from None
        if ended.returncode != 0:
            raise OSError(
                f"the checkpoint service does not start (exit code {ended.returncode}); see {log_of(self.path)}"
            )
