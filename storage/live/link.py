"""A worker's connection to its node's service for live states: hears when one is wanted, and hands it over."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from storage.errors import StorageError, Transient
from storage.live.state import LivePart
from storage.run.job import Origin
from storage.service import table
from storage.service.channel import Channel, close_all, connect
from storage.service.live_messages import Captured, CaptureLive, KeepLive, WatchLive
from storage.service.messages import (
    Accepted,
    Hello,
    Identity,
    ProtocolError,
    Rejected,
    ServiceMessage,
    StagedAttempt,
)
from storage.service.slot_teller import SlotTeller

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_ACCEPT_S = 10.0

Answer = Callable[[int | str], None]
"""Hears after which step the state was staged, or why it was not."""


class LiveLink:
    """One rank's, from `start` to `close`. A service that is away is looked for again, once a second.

    Args:
        path: the service's socket.
        url: of the run.
    """

    def __init__(self, path: Path, url: str, rank: int, origin: Origin) -> None:
        self._path = path
        self._url = url
        self._rank = rank
        self._origin = origin
        self._ask: Callable[[float, Answer], None] | None = None
        self._changed = threading.Condition()
        self._channel: Channel | None = None
        self._answers: dict[str, str | None] = {}  # by attempt, why it was refused; None: it was not
        self._teller = SlotTeller()
        self.on_connect: list[Callable[[], object]] = []
        """Called with each connection, and not to take long; what is added later, by any thread, with the next."""
        self.on_refused: Callable[[str], object] = lambda why: None
        """Hears why a service will not do for this process; set before `start`."""
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, ask: Callable[[float, Answer], None]) -> Self:
        """Connect, and have `ask` called with a time limit when the live state is wanted; it must not take long."""
        self._ask = ask
        self._thread = threading.Thread(target=self._run, name="storage-live-link", daemon=True)
        self._thread.start()
        return self

    def keep(self, part: LivePart) -> None:
        """Hand a part over; returns when it is safe from this process's death. Raises StorageError, MemoryError."""
        attempt = part.attempt
        listed = table.write(part.payloads, part.slot, part.contents, None)
        keep = KeepLive(
            url=self._url,
            attempt=StagedAttempt(
                prefix=attempt.prefix, step=attempt.step, id=attempt.id, world_size=attempt.world_size, rank=part.rank
            ),
            origin=Identity(**vars(self._origin)),
        )
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._channel is not None or self._is_closed.is_set(), _RETRY_S)
                channel = self._channel
            if channel is None:
                raise Transient("the node's checkpoint service is away")
            try:
                channel.send(keep, [listed.fd, part.slot.fd])
            except OSError as error:
                raise Transient(f"the node's checkpoint service cannot be reached: {error}") from error
            self._await_answer(channel, attempt.id)
        finally:
            listed.close()

    def guard(self, whose: str, descriptors: Sequence[int]) -> None:
        """Have the service hold these slots as well: a `storage.arena.arena.Guard`, one for each `whose`."""
        with self._changed:
            channel = self._channel
        self._teller.tell(channel, whose, descriptors)

    def close(self) -> None:
        """End the connection and the thread; closing twice is harmless."""
        self._is_closed.set()
        with self._changed:
            channel = self._channel
            self._changed.notify_all()
        if channel is not None:
            channel.close()
        if self._thread is not None:
            self._thread.join()

    def _await_answer(self, channel: Channel, attempt: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: attempt in self._answers or self._channel is not channel, _ACCEPT_S)
            if attempt not in self._answers:
                raise Transient("the node's checkpoint service does not answer")
            reason = self._answers.pop(attempt)
        if reason is not None:
            raise StorageError(f"the node's checkpoint service does not take it: {reason}")

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                channel, _ = connect(self._path, Hello(pid=os.getpid()))
            except ProtocolError as error:
                self.on_refused(f"the node's checkpoint service cannot keep it: {error}")
                return
            except OSError as error:
                log.debug("the service cannot be reached: %s", error)
                self._is_closed.wait(_RETRY_S)
                continue
            try:
                channel.send(WatchLive(rank=self._rank, generation=self._origin.generation))
                with self._changed:
                    self._channel = channel
                    self._changed.notify_all()
                for call in list(self.on_connect):
                    call()
                while not self._is_closed.is_set() and (received := channel.receive()) is not None:
                    close_all(received[1])
                    self._hear(channel, received[0])
            except (OSError, ProtocolError) as error:
                if not self._is_closed.is_set():
                    log.warning("the connection for live states has ended: %s", error)
            finally:
                with self._changed:
                    self._channel = None
                    self._changed.notify_all()
                channel.close()
            self._is_closed.wait(_RETRY_S)

    def _hear(self, channel: Channel, message: ServiceMessage) -> None:
        match message:
            case CaptureLive(number=number, timeout_s=timeout_s) if self._ask is not None:
                self._ask(timeout_s, lambda found: self._tell(channel, number, found))
            case Accepted(attempt=attempt):
                self._answered(attempt, None)
            case Rejected(attempt=attempt, reason=reason):
                self._answered(attempt, reason)

    def _answered(self, attempt: str, reason: str | None) -> None:
        with self._changed:
            self._answers[attempt] = reason
            self._changed.notify_all()

    def _tell(self, channel: Channel, number: int, found: int | str) -> None:
        step, reason = (found, "") if isinstance(found, int) else (None, found)
        try:
            channel.send(Captured(number=number, rank=self._rank, step=step, reason=reason))
        except OSError as error:
            log.warning("the service cannot be told of a live state: %s", error)
