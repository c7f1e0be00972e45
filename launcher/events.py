"""`events.jsonl`: one JSON object a line, appended by agents and workers alike.

Every line holds `ts` (epoch seconds), `run_id`, `node`, `generation`, `event`, then the event's own fields, and last
`boot_s`: the seconds since its host was started, which go on as they were when somebody sets its clock. A line is one
`write` to a file opened with O_APPEND, so processes that share the file never mix their lines.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from launcher.text import hide_secrets

log = logging.getLogger(__name__)

JOB_IS_OVER = "the job is over"
"""The `reason` of NODE_ENDED where a node ends because its job has."""

_NUM_READINGS, _AT_ONCE_S = 3, 0.001

EventRecord = Mapping[str, Any]
"""One line of `events.jsonl`."""


class EventName(StrEnum):
    """The names of events; docs/launcher.md says who tells each of them, and with which fields."""

    # Nodes
    NODE_JOINED = "node_joined"
    NODE_LOST = "node_lost"
    NODE_LEFT = "node_left"
    NODE_ENDED = "node_ended"
    NODE_FENCED = "node_fenced"
    NODE_EXCLUDED = "node_excluded"
    NODE_READMITTED = "node_readmitted"
    EXCLUSION_WAIVED = "exclusion_waived"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_LOST = "peer_lost"
    STORE_UNREACHABLE = "store_unreachable"
    STORE_BACK = "store_back"
    STORE_HOST_LOST = "store_host_lost"
    WORKERS_STORE_UNREACHABLE = "workers_store_unreachable"
    PREFLIGHT_FAILED = "preflight_failed"
    PREFLIGHT_SLOW = "preflight_slow"
    PREFLIGHT_PASSED = "preflight_passed"
    DRAIN_STARTED = "drain_started"
    DRAIN_CUT_SHORT = "drain_cut_short"
    DRAIN_OVERRAN = "drain_overran"
    PREEMPTION_HINT = "preemption_hint"
    PREEMPTION_WATCH_FAILED = "preemption_watch_failed"
    CONSOLE_LOST = "console_lost"
    SIDECAR_TROUBLE = "sidecar_trouble"
    # Rounds
    ROUND_FORMED = "round_formed"
    ROUND_BROKEN = "round_broken"
    STOP_REQUESTED = "stop_requested"
    ROOT_CAUSE = "root_cause"
    FINISHED = "finished"
    # A node's workers, as their agent tells it
    WORKERS_STARTED = "workers_started"
    WORKERS_YIELDED = "workers_yielded"
    WORKERS_STOPPED = "workers_stopped"
    WORKERS_DONE = "workers_done"
    WORKERS_LINGER = "workers_linger"
    WORKER_FAILED = "worker_failed"
    LIVE_STATE_CAPTURED = "live_state_captured"
    YIELD_TIMED_OUT = "yield_timed_out"
    HANG_DETECTED = "hang_detected"
    STACKS_DUMPED = "stacks_dumped"
    CHILDREN_ENDED = "children_ended"
    DEVICE_MEMORY_HELD = "device_memory_held"
    WARM_START_LOST = "warm_start_lost"
    WARM_START_OFF = "warm_start_off"
    WARM_START_RENEWED = "warm_start_renewed"
    # A worker's own
    FIRST_STEP = "first_step"
    PROGRESS = "progress"
    STEPS_RESTARTED = "steps_restarted"
    STRAGGLER = "straggler"
    STRAGGLER_RECOVERED = "straggler_recovered"
    # Those of a Checkpointer that are counted here; it appends them to the same file (`storage.CheckpointEvent`)
    RESTORED = "restored"
    CHECKPOINT_STAGED = "checkpoint_staged"
    CHECKPOINT_COMMITTED = "checkpoint_committed"
    CHECKPOINT_FAILED = "checkpoint_failed"
    CHECKPOINT_NOT_NEWEST = "checkpoint_not_newest"
    CHECKPOINT_COPY_WAITED = "checkpoint_copy_waited"
    CHECKPOINT_WAITED = "checkpoint_waited"
    CHECKPOINT_STORE_AWAY = "checkpoint_store_away"
    CHECKPOINT_STORE_BACK = "checkpoint_store_back"


class Emit(Protocol):
    """The function by which parts of the launcher report: `emit(EventName.NODE_LOST, generation=3, **fields)`."""

    def __call__(self, event: EventName, /, **fields: Any) -> None:
        """Record `event`; the field `generation` is 0 where it is not given."""


def append_event(path: Path, *, run_id: str, node: str, generation: int, event: str, fields: Mapping[str, Any]) -> None:
    """Append one event; a full disk or a vanished folder costs the event, never the job."""
    ts, boot_s = _both_clocks()
    record = {
        "ts": round(ts, 6),
        "run_id": run_id,
        "node": node,
        "generation": generation,
        "event": event,
        **fields,
        "boot_s": round(boot_s, 6),
    }
    line = hide_secrets(json.dumps(record, default=str, separators=(",", ":"))) + "\n"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("event %s lost: cannot append to %s: %s", event, path, error)


def _both_clocks() -> tuple[float, float]:
    """The time, and the seconds since this host was started, of the same moment."""
    for _ in range(_NUM_READINGS):
        before_s, ts = time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
        boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if boot_s - before_s < _AT_ONCE_S:
            break
    return ts, boot_s


class EventLog:
    """Writes the events of one node to `path`, and each to the log in one line. Thread-safe."""

    def __init__(self, path: Path | None, *, run_id: str, node: str) -> None:
        self.path = path
        self._run_id = run_id
        self._node = node

    def __call__(self, event: EventName, /, *, generation: int = 0, **fields: Any) -> None:
        """Write `event`."""
        told = " ".join(f"{key}={value}" for key, value in fields.items() if not isinstance(value, dict | list))
        log.info("[%s] generation %d: %s %s", self._node, generation, event, told)
        if self.path is not None:
            append_event(
                self.path,
                run_id=self._run_id,
                node=self._node,
                generation=generation,
                event=event,
                fields=fields,
            )
