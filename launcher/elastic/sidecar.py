"""What runs beside a node's workers and outlives them, as far as its agent knows it; elastic_moe hands it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

Tell = Callable[[str], object]
"""Hears in one line what has become of a sidecar."""


class Capture(Protocol):
    """The workers' state on its way into the sidecar's memory. Thread-safe."""

    def done(self) -> bool:
        """Whether every worker's is there, or will not come."""

    def told(self) -> Mapping[str, Any]:
        """What has become of it so far: fields of the event `live_state_captured`."""


class Sidecar(Protocol):
    """A process that workers talk to, by a socket. For the agent's main thread; one `start`, one `close`.

    No method but `drain` and `close` takes long, and none but `start` raises.
    """

    @property
    def address(self) -> str:
        """The path of that socket, which workers are told; known after `start`."""

    def start(self, folder: Path, tell: Tell) -> None:
        """Start it, before any workers, with what it keeps in `folder`. It is kept running until `close`."""

    def expect(self) -> None:
        """Workers are about to start that may have a state to restore: have ready by then what takes a moment.

        It returns at once.
        """

    def capture(self, timeout_s: float) -> Capture | None:
        """Have the workers' state kept as it is after their last complete step, for they are about to be ended.

        It returns at once; after `timeout_s` what is not there will not come. None where no worker has asked for it.
        """

    def drain(self, grace_s: float) -> None:
        """Have it finish, in that time, what workers which are gone have left to it."""

    def close(self) -> None:
        """End it. Closing twice is harmless."""
