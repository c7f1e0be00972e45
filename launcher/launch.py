"""From a launch configuration to a finished job: opens the store, joins, runs the agent, leaves.

torch's own `launch_agent` hard-codes its agent, does not tell the others when a signal ends it, and closes the
rendezvous for all on an error of one; hence this one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.launcher.api import LaunchConfig

from launcher.coordination.member import Member
from launcher.coordination.run_id_reuse import is_running
from launcher.coordination.vitals_publisher import VitalsPublisher
from launcher.drain.deadline import DrainDeadline
from launcher.drain.draining import DrainRequest, DrainRequests
from launcher.drain.notices import Notice
from launcher.drain.preemption import NoticeWatch, OrderWatcher
from launcher.drain.preemption import watchers as find_watchers
from launcher.drain.signals import HANDLED, handle_signals, stop_at_once
from launcher.elastic import error_file
from launcher.elastic.agent import ElasticAgent
from launcher.elastic.joining import Arrival, Meeting, arrive, join, plan_no_mesh
from launcher.elastic.logs import name_node
from launcher.elastic.parts import AgentParts
from launcher.elastic.rdzv_conf import RendezvousConf
from launcher.elastic.rendezvous import MemberRendezvous
from launcher.elastic.sidecar import Sidecar
from launcher.elastic.vitals_collector import VitalsCollector
from launcher.environment import Environment
from launcher.errors import Drained, JobClosed, KVUnavailable
from launcher.events import JOB_IS_OVER, EventLog, EventName
from launcher.health.hangs import HangRules
from launcher.health.preflight import Check, Preflight, PreflightRules, end_commands, standard_checks
from launcher.health.watchdog import Watchdog
from launcher.kv import Prefixed
from launcher.node.board import NODES, run_prefix
from launcher.node.supervision import GracePeriods
from launcher.reports.sentences import last_words
from launcher.rounds.formation import Planner
from launcher.torch_private import ask_no_dns
from launcher.workers.console import Console
from launcher.workers.leftovers import Leftovers
from launcher.workers.runtime import runtime_dir as private_folder
from launcher.workers.warm import ForkedZygote, WarmStart

log = logging.getLogger(__name__)

_ZYGOTE_TIMEOUT_S = 60.0
_LINGER_PERIOD_S = 0.1
_CAPTURE_S = 10.0  # some 20 GB a rank over PCIe, or from a busy memory
_SIGNALS = (
    "TORCHELASTIC_SIGNALS_TO_HANDLE"  # by which torch knows them, which installs handlers of its own for a moment
)
_LOG_LINE_PREFIX = "[${role_name}${rank}]:"  # torchrun's has the local rank: the same on one node, ambiguous on several


@dataclass(frozen=True)
class LaunchOptions:
    """Options of a node that torchrun's `LaunchConfig` has no field for."""

    node_name: str = ""
    """Human part of the node's id; the host's name by default."""
    planner: Planner | None = None
    """Plans the mesh of each round. Without one every slot gets a worker and workers get no mesh."""
    events_path: Path | None = None
    """Where events.jsonl goes; None writes none."""
    signals: tuple[signal.Signals, ...] = HANDLED
    """Those that end this node's part: SIGINT and SIGQUIT at once, the others by a drain."""
    max_restarts: int | None = None
    """At most so many restarts after failures; None: as many as the policy allows."""
    warm_workers: bool = True
    """Fork workers from a process that has imported torch, where that is safe."""
    keep_children: bool = False
    """Let processes that workers have started outlive them."""
    zygote: ForkedZygote | None = None
    """That process, if this one has forked it already."""
    preemption_notices: tuple[str, ...] = ()
    """Watchers for the news that this machine goes, as `launcher.drain.preemption` names them."""
    drain_grace_s: float = 30.0
    """From a request that this node leave until nothing of it is left, where the request names no time of its own."""
    console: Console | None = None
    """By which output reaches its reader; None: directly."""
    log_dir: Path | None = None
    """Where the stacks of hung workers go; None: where temporary files go."""
    hangs: HangRules = HangRules()  # noqa: RUF009 (frozen)
    """When workers count as hung."""
    preflight: PreflightRules = PreflightRules()  # noqa: RUF009 (frozen)
    """What must be well on this node before each round."""
    checks: tuple[Check, ...] = ()
    """Further checks, run with those of `preflight`."""
    sidecar: Sidecar | None = None
    """What runs beside the workers, and outlives them."""
    sidecar_grace_s: float = 60.0
    """How long it may take to finish what the workers have left to it, when the node ends."""


def launch_agent(config: LaunchConfig, command: Sequence[str], extras: LaunchOptions) -> int:
    """Run this node's part of the job to its end.

    Returns:
        The exit code: 0 the job is done; that of the job's `Verdict` if it failed, the same on every node; 75 if this
        node left the job because it was asked to, 128 + signal if by a signal.

    Raises:
        UsageError: the user's mistake; nothing was started.
        RendezvousTimeout: no round was formed in time.
    """
    ask_no_dns()
    os.environ[_SIGNALS] = ",".join(one.name for one in extras.signals)
    handle_signals(stop_at_once, extras.signals)  # the agent will have its own
    try:
        return _launch_agent(config, command, extras)
    except SignalException as stopped:
        log.warning("left the job: %s", stopped)
        error_file.tell_raised(stopped, 128 + stopped.sigval)
        return 128 + stopped.sigval
    except Drained as drained:
        log.warning("left the job: %s", drained)
        error_file.tell_raised(drained, drained.exit_code)
        return drained.exit_code
    except Exception as error:
        error_file.tell_raised(error, getattr(error, "exit_code", 1))
        raise


def _launch_agent(config: LaunchConfig, command: Sequence[str], extras: LaunchOptions) -> int:
    conf = RendezvousConf.parse(config.rdzv_configs)
    watchers = find_watchers(extras.preemption_notices)
    meeting = Meeting(config.rdzv_backend, config.rdzv_endpoint, config.run_id, conf, config.local_addr)
    with contextlib.ExitStack() as stack:
        arrival = stack.enter_context(arrive(meeting, slots=config.nproc_per_node, name=extras.node_name))
        events = EventLog(extras.events_path, run_id=config.run_id, node=arrival.node.node_id)
        stack.push(functools.partial(_tell_end, events))  # comes last, after the node has left
        if extras.console is not None:
            extras.console.tell(events)
        runtime_dir = stack.enter_context(private_folder())
        keep = _keeps_children(extras)
        warm = _warm_start(config, command, extras, runtime_dir, events)
        if warm is not None:
            stack.enter_context(warm)
        preflight = _preflight(extras, events)
        unfit = preflight.first()
        graces = _graces(config, conf, extras)
        drain = DrainRequests(grace_s=extras.drain_grace_s, stop_s=graces.stop_s)
        deadline = DrainDeadline(drain, functools.partial(_tell_overrun, events), _end_at_once)
        deadline.start()  # and closed where this node may stay for others only: it watches over all that ends the rest
        if extras.sidecar is not None:
            stack.enter_context(_beside(extras.sidecar, runtime_dir, events, drain, extras.sidecar_grace_s))
        if arrival.connection.hosts_store:
            stack.callback(_linger, arrival)
            stack.callback(deadline.close)
        member = stack.enter_context(
            join(
                arrival,
                conf.rules(config.min_nodes, config.max_nodes, extras.max_restarts),
                extras.planner or plan_no_mesh,
                events,
                unfit=unfit,
                prepare=functools.partial(_get_ready, warm, extras.sidecar),
            )
        )
        publisher = stack.enter_context(
            VitalsPublisher(arrival.connection.kv, config.run_id, member.node_id, member.lease)
        )

        def heed(notice: Notice) -> None:
            drain.ask(notice.source, notice.detail, time.monotonic(), within_s=notice.within_s)
            member.drain(f"drains on {notice.detail}")

        watchers["elastic-moe drain"] = OrderWatcher(member.drain_order)
        stack.enter_context(NoticeWatch(watchers, heed, events))
        rendezvous = MemberRendezvous(
            member,
            backend=meeting.backend,
            run_id=meeting.run_id,
            address=arrival.node.address,
            timeout_s=conf.timeout,
            preflight=preflight,
        )
        parts = AgentParts(
            rendezvous=rendezvous,
            events=events,
            command=command,
            runtime_dir=runtime_dir,
            graces=graces,
            drain=drain,
            signals=extras.signals,
            warm=warm,
            leftovers=stack.enter_context(Leftovers(runtime_dir, warm, keep=keep)),
            watchdog=Watchdog(extras.hangs, extras.log_dir, events),
            vitals=VitalsCollector(publisher, runtime_dir),
            sidecar=extras.sidecar,
        )
        return _run(config, member, parts)


def _keeps_children(extras: LaunchOptions) -> bool:
    keep = extras.keep_children or Environment.from_env(os.environ).keep_children
    if keep:
        os.environ[Environment.variable("keep_children")] = "1"  # for the guardians of workers and zygote
    return keep


def _get_ready(warm: WarmStart | None, sidecar: Sidecar | None) -> None:
    """Have what takes a while done before the others stop for this node: imports, its workers' and the sidecar's."""
    if sidecar is not None:
        sidecar.expect()
    if warm is not None:
        warm.wait_ready(_ZYGOTE_TIMEOUT_S)
        if sidecar is not None:
            sidecar.expect()  # had it been too early


def _graces(config: LaunchConfig, conf: RendezvousConf, extras: LaunchOptions) -> GracePeriods:
    capture_s = _CAPTURE_S if extras.sidecar is not None else 0.0
    return GracePeriods(stop_s=float(config.shutdown_timeout or 0), yield_s=conf.yield_timeout, capture_s=capture_s)


@contextlib.contextmanager
def _beside(sidecar: Sidecar, folder: Path, events: EventLog, drain: DrainRequests, grace_s: float) -> Iterator[None]:
    """Run the sidecar within the block; what workers have left to it is finished after this node has left."""
    sidecar.start(folder, lambda reason: events(EventName.SIDECAR_TROUBLE, reason=reason))
    try:
        yield
    except SignalException:  # a second one: at once
        grace_s = 0.0
        raise
    finally:
        now_s = time.monotonic()
        sidecar.drain(max(0.0, drain.kill_by(now_s + grace_s) - now_s))
        sidecar.close()


def _warm_start(
    config: LaunchConfig, command: Sequence[str], extras: LaunchOptions, runtime_dir: Path, events: EventLog
) -> WarmStart | None:
    """Return what forks the workers. None where that cannot be: NUMA binding wraps a worker's program, which a fork has
    not, and only Python without options can be forked."""
    can_fork = tuple(command[:2]) == (sys.executable, "-u") and config.numa_options is None
    if extras.warm_workers and can_fork:
        return WarmStart(runtime_dir, events, extras.zygote)
    if extras.zygote is not None:
        extras.zygote.kill()
    return None


def _preflight(extras: LaunchOptions, events: EventLog) -> Preflight:
    folders = [Path(tempfile.gettempdir()), *([extras.log_dir] if extras.log_dir else [])]
    return Preflight((*standard_checks(extras.preflight, folders), *extras.checks), events)


def _run(config: LaunchConfig, member: Member, parts: AgentParts) -> int:
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=sys.executable,
        rdzv_handler=parts.rendezvous,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
        event_log_handler=config.event_log_handler,
        numa_options=config.numa_options,
        duplicate_stdout_filters=config.duplicate_stdout_filters,
        duplicate_stderr_filters=config.duplicate_stderr_filters,
        virtual_local_rank=config.virtual_local_rank,
    )
    assert config.logs_specs is not None
    agent = ElasticAgent(
        spec,
        name_node(config.logs_specs, member.node_id),
        member,
        parts,
        start_method=config.start_method,
        log_line_prefix_template=config.log_line_prefix_template or _LOG_LINE_PREFIX,
    )
    agent.install_signal_handlers()
    try:
        agent.run()
    except JobClosed:
        ended = member.round()
        assert ended is not None, "a closed job has a last round"
        log.error("[%s] the job %s", member.node_id, last_words(ended))
        root = ended.causes[0] if ended.causes else None
        local = root is not None and root.node_id == member.node_id
        error_file.tell_failed(ended, agent.error_file_of(root.failure.rank) if root and local else "")
        return ended.verdict.exit_code
    finally:
        agent.close()
    return 0


def _tell_end(
    events: EventLog, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Tell how this node ended: where it gave up, say because the store is gone, nobody else can."""
    if isinstance(error, SignalException):
        events(
            EventName.NODE_ENDED, exit_code=128 + error.sigval, reason=f"stopped by {signal.Signals(error.sigval).name}"
        )
    elif error is not None:
        reason = str(error).partition("\n")[0] or type(error).__name__
        events(EventName.NODE_ENDED, exit_code=getattr(error, "exit_code", 1), reason=reason)
    else:
        events(EventName.NODE_ENDED, reason=JOB_IS_OVER)


def _tell_overrun(events: EventLog, request: DrainRequest) -> None:
    """Tell that the agent is ended at once: its workers die with it, its lease ends by itself."""
    events(EventName.DRAIN_OVERRAN, source=request.source, detail=request.detail, seconds=request.grace_s)


def _end_at_once(exit_code: int) -> None:
    """End the process, and a preflight's commands in their own sessions: no `finally` runs any more to do it."""
    end_commands()
    os._exit(exit_code)


def _linger(arrival: Arrival) -> None:
    """Stay until the others have gone: they may train on, or still have to read in this node's store how the job ended.

    It is bounded by them: every node's record goes when it leaves, or with its lease.
    """
    kv, run_id, own_id = arrival.connection.kv, arrival.meeting.run_id, arrival.node.node_id
    nodes = Prefixed(kv, f"{run_prefix(run_id)}{NODES}")
    is_first = True
    try:
        while others := {entry.key for entry in nodes.list("").entries} - {own_id}:
            if is_first and is_running(kv, run_id):
                log.warning("this node hosts the store: staying for %s; a signal ends it", ", ".join(sorted(others)))
            is_first = False
            time.sleep(_LINGER_PERIOD_S)
    except KVUnavailable as error:
        log.warning("[%s] %s", own_id, error)
    except SignalException as stopped:
        log.warning("closing the store on %s: the nodes that use it will stop", signal.Signals(stopped.sigval).name)
