"""The events of the trainer and of the integrations, which they append to their agent's `events.jsonl`."""

from __future__ import annotations

from enum import StrEnum


class TrainerEvent(StrEnum):
    """What `event` says in a line; docs/launcher.md has the fields."""

    STOP_POSTPONED = "stop_postponed"
    STEP_SKIPPED = "step_skipped"
    LOSS_NOT_FINITE = "loss_not_finite"
    STATE_NOT_FINITE = "state_not_finite"
    DATA_CHANGED = "data_changed"
    JOB_CHANGED = "job_changed"
    COMPILE_FAILED = "compile_failed"
    TRACKER_FAILED = "tracker_failed"
    METRICS_FAILED = "metrics_failed"
