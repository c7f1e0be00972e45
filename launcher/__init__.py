"""Launches PyTorch jobs on machines that come and go: who is in the job, on which mesh, and which processes run.

In a script     worker tells the agent how far this rank is and learns from it when to stop: heartbeat, should_stop
                (a Stop), untimed, alive, yielded, gave_up, event; its context, a WorkerContext, says who this rank is.
                Without an agent nothing happens, and every call has a sensible answer.
Meshes          plan and price make a MeshPlan for a world size from a MeshSpec; Infeasible is raised where none fits,
                and idle_to_fit says how many slots fewer it would have to be.
                memory_use says what a rank's memory holds on it, a MemoryUse, and step_time how long a step takes, a
                StepTime; node_loss says what losing one of its nodes costs, a NodeLoss; experts_per_rank,
                cuts_through and placement_obstacle, how experts lie on it; share_rows (a Sharing by a ShareRule, with
                copy_rows of a MeshSpec) and Itinerary, which ranks compute a hot expert's rows beside its owner.
Launching       launch_agent runs one node's agent, as `elastic-moe run` does: LaunchOptions beside torchrun's own, with
                HangRules, PreflightRules, further Checks, a Planner, and the names of preemption Watchers (entry point
                group `elastic_moe.preemption`: factory(argument) -> Watcher, whose poll returns a Notice);
                parse_signals reads torchrun's --signals-to-handle.
From outside    open_job is a JobClient: nodes, follow (JobStatus after JobStatus), drain (with a DrainOrder).
A store         EtcdHost keeps an installed etcd (find_binary) in its EtcdPlace beside the nodes, as `elastic-moe etcd`;
                parse_members, find_own and read_tls read what that is told, is_loopback tells whether it needs TLS.
Afterwards      EventName names the events of `events.jsonl`, each of whose lines is an EventRecord; launcher.reports
                makes from them the account of a job's time.
Environment     holds what agents set for their workers, and users for agents; whole_number reads what torchrun sets.
Text            hide_secrets makes a text fit for logs whose URLs have passwords.

Names are imported when they are first used, and torch only by those that need it.
"""

# Nothing but what every interpreter has loaded: a process that has yet to find out where modules are imports this first
# (`launcher.workers.paths`).
from launcher import errors
from launcher.errors import *  # noqa: F403 - the tree, by its own __all__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from launcher.drain.draining import DrainOrder
    from launcher.drain.notices import Notice
    from launcher.drain.preemption import Watcher
    from launcher.drain.signals import parse_signals
    from launcher.environment import Environment, whole_number
    from launcher.events import EventName, EventRecord
    from launcher.health.hangs import Auto, HangLimit, HangRules
    from launcher.health.preflight import Check, PreflightRules
    from launcher.job_client import JobClient, open_job
    from launcher.kv.connect import BACKENDS, OUTLIVING, looks_like_bucket, unknown_backend
    from launcher.kv.endpoint import is_loopback
    from launcher.kv.etcd.host import EtcdHost
    from launcher.kv.etcd.place import EtcdPlace, find_binary, find_own, read_tls
    from launcher.kv.etcd.seats import MAX_SEATS, parse_members
    from launcher.launch import LaunchOptions, launch_agent
    from launcher.reports.job_status import JobStatus, NodeStatus
    from launcher.rounds.formation import Planner
    from launcher.rounds.guests import Itinerary, ShareRule, Sharing, copy_rows, share_rows
    from launcher.rounds.memory import MemoryUse, memory_use
    from launcher.rounds.mesh import Infeasible, MeshPlan, Priced, idle_to_fit, plan, price
    from launcher.rounds.placement import cuts_through, experts_per_rank, placement_obstacle
    from launcher.rounds.records import Node
    from launcher.rounds.redundancy import NodeLoss, node_loss
    from launcher.rounds.spec import MeshSpec
    from launcher.rounds.speed import StepTime, step_time
    from launcher.script.worker import Stop, Worker, WorkerContext, worker
    from launcher.text import hide_secrets
    from launcher.workers.boot import command as tied_command
    from launcher.workers.console import Console
    from launcher.workers.imports_ahead import Imports
    from launcher.workers.paths import keep_to_own, leave_folder_that_is_gone, path_of_scripts
    from launcher.workers.warm import fork_zygote

__all__ = ["Stop", "Worker", "WorkerContext", "worker"]
__all__ += ["Infeasible", "MemoryUse", "MeshPlan", "MeshSpec", "NodeLoss", "Priced", "StepTime"]
__all__ += ["idle_to_fit", "memory_use", "node_loss", "plan", "price", "step_time"]
__all__ += ["Itinerary", "ShareRule", "Sharing", "copy_rows", "share_rows"]
__all__ += ["cuts_through", "experts_per_rank", "placement_obstacle"]
__all__ += ["Auto", "Check", "HangLimit", "HangRules", "LaunchOptions", "Notice", "Planner", "PreflightRules"]
__all__ += ["BACKENDS", "OUTLIVING", "Console", "Imports", "Watcher", "fork_zygote", "launch_agent"]
__all__ += ["looks_like_bucket", "parse_signals", "unknown_backend"]
__all__ += ["MAX_SEATS", "EtcdHost", "EtcdPlace", "find_binary", "find_own", "is_loopback", "parse_members", "read_tls"]
__all__ += ["keep_to_own", "leave_folder_that_is_gone", "path_of_scripts", "tied_command"]
__all__ += ["DrainOrder", "JobClient", "JobStatus", "Node", "NodeStatus", "open_job"]
__all__ += ["Environment", "EventName", "EventRecord", "hide_secrets", "whole_number"]
__all__ += errors.__all__

_ROOMS = {
    "launcher.drain.draining": "DrainOrder",
    "launcher.drain.notices": "Notice",
    "launcher.drain.preemption": "Watcher",
    "launcher.drain.signals": "parse_signals",
    "launcher.environment": "Environment whole_number",
    "launcher.events": "EventName EventRecord",
    "launcher.health.hangs": "Auto HangLimit HangRules",
    "launcher.health.preflight": "Check PreflightRules",
    "launcher.job_client": "JobClient open_job",
    "launcher.kv.connect": "BACKENDS OUTLIVING looks_like_bucket unknown_backend",
    "launcher.kv.endpoint": "is_loopback",
    "launcher.kv.etcd.host": "EtcdHost",
    "launcher.kv.etcd.place": "EtcdPlace find_binary find_own read_tls",
    "launcher.kv.etcd.seats": "MAX_SEATS parse_members",
    "launcher.launch": "LaunchOptions launch_agent",
    "launcher.reports.job_status": "JobStatus NodeStatus",
    "launcher.rounds.formation": "Planner",
    "launcher.rounds.guests": "Itinerary ShareRule Sharing copy_rows share_rows",
    "launcher.rounds.memory": "MemoryUse memory_use",
    "launcher.rounds.mesh": "Infeasible MeshPlan Priced idle_to_fit plan price",
    "launcher.rounds.placement": "cuts_through experts_per_rank placement_obstacle",
    "launcher.rounds.records": "Node",
    "launcher.rounds.redundancy": "NodeLoss node_loss",
    "launcher.rounds.spec": "MeshSpec",
    "launcher.rounds.speed": "StepTime step_time",
    "launcher.script.worker": "Stop Worker WorkerContext worker",
    "launcher.text": "hide_secrets",
    "launcher.workers.boot": "tied_command=command",
    "launcher.workers.console": "Console",
    "launcher.workers.paths": "keep_to_own leave_folder_that_is_gone path_of_scripts",
    "launcher.workers.warm": "fork_zygote",
    "launcher.workers.imports_ahead": "Imports",
}
_PLACES = {
    name: (room, original or name)
    for room, names in _ROOMS.items()
    for name, _, original in (text.partition("=") for text in names.split())
}
"""By public name: the room that has it, and what it is called there."""

__doc__ = f"{__doc__}\n{errors.__doc__}"


if not TYPE_CHECKING:  # a type checker would believe in any name

    def __getattr__(name: str) -> "Any":
        if name not in _PLACES:
            raise AttributeError(f"module 'launcher' has no attribute {name!r}")
        import importlib

        room, original = _PLACES[name]
        value = globals()[name] = getattr(importlib.import_module(room), original)
        return value


def __dir__() -> "list[str]":
    return sorted({*globals(), *__all__})
