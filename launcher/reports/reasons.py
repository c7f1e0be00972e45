"""What an event says of why workers stopped: cause, root, nodes. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.events import JOB_IS_OVER, EventName, EventRecord
from launcher.reports.causes import Cause
from launcher.reports.sentences import describe_root_cause, sentence
from launcher.rounds.failures import FailureClass

UNSPECIFIC = ("", "workers of another node were asked to stop", "drain of another node")
"""Reasons of nodes that do not know why others asked their workers to stop."""

_CAUSE_OF_CLASS: Mapping[str, Cause] = {FailureClass.HANG: Cause.HANG, FailureClass.PREEMPTION: Cause.DRAIN}
"""The classes of failures that are something else than a failure of the workers."""


@dataclass(frozen=True)
class Reason:
    """Why workers stopped, as far as one event knows."""

    cause: Cause
    root: str
    """What began it, in one line."""
    nodes: tuple[str, ...] = ()
    """The nodes in which it began."""
    silent_s: float = 0.0
    """For how long nothing had been heard before that was noticed."""
    is_deeper: bool = False
    """Whether it says more of the same nodes than others of its cause do."""


def reason_in(event: EventRecord, participants: Collection[str]) -> Reason | None:
    """What an event says of why a round's work ended; None if nothing."""
    name, node = event["event"], str(event.get("node", ""))
    reason = str(event.get("reason", ""))
    match name:
        case EventName.NODE_LOST if event.get("node_lost") in participants:
            lost = str(event["node_lost"])
            return Reason(Cause.NODE_LOSS, sentence(event), (lost,), float(event.get("silent_s", 0.0)))
        case EventName.STORE_HOST_LOST:
            return Reason(Cause.NODE_LOSS, sentence(event), (str(event.get("node_lost", "")),), is_deeper=True)
        case EventName.PEER_LOST if event.get("peer") in participants:
            return Reason(Cause.NODE_LOSS, sentence(event), (str(event["peer"]),))
        case EventName.NODE_LEFT if event.get("node_left") in participants:
            return Reason(Cause.DRAIN, sentence(event), (str(event["node_left"]),))
        case EventName.NODE_FENCED if node in participants:
            return Reason(Cause.NODE_LOSS, sentence(event), (node,))
        case EventName.NODE_ENDED if node in participants and reason != JOB_IS_OVER:  # that, the leader tells
            return Reason(Cause.OTHER, sentence(event), (node,))
        case EventName.ROUND_BROKEN | EventName.WORKERS_STOPPED:
            return reason_from(reason)
        case EventName.WORKERS_YIELDED:
            return reason_from(reason)
        case EventName.HANG_DETECTED:
            return Reason(Cause.HANG, sentence(event), (node,), float(event.get("seconds", 0)))
        case EventName.WORKER_FAILED:
            return Reason(Cause.FAILURE, sentence(event), (node,))
        case EventName.ROOT_CAUSE:
            cause = _CAUSE_OF_CLASS.get(str(event.get("failure_class")), Cause.FAILURE)
            return Reason(cause, describe_root_cause(event), (str(event.get("node_failed", "")),))
    return None


def reason_from(reason: str) -> Reason:
    """Read a cause out of the text for which a round stops, or a node stops its workers."""
    for start, cause in (("drain", Cause.DRAIN), ("join", Cause.JOIN)):
        if reason.startswith(f"{start}: "):
            return Reason(cause, reason, tuple(re.findall(r"[^\s,;]*-[0-9a-f]{8}\b", reason)) or _names(reason))
    if reason in UNSPECIFIC:
        return Reason(Cause.OTHER, reason)
    if reason.startswith("drain"):
        return Reason(Cause.DRAIN, reason)
    if reason.startswith("worker"):
        return Reason(Cause.FAILURE, reason)
    if reason.startswith(("the store is silent", "this node's lease ended")):
        return Reason(Cause.STORE, reason)
    if reason.startswith("hang: "):
        return Reason(Cause.HANG, reason)
    if lost := re.findall(r"\bnode (\S+) (?:lost\b|cut off)", reason):
        return Reason(Cause.NODE_LOSS, reason, tuple(lost))
    if reason.startswith("cut off from its peers: "):
        return Reason(Cause.NODE_LOSS, reason, _names(reason))
    return Reason(Cause.OTHER, reason)


def _names(reason: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[,;]?\s+", reason.partition(": ")[2])))
