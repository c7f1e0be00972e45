"""What runs beside a node's workers and outlives them, as far as its agent knows it; elastic_moe hands it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Capture(Protocol):
    """The workers' state on its way into the sidecar's memory. Thread-safe."""

    def done(self) -> bool:
        """Whether every worker's is there, or will not come."""

    def told(self) -> Mapping[str, Any]:
        """What has become of it so far: fields of the event `live_state_captured`."""


class Sidecar(Protocol):
    """For the agent's main thread. No method raises, or takes long."""

    def capture(self, timeout_s: float) -> Capture:
        """Have the workers' state kept as it is after their last complete step, for they are about to be ended.

        It returns at once; after `timeout_s` what is not there will not come.
        """
