"""The signals that end an agent. Before it runs, they end it by an exception, so that nothing it started is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call `handler` on each of them; nothing happens outside the main thread, which alone can ask for signals."""
    if threading.current_thread() is threading.main_thread():
        for handled in _HANDLED:
            signal.signal(handled, handler)


def stop_at_once(signum: int, _frame: FrameType | None) -> None:
    """A handler. Raises: SignalException."""
    received = signal.Signals(signum)
    raise SignalException(f"received {received.name}", received)
