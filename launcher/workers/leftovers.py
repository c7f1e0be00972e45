"""Finds and ends what this node's workers have left running, before their agent starts new ones.

A cold worker's guardian does that when its worker ends. Here is what it cannot reach: orphans of forked workers, which
come to the zygote's guardian, and of workers whose guardian was killed itself, which come to the agent. Among the
agent's own children those are known by their environment, which names a channel in this agent's folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from launcher.environment import Environment
from launcher.lifecycle import Lifecycle
from launcher.workers import process_tree
from launcher.workers.process_tree import ProcessesByPid
from launcher.workers.warm import WarmStart


class Leftovers(Lifecycle):
    """The processes that workers have left, known from `start` on. For the agent's main thread only."""

    def __init__(self, runtime_dir: Path, warm: WarmStart | None, *, keep: bool) -> None:
        """With `keep`, nothing is looked for or ended."""
        self._mark = f"{Environment.variable('channel')}={runtime_dir}{os.sep}".encode()
        self._warm = warm
        self._keep = keep

    def start(self) -> None:
        """Become the parent of the orphans of this node's workers."""
        if not self._keep:
            process_tree.adopt_orphans()

    def end(
        self, boots: Collection[int], grace_s: float
    ) -> tuple[list[process_tree.Process], list[process_tree.Process]]:
        """End what there is: SIGTERM first, SIGKILL after `grace_s`.

        `boots` are the processes that stand for workers, which may still be there and are let be.

        Returns:
            The processes that there were, and those that are still there.
        """
        return ([], []) if self._keep else process_tree.end(lambda: self._find(boots), grace_s)

    def _find(self, boots: Collection[int]) -> ProcessesByPid:
        own = [
            pid for pid in process_tree.children_by_parent()(os.getpid()) if pid not in boots and self._is_marked(pid)
        ]
        found = process_tree.descendants(own)
        for process in (process_tree.look_up(pid) for pid in own):
            if process is not None:
                found[process.pid] = process
        return found | (self._warm.orphans() if self._warm else {})

    def _is_marked(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return any(variable.startswith(self._mark) for variable in environment.split(b"\0"))

    def close(self) -> None:
        """Leave orphans to others again."""
        if not self._keep:
            with contextlib.suppress(OSError):
                process_tree.leave_orphans()
