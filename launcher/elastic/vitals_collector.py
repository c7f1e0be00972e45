"""Gathers how this node's workers are, for `elastic-moe status`, while the agent watches them."""

from __future__ import annotations

import json
import time
from pathlib import Path

from launcher.coordination.vitals_publisher import VitalsPublisher
from launcher.rounds.records import Round, describe
from launcher.rounds.vitals import Vitals
from launcher.workers.local_workers import LocalWorkers


class VitalsCollector:
    """What status shows of this node, as of now. For the agent's thread only."""

    def __init__(self, publisher: VitalsPublisher, folder: Path) -> None:
        self.checkpoint_path = folder / "checkpoint"
        self._publisher = publisher
        self._failure: tuple[float, str] = (0.0, "")
        self._generation = 0
        self._num_nodes = 1

    def begin(self, current: Round) -> None:
        """Begin anew with the workers of another round, which says itself why it had to be formed."""
        self._generation, self._num_nodes = current.generation, len(current.participants)
        if current.causes:
            root = current.causes[0]
            self._failure = root.failure.ts, f"{describe(root.failure)} (on {root.node_id})"

    def look(self, workers: LocalWorkers) -> None:
        """Gather and publish, if it is time for that: cheap enough for each turn of the agent's loop."""
        now_s = time.monotonic()
        if not self._publisher.due(now_s):
            return
        beats = [progress.beat_s for progress in workers.progress().values() if progress.beat_s]
        step, ts = _committed(self.checkpoint_path)
        self._publisher.publish(
            Vitals(
                generation=self._generation,
                step=workers.last_step(),
                beat_ts=round(time.time() - now_s + min(beats), 3) if beats else 0.0,
                failure_ts=self._failure[0],
                failure=self._failure[1],
                checkpoint_step=step,
                checkpoint_ts=ts,
            ),
            self._num_nodes,
        )


def _committed(path: Path) -> tuple[int, float]:
    """Read the step and time of the last checkpoint that a worker has told of; -1 and 0 where none has."""
    try:
        told = json.loads(path.read_bytes())
        return int(told["step"]), float(told["ts"])
    except (OSError, ValueError, TypeError, LookupError):
        return -1, 0.0
