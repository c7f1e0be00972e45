"""Sorts the events of log folders by job. Pure.

A run id names a job, but not every user gives one, and folders are used again: two jobs may run at once under one.
Nodes of one job meet in rounds. What never met and ran at the same time are two jobs; what ran one after the other is
one that was launched again.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field

from launcher.events import EventName, EventRecord

_AT_WORK = {
    *(
        EventName.ROUND_FORMED,
        EventName.WORKERS_STARTED,
        EventName.FIRST_STEP,
        EventName.PROGRESS,
        EventName.CHECKPOINT_STAGED,
        EventName.WORKER_FAILED,
    ),
    *(EventName.WORKERS_YIELDED, EventName.WORKERS_STOPPED, EventName.FINISHED),
}


@dataclass
class _Life:
    """The time in which nodes that met were at work, and their generations."""

    roots: set[str]
    began_ts: float
    ended_ts: float = 0.0
    generations: set[object] = field(default_factory=set)

    def hear(self, event: EventRecord) -> None:
        self.ended_ts = max(self.ended_ts, float(event["ts"]))
        self.generations.add(event.get("generation"))

    def runs_beside(self, later: _Life) -> bool:
        """Whether `later` cannot be the same job: it began meanwhile, and its generations are not further ones."""
        return later.began_ts < self.ended_ts and bool(self.generations & later.generations)

    def go_on(self, later: _Life) -> None:
        self.roots |= later.roots
        self.ended_ts = max(self.ended_ts, later.ended_ts)
        self.generations |= later.generations


def jobs_of(events: Sequence[EventRecord]) -> list[tuple[str, list[EventRecord]]]:
    """Run id and events of each job, in the order in which the jobs began; `run (2)` is another job of the same id."""
    of_run: dict[str, list[EventRecord]] = collections.defaultdict(list)
    for event in sorted(events, key=lambda event: float(event["ts"])):
        of_run[str(event.get("run_id", ""))].append(event)
    found = []
    for run_id, told in of_run.items():
        try:
            parts = _apart(told)
        except (LookupError, TypeError, AttributeError):
            parts = [told]  # not as this version writes them: whoever tells of that job says so
        for number, part in enumerate(parts, start=1):
            found.append((run_id if number == 1 else f"{run_id} ({number})", part))
    return sorted(found, key=lambda job: float(job[1][0]["ts"]))


def _apart(events: list[EventRecord]) -> list[list[EventRecord]]:
    """Split one run id's events by job: nodes that met, and others that trained at the same time."""
    group: dict[str, str] = {}

    def root(node: str) -> str:
        while (above := group.setdefault(node, node)) != node:
            node = above
        return node

    for event in events:
        if event["event"] == EventName.ROUND_FORMED:
            together = [str(event.get("node", "")), *event.get("spares", ())]
            for other in [*together[1:], *(p["node_id"] for p in event.get("participants", ()))]:
                group[root(str(other))] = root(together[0])
    lives: dict[str, _Life] = {}
    for event in events:
        if event["event"] in _AT_WORK and (node := str(event.get("node", ""))) in group:
            lives.setdefault(root(node), _Life({root(node)}, float(event["ts"]))).hear(event)
    jobs: list[_Life] = []
    for life in sorted(lives.values(), key=lambda life: life.began_ts):
        if again := next((job for job in jobs if not job.runs_beside(life)), None):
            again.go_on(life)
        else:
            jobs.append(life)
    if len(jobs) < 2:
        return [events]
    parts: list[list[EventRecord]] = [[] for _ in jobs]
    for event in events:
        node = str(event.get("node", ""))
        mine = [i for i, job in enumerate(jobs) if node in group and root(node) in job.roots]
        parts[mine[0] if mine else 0].append(event)
    return parts
