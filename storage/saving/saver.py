"""The way of a save: what the ranks agree on, a copy of this rank's part, and the rest behind the training's back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from storage.events import CheckpointEvent, Reporter
from storage.ranks.agreement import AgreeingGroup
from storage.ranks.steps import agreed_step
from storage.saving.commit import Attempt
from storage.saving.committer import Committer, SaveJob
from storage.saving.consensus import Consensus
from storage.saving.staging import StagingBuffer

_TOLD_S_MIN = 0.01  # a shorter wait holds nobody up


class Saver:
    """Saves for one group of ranks. `save` is a collective; all methods belong to the training's thread."""

    def __init__(self, group: AgreeingGroup, committer: Committer, report: Reporter) -> None:
        self._group = group
        self._committer = committer
        self._report = report
        self._consensus = Consensus(group, committer)
        self._buffer = StagingBuffer()

    def save(self, step: int, state: Mapping[str, Any], *, healthy: bool, compare_ranks: bool) -> None:
        """Return once the state is copied; the rest goes on in the background.

        Raises:
            Fenced, UsageError, StorageError: as `Checkpointer.save` says.
        """
        started_s = time.monotonic()
        step = agreed_step(self._group, step)
        self._committer.wait_stored()
        agreed = self._consensus.reach(step, state, healthy=healthy, compare_ranks=compare_ranks)
        if agreed is None:
            return
        payloads, staging_error = agreed.stage(self._buffer)
        self._report(
            CheckpointEvent.STAGED,
            step=step,
            seconds=round(time.monotonic() - started_s, 4),
            bytes=sum(payload.chunk.size_bytes for payload in payloads),
        )
        self._committer.submit(
            SaveJob(
                attempt=Attempt.of_step(step, agreed.attempt, self._group.world_size),
                rank=self._group.rank,
                payloads=payloads,
                contents=agreed.contents,
                started_s=started_s,
                staging_error=staging_error,
                healthy=agreed.healthy,
            )
        )

    def wait(self) -> bool:
        """Block until the last save has committed or failed; True if it committed, or there was none."""
        began_s = time.monotonic()
        committed = self._committer.wait()
        if (waited_s := time.monotonic() - began_s) >= _TOLD_S_MIN:
            self._report.tell_agent(CheckpointEvent.WAITED, seconds=round(waited_s, 3))
        return committed

    def forget(self) -> None:
        """Wait for the last save, and let its step be saved again: what it committed may turn out to be damaged."""
        self._committer.forget()

    def close(self, *, abandon: bool) -> None:
        """End after the last save; with `abandon` it waits for no other rank any more."""
        self._committer.close(abandon=abandon)
