"""An agent's request that its workers' live states be kept, under way."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from storage.service.channel import connect
from storage.service.live_messages import CaptureNode, NodeCaptured
from storage.service.messages import Hello, ProtocolError

log = logging.getLogger(__name__)

_ANSWER_S = 1.0  # longer than the service gives its workers


class CaptureRequest:
    """Of one node, from `start` on; it ends by itself. Thread-safe."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._ended = threading.Event()
        self._told = NodeCaptured()
        self._trouble: str | None = None

    def start(self) -> Self:
        """Ask the service."""
        threading.Thread(target=self._run, name="live-capture", daemon=True).start()
        return self

    def done(self) -> bool:
        """Whether every worker's state is kept, or will not be."""
        return self._ended.is_set()

    def told(self) -> Mapping[str, Any]:
        """By rank after which step its state is kept, and why others are missing; `reason`, if nobody can tell."""
        told, trouble = self._told, self._trouble if self._ended.is_set() else "the service has not answered in time"
        fields: dict[str, Any] = {"steps": told.steps, "missed": told.missed}
        return fields if trouble is None else {**fields, "reason": trouble}

    def _run(self) -> None:
        try:
            channel, _ = connect(self._path, Hello(pid=os.getpid()))
            with contextlib.closing(channel):
                channel.limit_receive(self._timeout_s + _ANSWER_S)
                channel.send(CaptureNode(timeout_s=self._timeout_s))
                received = channel.receive()
                if received is None or not isinstance(received[0], NodeCaptured):
                    raise ProtocolError("the service has ended without an answer")
                self._told = received[0]
        except (OSError, ProtocolError) as error:
            log.warning("the workers' state cannot be kept: %s", error)
            self._trouble = str(error)
        finally:
            self._ended.set()
