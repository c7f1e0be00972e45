"""Handles the signals that end an agent. Before it runs, they end it by an exception: nothing it started is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Have `handler` called for each of them. Does nothing outside the main thread, which alone can ask for signals.

    Where whoever started this process ignores the end of children (SIGCHLD), that is told from here on: else none of
    their exit codes is, and each failure would count as a success.
    """
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for handled in _HANDLED:
            signal.signal(handled, handler)


def stop_at_once(signum: int, _frame: FrameType | None) -> None:
    """End what the main thread does, by an exception. A handler of signals.

    Raises:
        SignalException: always.
    """
    received = signal.Signals(signum)
    raise SignalException(f"received {received.name}", received)
