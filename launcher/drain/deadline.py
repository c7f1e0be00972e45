"""The last resort of a drain: at the end of its grace the agent ends, whatever it is still waiting for.

A store that does not answer, a worker in uninterruptible sleep, a rendezvous in the middle of a call: each has its own
time limit, and together they may take longer than whoever takes this machine away will wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from launcher.drain.draining import DrainRequest, DrainRequests
from launcher.lifecycle import Lifecycle

_POLL_S = 0.1
_TELL_S = 0.2


class DrainDeadline(Lifecycle):
    """Ends the process with the request's exit code at its `gone_by_s`, from a thread of its own.

    It polls: the handler of a signal, which may take no lock, could not wake it. `tell(request)` may write events and
    logs; where that blocks (a full pipe), the process ends without a word.
    """

    def __init__(
        self, requests: DrainRequests, tell: Callable[[DrainRequest], None], end: Callable[[int], None] = os._exit
    ) -> None:
        self._requests = requests
        self._tell = tell
        self._end = end
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="drain-deadline", daemon=True)

    def start(self) -> None:
        """Begin to look at what was asked of this node."""
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_S):
            request, times = self._requests.current, self._requests.timetable
            if request is not None and times is not None and time.monotonic() >= times.gone_by_s:
                telling = threading.Thread(target=self._tell, args=(request,), name="drain-last-word", daemon=True)
                telling.start()
                telling.join(_TELL_S)
                self._end(request.exit_code)
                return

    def close(self) -> None:
        """Let the process stay from here on."""
        self._stopped.set()
