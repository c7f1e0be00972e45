"""A worker's way to its node's memory of states: a connection of its own to the service, a question at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from storage.errors import Cause, NotFound, Transient
from storage.held.buddies import PeerCard
from storage.held.inventory import PartKey
from storage.held.papers import PartLabel
from storage.service.channel import Channel, close_all
from storage.service.held_messages import (
    AskCard,
    AskHeld,
    AskPart,
    DropHeld,
    HeldHere,
    MakeWay,
    MeetNodes,
    NodeCard,
    Noted,
    NoteRestored,
    NotHeld,
    PartHere,
    WayFree,
)
from storage.service.messages import Hello, ProtocolError, Rejected, ServiceMessage, Welcome

_CONNECT_S = 2.0
_ANSWER_S = 30.0

M = TypeVar("M", bound=ServiceMessage)


class MemoryConnector(Protocol):
    """The way to the service."""

    def connect(self, hello: Hello, timeout_s: float) -> tuple[Channel, Welcome]:
        """A connection, tried again until then. Raises OSError, ProtocolError."""


class ServiceMemory:
    """A `storage.held.local.LocalMemory` in the service's process. Thread-safe.

    Args:
        connector: the way to the service.
        who: what the service is told of this node.
    """

    def __init__(self, connector: MemoryConnector, who: AskCard) -> None:
        self._connector = connector
        self._who = who
        self._lock = threading.Lock()
        self._channel: Channel | None = None

    def card(self) -> PeerCard:
        """See `LocalMemory.card`."""
        return self._ask(self._who, NodeCard)[0].card

    def meet(self, cards: Sequence[PeerCard]) -> None:
        """See `LocalMemory.meet`."""
        self._ask(MeetNodes(cards=tuple(cards)), Noted)

    def labels(self, run: str) -> Sequence[PartLabel]:
        """See `LocalMemory.labels`."""
        return self._ask(AskHeld(run=run), HeldHere)[0].labels

    def num_restores(self) -> dict[str, int]:
        """See `LocalMemory.num_restores`."""
        return self._ask(AskHeld(run=""), HeldHere)[0].num_restores

    def descriptors(self, part: PartKey) -> Sequence[int]:
        """See `LocalMemory.descriptors`."""
        attempt, rank = part
        return self._ask(AskPart(attempt=attempt, rank=rank), PartHere)[1]

    def restored(self, attempt: str, step: int) -> None:
        """See `LocalMemory.restored`."""
        self._ask(NoteRestored(attempt=attempt, step=step), Noted)

    def make_way(self, seconds: float) -> None:
        """See `LocalMemory.make_way`."""
        self._ask(MakeWay(seconds=seconds), Noted)

    def way_free(self, after_s: float = 0.0) -> None:
        """See `LocalMemory.way_free`."""
        self._ask(WayFree(after_s=after_s), Noted)

    def drop(self, attempts: Collection[str] | None, reason: str) -> None:
        """See `LocalMemory.drop`."""
        self._ask(DropHeld(attempts=None if attempts is None else tuple(attempts), reason=reason), Noted)

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _ask(self, question: ServiceMessage, kind: type[M]) -> tuple[M, list[int]]:
        """The answer, and the descriptors with it. A service that has started anew is asked once more."""
        with self._lock:
            try:
                if self._channel is not None:
                    try:
                        return self._asked(self._channel, question, kind)
                    except OSError:
                        self._forget()
                hello = Hello(pid=os.getpid())
                self._channel, _ = self._connector.connect(hello, _CONNECT_S)
                self._channel.limit_receive(_ANSWER_S)
                return self._asked(self._channel, question, kind)
            except (OSError, ProtocolError) as error:
                self._forget()
                raise Transient(f"the checkpoint service does not answer: {error}", Cause.UNREACHABLE) from None

    def _forget(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _asked(self, channel: Channel, question: ServiceMessage, kind: type[M]) -> tuple[M, list[int]]:
        channel.send(question)
        received = channel.receive()
        if received is None:
            raise ConnectionResetError("it has closed the connection")
        answer, fds = received
        if isinstance(answer, kind):
            return answer, fds
        close_all(fds)
        if isinstance(answer, NotHeld):
            raise NotFound(answer.reason)
        if isinstance(answer, Rejected):
            raise ProtocolError(answer.reason)
        raise ProtocolError(f"{type(answer).__name__} is no answer to {type(question).__name__}")
