"""What a node's agent works with: made, and closed, by whoever launches it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.drain.draining import DrainRequests
from launcher.elastic.rendezvous import MemberRendezvous
from launcher.elastic.sidecar import Sidecar
from launcher.elastic.vitals_collector import VitalsCollector
from launcher.events import EventLog
from launcher.health.watchdog import Watchdog
from launcher.node.supervision import GracePeriods
from launcher.workers.leftovers import Leftovers
from launcher.workers.warm import WarmStart


@dataclass(frozen=True)
class AgentParts:
    """The parts of one node's agent; `launcher.launch` says how each is configured."""

    rendezvous: MemberRendezvous
    events: EventLog
    command: Sequence[str]
    """The workers' program and its arguments."""
    runtime_dir: Path
    """Private to this node; workers and agent share what lies there."""
    graces: GracePeriods
    drain: DrainRequests
    signals: tuple[signal.Signals, ...]
    """Those that end this node's part of the job."""
    warm: WarmStart | None
    """Forks the workers; None: each is a new process."""
    leftovers: Leftovers
    watchdog: Watchdog
    vitals: VitalsCollector
    sidecar: Sidecar | None = None
    """Runs beside the workers, and outlives them."""
