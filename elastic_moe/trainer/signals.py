"""Without an agent, a signal asks for a stop at the next step boundary: the state is saved before the process ends.

Before the first step there is nothing to save, and data may be read for hours: there it stops at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from elastic_moe.errors import Stopped
from launcher import worker

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Catches the first SIGTERM or SIGINT while it is entered; a second one does what it would have done without us.

    Under an agent it catches nothing: the agent asks its workers by other means, and must be able to end them.
    """

    def __init__(self, *, under_agent: bool) -> None:
        self.received: signal.Signals | None = None
        self._is_on = not under_agent and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}
        self._has_begun = False

    def begin(self) -> None:
        """From here on there is a step boundary to wait for."""
        self._has_begun = True

    def __enter__(self) -> Self:
        if self._is_on:
            self._before = {number: signal.signal(number, self._catch) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is KeyboardInterrupt and self.received is not None and not self._has_begun:
            raise Stopped(f"{self.received.name} stopped the training before its first step: nothing is lost") from None

    def asked(self) -> bool:
        """Whether any rank was asked to stop. A collective, but for threads that can catch no signal."""
        return self._is_on and not worker.on_all_ranks(self.received is None)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if not self._has_begun:
            raise KeyboardInterrupt  # not our own error: libraries are called, which may catch every `Exception`

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
