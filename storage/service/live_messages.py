"""What workers, the agent and the service say to each other about live states (see `storage.service.capturing`)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from storage.service.messages import Identity, ServiceMessage, StagedAttempt


class WatchLive(ServiceMessage):
    """This worker can stage its live state: it waits for `CaptureLive`."""

    rank: int = Field(ge=0)
    generation: int = Field(ge=0)


class CaptureLive(ServiceMessage):
    """The worker's process is about to be ended: it is to stage its state now. Answered by `Captured`."""

    number: int
    timeout_s: float


class Captured(ServiceMessage):
    """After which `step` the state is that was staged; None, and the `reason`, where there is none."""

    number: int
    rank: int = Field(ge=0)
    step: int | None = None
    reason: str = ""


class KeepLive(ServiceMessage):
    """A rank has staged all that it holds of its live state: it is kept in memory, and nothing is stored.

    It comes with the two descriptors of `Stage`, and is answered by `Accepted` or `Rejected`.
    """

    has_descriptors: ClassVar[bool] = True

    url: str
    attempt: StagedAttempt
    origin: Identity


class CaptureNode(ServiceMessage):
    """From the agent: have all workers of this node stage their live state. Answered by `NodeCaptured`."""

    timeout_s: float = Field(ge=0)


class NodeCaptured(ServiceMessage):
    """By rank after which step its state is held, or why it is not."""

    steps: dict[int, int] = Field(default_factory=dict)
    missed: dict[int, str] = Field(default_factory=dict)
