"""A thread that carries tasks out one after the other, so that nobody else has to wait for the store."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from launcher.node.effects import Task


class LaneThread:
    """`put` may be called from any thread, and never waits. The thread is started with the first task."""

    def __init__(self, name: str, carry_out: Callable[[Task], None]) -> None:
        self._name = name
        self._carry_out = carry_out
        self._tasks: deque[Task] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, task: Task) -> None:
        """Have a task carried out after those that were put before."""
        with self._wake:
            if self._closed:
                return
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self, timeout_s: float) -> None:
        """Carry out nothing more; wait for a task under way, at most `timeout_s`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._tasks)
                if self._closed:
                    return
                task = self._tasks.popleft()
            self._carry_out(task)
