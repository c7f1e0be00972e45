"""Handles the signals that end an agent. Before it runs, they end it by an exception: nothing it started is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException

from launcher.errors import UsageError
from launcher.workers.process_tree import hear_of_children

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_NOT_OURS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD)  # the system's, and what children end by


def parse_signals(text: str | None) -> tuple[signal.Signals, ...]:
    """The signals of `--signals-to-handle`, names with commas between; those that are handled without it for None.

    Raises:
        UsageError: one of them is none, or nobody can handle it.
    """
    if text is None:
        return HANDLED
    found = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        known = signal.Signals.__members__.get(name.upper())
        if known is None or known in _NOT_OURS:
            raise UsageError(
                f"--signals-to-handle {name}: no signal that an agent can handle; give names such as SIGTERM,SIGUSR1"
            )
        found.append(known)
    return tuple(dict.fromkeys(found))


def handle_signals(
    handler: Callable[[int, FrameType | None], None], signals: Iterable[signal.Signals] = HANDLED
) -> None:
    """Have `handler` called for each of them. Does nothing outside the main thread, which alone can ask for signals."""
    if threading.current_thread() is threading.main_thread():
        hear_of_children()  # else each of their failures would count as a success
        for handled in signals:
            signal.signal(handled, handler)


def stop_at_once(signum: int, _frame: FrameType | None) -> None:
    """End what the main thread does, by an exception. A handler of signals.

    Raises:
        SignalException: always.
    """
    received = signal.Signals(signum)
    raise SignalException(f"received {received.name}", received)
