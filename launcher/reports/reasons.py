"""What an event says of why workers stopped: cause, root, nodes. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from launcher.events import JOB_IS_OVER, EventName, EventRecord
from launcher.reports.causes import Cause
from launcher.reports.sentences import describe_root_cause, sentence

UNSPECIFIC = ("", "workers of another node were asked to stop", "drain of another node")
"""Reasons of nodes that do not know why others asked their workers to stop."""

_CAUSE_OF_CLASS = {"hang": Cause.HANG, "preemption": Cause.DRAIN}
"""The classes of failures that are something else than a failure of the workers."""


@dataclass(frozen=True)
class Why:
    """`silent_s`: for how long nothing had been heard before it was noticed."""

    cause: Cause
    root: str
    nodes: tuple[str, ...] = ()
    silent_s: float = 0.0


def why_of_event(event: EventRecord, participants: Collection[str]) -> Why | None:
    """What an event says of the end of a round's work; None if nothing."""
    name, node = event["event"], str(event.get("node", ""))
    reason = str(event.get("reason", ""))
    match name:
        case EventName.NODE_LOST if event.get("node_lost") in participants:
            lost = str(event["node_lost"])
            return Why(Cause.NODE_LOSS, sentence(event), (lost,), float(event.get("silent_s", 0.0)))
        case EventName.PEER_LOST if event.get("peer") in participants:
            return Why(Cause.NODE_LOSS, sentence(event), (str(event["peer"]),))
        case EventName.NODE_LEFT if event.get("node_left") in participants:
            return Why(Cause.DRAIN, sentence(event), (str(event["node_left"]),))
        case EventName.NODE_FENCED if node in participants:
            return Why(Cause.NODE_LOSS, sentence(event), (node,))
        case EventName.NODE_ENDED if node in participants and reason != JOB_IS_OVER:  # that, the leader tells
            return Why(Cause.OTHER, sentence(event), (node,))
        case EventName.ROUND_BROKEN | EventName.WORKERS_STOPPED:
            return why_of(reason)
        case EventName.WORKERS_YIELDED:
            return why_of(reason)
        case EventName.HANG_DETECTED:
            return Why(Cause.HANG, sentence(event), (node,), float(event.get("seconds", 0)))
        case EventName.WORKER_FAILED:
            return Why(Cause.FAILURE, sentence(event), (node,))
        case EventName.ROOT_CAUSE:
            cause = _CAUSE_OF_CLASS.get(str(event.get("failure_class")), Cause.FAILURE)
            return Why(cause, describe_root_cause(event), (str(event.get("node_failed", "")),))
    return None


def why_of(reason: str) -> Why:
    """What a round's stop, or a node's reason to stop its workers, says of the cause."""
    for start, cause in (("drain", Cause.DRAIN), ("join", Cause.JOIN)):
        if reason.startswith(f"{start}: "):
            return Why(cause, reason, tuple(re.findall(r"[^\s,;]*-[0-9a-f]{8}\b", reason)) or _names(reason))
    if reason in UNSPECIFIC:
        return Why(Cause.OTHER, reason)
    if reason.startswith("drain"):
        return Why(Cause.DRAIN, reason)
    if reason.startswith("worker"):
        return Why(Cause.FAILURE, reason)
    if reason.startswith(("the store is silent", "this node's lease ended")):
        return Why(Cause.STORE, reason)
    if reason.startswith("hang: "):
        return Why(Cause.HANG, reason)
    if lost := re.findall(r"\bnode (\S+) (?:lost\b|cut off)", reason):
        return Why(Cause.NODE_LOSS, reason, tuple(lost))
    if reason.startswith("cut off from its peers: "):
        return Why(Cause.NODE_LOSS, reason, _names(reason))
    return Why(Cause.OTHER, reason)


def _names(reason: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[,;]?\s+", reason.partition(": ")[2])))
