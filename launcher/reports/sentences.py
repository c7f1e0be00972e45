"""Events in words, a sentence each: the one table of them, for reports, the demo and last words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from launcher.events import EventName, EventRecord
from launcher.rounds.failures import FailureClass, signal_of
from launcher.rounds.mesh import describe_mesh
from launcher.rounds.records import FailedWorker, Round, Verdict
from launcher.text import describe_end


def sentence(event: EventRecord) -> str:
    """What an event says; one of another kind than ours (a script's own, say) is told with its fields."""
    said = _SENTENCES.get(event["event"])
    if said is None:
        fields = _own_fields(event)
        return f"{event.get('node', '')}: {event['event']}{' ' if fields else ''}{fields}"
    return said.format_map(_Fields(event)) if isinstance(said, str) else said(event)


class _Fields(dict[str, object]):
    def __missing__(self, name: str) -> str:
        return "?"


def _own_fields(event: EventRecord) -> str:
    """An event's own fields in one line, the long ones left out."""
    common = ("ts", "run_id", "node", "generation", "event", "boot_s")
    return " ".join(f"{k}={v}" for k, v in event.items() if k not in common and not isinstance(v, dict | list))


def _node_ended(event: EventRecord) -> str:
    code = event.get("exit_code")
    return f"node {event.get('node')} ended: {event.get('reason')}" + ("" if code is None else f" (exit code {code})")


def _round_formed(event: EventRecord) -> str:
    nodes = ", ".join(str(participant.get("node_id")) for participant in event.get("participants") or ())
    mesh = f"; mesh {describe_mesh(event['mesh'])}" if event.get("mesh") else ""
    formed = f"generation {event.get('generation')} ({event.get('reason')})"
    return f"{formed}: {event.get('world_size')} ranks on {nodes}{mesh}"


def _worker_failed(event: EventRecord) -> str:
    message = f": {event['message']}" if event.get("message") else ""
    return f"rank {event.get('rank')} on {event.get('node')} {describe_end(event.get('exit_code'))}{message}"


def describe_root_cause(event: EventRecord) -> str:
    """A `root_cause` event, without saying that it is one."""
    spot = _spot(str(event.get("place") or ""))
    place = f" at {spot}" if spot else ""
    failed = _worker_failed({**event, "node": event.get("node_failed")})
    return f"{failed}{place} ({event.get('failure_class')}, host {event.get('host')})"


def _spot(place: str) -> str:
    """The line of the program in what `failures.place_of` says; "" where that only repeats how the process ended."""
    return place.partition(" at ")[2] or (place if ":" in place else "")


def _drain_started(event: EventRecord) -> str:
    return f"node {event.get('node')} drains: {event.get('detail') or event.get('source')}"


def _live_state_captured(event: EventRecord) -> str:
    steps = sorted({int(step) for step in (event.get("steps") or {}).values()})
    kept = f"the state after step {' and '.join(map(str, steps))} is kept" if steps else "no state is kept"
    missed = "".join(f"; rank {rank}: {why}" for rank, why in sorted((event.get("missed") or {}).items()))
    missed += f"; {reason}" if (reason := event.get("reason")) else ""
    return f"the workers of {event.get('node')} cannot go on: {kept}{missed}"


def _hang_detected(event: EventRecord) -> str:
    return f"hang on {event.get('node')}: {event.get('message') or _own_fields(event)}"


_SENTENCES: Mapping[str, str | Callable[[EventRecord], str]] = {
    EventName.NODE_JOINED: "{node} joins with {slots} slots",
    EventName.NODE_LOST: "node {node_lost} {reason}",
    EventName.NODE_LEFT: "node {node_left} left",
    EventName.NODE_ENDED: _node_ended,
    EventName.NODE_FENCED: "node {node} fenced itself: {reason}",
    EventName.NODE_EXCLUDED: "node {node_excluded} is excluded for {seconds} s: {reason}",
    EventName.NODE_READMITTED: "node {node_readmitted} may take part again",
    EventName.EXCLUSION_WAIVED: "{nodes} may take part in spite of exclusion: {reason}",
    EventName.PEER_UNREACHABLE: "{node} cannot reach node {peer}",
    EventName.PEER_LOST: "node {peer} lost: {reason}",
    EventName.STORE_UNREACHABLE: "{node} has lost the store: {reason}",
    EventName.STORE_BACK: "{node} has the store again, after {seconds} s",
    EventName.STORE_HOST_LOST: "the store went with node {node_lost}, which hosted it: {reason}",
    EventName.WORKERS_STORE_UNREACHABLE: "{node} stays out for {seconds} s: {reason}",
    EventName.PREFLIGHT_FAILED: "{node} is not fit ({check}): {reason}; it looks again in {retry_s} s",
    EventName.PREFLIGHT_SLOW: "{node} stays out until its checks have ended, which take more than {seconds} s",
    EventName.PREFLIGHT_PASSED: "{node} is fit, after {seconds} s of checks",
    EventName.DRAIN_STARTED: _drain_started,
    EventName.DRAIN_CUT_SHORT: "the drain of {node} is cut short after step {step}: {reason}",
    EventName.DRAIN_OVERRAN: "{node} was ended before its drain was done, after {seconds} s: {detail}",
    EventName.PREEMPTION_HINT: "{node} hears from {watcher}: {detail}",
    EventName.PREEMPTION_WATCH_FAILED: "{node} has no answer from {watcher}: {reason}",
    EventName.SIDECAR_TROUBLE: "the checkpoint service of {node}: {reason}",
    EventName.CONSOLE_LOST: "what {node} writes to {stream} is dropped from here on: {reason}",
    EventName.ROUND_FORMED: _round_formed,
    EventName.ROUND_BROKEN: "generation {generation} cannot go on: {reason}",
    EventName.STOP_REQUESTED: "workers are asked to stop at a step boundary: {reason}",
    EventName.ROOT_CAUSE: lambda event: f"root cause: {describe_root_cause(event)}",
    EventName.FINISHED: "the job is over: {outcome}",
    EventName.WORKERS_STARTED: "{node} starts its workers of generation {generation}",
    EventName.WORKERS_YIELDED: "the workers of {node} stop after step {step}: {reason}",
    EventName.WORKERS_STOPPED: "the workers of {node} are stopped: {reason}",
    EventName.WORKERS_DONE: "the workers of {node} are done after step {step}",
    EventName.WORKERS_LINGER: "workers of {node} are still there after {seconds} s: {pids}",
    EventName.WORKER_FAILED: _worker_failed,
    EventName.LIVE_STATE_CAPTURED: _live_state_captured,
    EventName.YIELD_TIMED_OUT: "the workers of {node} reach no step boundary within {seconds} s: {reason}",
    EventName.HANG_DETECTED: _hang_detected,
    EventName.STACKS_DUMPED: "the stacks of {node}'s workers are in {path}: {reason}",
    EventName.CHILDREN_ENDED: "what workers of {node} had left running is ended: {processes}",
    EventName.DEVICE_MEMORY_HELD: "device memory of {node} is still held after {seconds} s: {reason}",
    EventName.WARM_START_LOST: "{node} has lost the process that forks its workers (exit code {exit_code})",
    EventName.WARM_START_OFF: "the workers of {node} start as new processes: {reason}",
    EventName.WARM_START_RENEWED: "{node} renews the process that forks its workers: {reason}",
    EventName.FIRST_STEP: "generation {generation} trains: step {step}",
    EventName.PROGRESS: "{node} has done step {step}",
    EventName.STEPS_RESTARTED: "{node}: goes back from step {reached} to step {step}",
    EventName.STRAGGLER: "rank {rank} on {node} is slow by its {by}: {own_s} s a step, the others {others_s} s",
    EventName.STRAGGLER_RECOVERED: "rank {rank} on {node} keeps up again",
    EventName.RESTORED: "rank {rank} on {node} has the state after step {step}",
    EventName.CHECKPOINT_STAGED: "rank {rank} on {node} has copied its state after step {step}",
    EventName.CHECKPOINT_COMMITTED: "the checkpoint of step {step} is committed",
    EventName.CHECKPOINT_FAILED: "the checkpoint of step {step} failed: {reason}",
    EventName.CHECKPOINT_NOT_NEWEST: "the checkpoint of step {step} is committed, and that of step {newest} is newer",
    EventName.CHECKPOINT_COPY_WAITED: "rank {rank} on {node} waited {seconds} s for the copy of its state",
    EventName.CHECKPOINT_WAITED: "rank {rank} on {node} waited {seconds} s for a commit",
    EventName.CHECKPOINT_STORE_AWAY: "rank {rank} on {node}: {url} has not answered for {seconds} s: {reason}",
    EventName.CHECKPOINT_STORE_BACK: "rank {rank} on {node}: {url} answers again, after {seconds} s",
}


# --- how a job ended

_HOW_IT_FAILED = {
    FailureClass.GAVE_UP: "the program gave up",
    FailureClass.USAGE: "the program refused what it was given",
    FailureClass.START_UP: "an error at start",
    FailureClass.PROGRAM: "a program error",
    FailureClass.DEVICE: "a device error",
    FailureClass.OUT_OF_MEMORY: "out of memory",
    FailureClass.SIGNAL: "killed by a signal",
    FailureClass.HANG: "a hang",
    FailureClass.PREEMPTION: "stopped with its node",
    FailureClass.LOST_PEER: "lost its connection",
}

_ADVICE = {
    Verdict.BUDGET_USED: "no further restart is allowed",
    Verdict.USAGE: "the program's own words say what is wrong",
    Verdict.FAILS_AGAIN: "running it again as it is will not help",
    Verdict.CRASH_LOOP: "running it again as it is will hardly help",
    Verdict.NODES_FAIL: "the nodes are to blame; on others it may work",
    Verdict.NO_QUORUM: "it may be launched again when there are nodes",
}


def last_words(ended: Round) -> str:
    """How a job failed: the outcome, the root cause with its traceback, its victims a line each, and what to do."""
    lines = [ended.outcome]
    if ended.causes:
        root, *victims = ended.causes
        lines.append(f"root cause: {_where(root)}: {_how(root)}")
        lines += [f"    {line}" for line in root.failure.traceback.rstrip().splitlines()]
        lines += [f"victim: {_where(v)}: {_how(v)}{_because(v, root)}" for v in victims]
    advice = f": {_ADVICE[ended.verdict]}" if ended.verdict in _ADVICE else ""
    lines.append(f"exit code {ended.verdict.exit_code}{advice}")
    return "\n".join(lines)


def _where(cause: FailedWorker) -> str:
    return f"rank {cause.failure.rank} on {cause.node_id} (host {cause.host})"


def _how(cause: FailedWorker) -> str:
    failure = cause.failure
    step = f" after step {failure.step}" if failure.step >= 0 else ""
    signum = signal_of(failure.exit_code)
    end = f"{signum.name}" if signum else f"exit code {failure.exit_code}"
    place = f", {failure.place}" if failure.traceback else ""
    return f"{_HOW_IT_FAILED[failure.kind]}{step} ({end}{place})"


def _because(victim: FailedWorker, root: FailedWorker) -> str:
    if victim.failure.kind is FailureClass.LOST_PEER:
        return f", because rank {root.failure.rank} failed"
    return f": {victim.failure.message}" if victim.failure.message else ""
