"""What a Checkpointer tells about itself: a line to the log, an event to its listener and to the agent's file.

Under an agent, which names its `events.jsonl` in the environment, events are in the same form as those of the launcher:
one JSON object a line, written by one append, with `ts`, `run_id`, `node`, `generation`, `event`, `rank`, and its own.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from storage.agent import AgentEnvironment
from storage.stores.health import StoreAway, StoreBack
from storage.stores.objects import ObjectStore
from storage.text import hide_secrets

log = logging.getLogger(__name__)


class CheckpointEvent(enum.StrEnum):
    """The name of an event, as listeners and `events.jsonl` have it; under each, its fields beside `rank`."""

    RESTORED = "restored"
    """`step`, `seconds`, in all and by `phases` (asking nodes what they hold, choosing a checkpoint, fitting it to the
    state, reading, loading), `bytes` of the state, `fetched_bytes` and `received_bytes` by this rank; where nodes hold
    some of it in memory also what of the fetched bytes came `from_own`, `from_peer`, `from_store`, and `attempt`;
    `trusted_after`: of a state that was in memory only, the step up to which it is blamed for what is not healthy."""
    RESTORED_IN_PART = "restored_in_part"
    """With `strict=False`: `step`, `num_missing`, `missing` and `num_left_out`, `left_out` (some of the names)."""
    PER_RANK_RESIZED = "per_rank_resized"
    """`step`, `names` of the `PerRank` parts, the number of ranks that `saved` them, and how many there are `now`;
    `gone`: of a state in the memory of nodes, the ranks whose own is lost with them."""
    CAST = "checkpoint_cast"
    """Tensors went into others of another dtype: `step` or `url`, and what became of how many."""
    PASSED_OVER = "checkpoint_passed_over"
    """`step` that is read instead of the newer ones `passed_over`, and the `reason`."""
    DAMAGED = "checkpoint_damaged"
    """To a reader, which sets nothing aside: `step`, `reason`."""
    QUARANTINED = "checkpoint_quarantined"
    """`step`, `reason`: it counts no more."""
    STAGED = "checkpoint_staged"
    """The training goes on: `step`, `seconds`, `bytes` copied by this rank; `overlapped`, where some still are."""
    COPY_WAITED = "checkpoint_copy_waited"
    """For the account of the job's time alone: `seconds` for which an optimizer's step waited for a copy, of `step`."""
    STATE_CHANGED = "checkpoint_state_changed"
    """While it was copied for `step`, before its optimizer's step: `name` of a tensor, `reason`. That save fails."""
    COMMITTED = "checkpoint_committed"
    """`step`, `seconds` since `save` was called, `bytes` of the whole checkpoint; `healthy`, where it is not."""
    FAILED = "checkpoint_failed"
    """`step`, `seconds`, `reason`: nothing of it can be seen."""
    UNKNOWN = "checkpoint_unknown"
    """`step`, `reason`: what had it was killed, and the store does not say whether it was committed before. It is asked
    again, and then `checkpoint_committed` or `checkpoint_failed` tells."""
    SKIPPED = "checkpoint_skipped"
    """`step` was due and is not saved, and the `reason`: earlier saves take all the memory for copies."""
    REPLACED = "checkpoint_replaced"
    """`step` was copied, and gives its place up to `by` before any of it was stored."""
    PACE = "checkpoint_pace"
    """With `every="auto"`: `step`, the `seconds` between saves at least, as a save costs the training `cost_s`, takes
    `save_s`, and the run has seen so many `failures`, which makes `mtbf_s` between two."""
    REPLICA_DIFFERS = "checkpoint_replica_differs"
    """After `step`, rank `on_rank` on `host` holds something else than the ranks `others` under `num` names, `name` the
    first; `healed`: it is given what most of them hold."""
    NOT_NEWEST = "checkpoint_not_newest"
    """`step` was committed, and there is a newer one, `newest`, that a restore would take."""
    CLEANUP_FAILED = "checkpoint_cleanup_failed"
    """After `step` was committed, or has failed, what nobody needs any more could not be removed: `reason`."""
    LIVE_STAGED = "checkpoint_live_staged"
    """The training cannot go on, and the state after its last complete `step` is in memory: `seconds`, `bytes`."""
    LIVE_MISSED = "checkpoint_live_missed"
    """The state after `step` was to be staged so, and could not: `reason`."""
    LIVE_OFF = "checkpoint_live_off"
    """From here on this rank's state cannot be staged when a peer is lost: `reason`."""
    WAITED = "checkpoint_waited"
    """For the account of the job's time alone: `seconds` for which the training waited for a commit."""
    RETRIED = "checkpoint_retried"
    """`during` ("save", "restore"), `retries` by cause, `waited_s`, and a save's `step`."""
    STORE_AWAY = "checkpoint_store_away"
    """`url`, `seconds` since a request has succeeded, `cause`, `reason`."""
    STORE_BACK = "checkpoint_store_back"
    """`url`, `seconds` for which it was away."""
    UNCONDITIONAL = "checkpoint_unconditional"
    """`url` of a store that does not honour conditional puts."""
    HELD = "checkpoint_held"
    """This rank's part of a save that is not stored (`ram_every`) is in memory: `step`, `seconds`, `bytes`."""
    COPIED = "checkpoint_copied"
    """A node holds a copy of another's part in memory: `step`, `of_rank`, `to` that node, `bytes`, `seconds`."""
    COPY_FAILED = "checkpoint_copy_failed"
    """The part of rank `of_rank` in `attempt` has no copy on node `to`: `reason`. The next save tries again."""
    PEER_REFUSED = "checkpoint_peer_refused"
    """Somebody at `address` has asked for states in memory, and was told nothing: `reason`."""
    SOURCE_FAILED = "checkpoint_source_failed"
    """In a restore of `step`, from memory of `node` (`tier` "own" or "peer"), which was left out from there on:
    `reason`."""
    HELD_IN_PART = "checkpoint_held_in_part"
    """A state of `step` in memory of nodes is newer than the store's, and passed over: `reason`."""
    MEMORY_AWAY = "checkpoint_memory_away"
    """This node's memory of states does not answer, or its service was started again and holds none until the workers
    start again; it is gone on without: `reason`."""
    MEMORY_SHED = "checkpoint_memory_shed"
    """Before the node's service was started again so many `bytes` of states in memory were let go of: copies for other
    nodes, or, where there were none, all: `reason`."""
    DISTRUSTED = "checkpoint_distrusted"
    """The states of `steps` in memory are not gone on from any more, and the store's are: `reason`."""
    STORE_UNASKED = "checkpoint_store_unasked"
    """`step` is restored from memory while the store, which may have a newer one, does not answer: `reason`."""
    CLAIMED_LATER = "checkpoint_claimed_later"
    """The job goes on from memory while the store at `url` is away, and claims it with its first commit: `reason`."""
    TAKEN_OVER = "checkpoint_taken_over"
    """`url`, `by` this job, `of` another, which had not let it go; the `reason` why that does not count."""
    ADOPTED = "checkpoint_adopted"
    """`url`, `steps` that workers which are gone had saved, and that the services of the nodes will commit."""
    FENCED = "checkpoint_fenced"
    """`url`, `by` the job that has the run now, `reason`: the next save raises."""
    DIRECT = "checkpoint_direct"
    """`url`, `reason` why this process, and not the node's checkpoint service, carries its saves out."""
    SERVICE_SILENT = "checkpoint_service_silent"
    """`url`, for how many `seconds` the node's checkpoint service has answered nothing: saves may wait for it."""
    SERVICE_BACK = "checkpoint_service_back"
    """`url`: after `checkpoint_direct`, saves go to the node's service again."""


_USUAL = {
    CheckpointEvent.RESTORED,
    CheckpointEvent.RESTORED_IN_PART,
    CheckpointEvent.PER_RANK_RESIZED,
    CheckpointEvent.STAGED,
    CheckpointEvent.COMMITTED,
    CheckpointEvent.LIVE_STAGED,
    CheckpointEvent.WAITED,
    CheckpointEvent.COPIED,
    CheckpointEvent.HELD,
    CheckpointEvent.PACE,
}
"""Those that the log has as information; all others are warnings."""

Listener = Callable[[CheckpointEvent, dict[str, Any]], None]
"""What `Checkpointer(..., on_event=...)` is given; it is called from any thread."""

_LOOKED_AT_BYTES = 1 << 16
_NUM_READINGS, _AT_ONCE_S = 3, 0.001
_hearing = threading.local()


def note_written(event: str) -> None:
    """A listener calls this, by way of `elastic_moe.worker.event`, that has itself written `event` to the agent's file.

    It may have added fields, and two lines would be two events.
    """
    if getattr(_hearing, "event", None) == event:
        _hearing.event = None


def note_doubtful(event: str) -> None:
    """A listener calls this whose process at the other end may have written `event`, and has gone without saying so."""
    if getattr(_hearing, "event", None) == event:
        _hearing.is_doubtful = True


class Reporter:
    """Passes events on. What fails on the way is logged: telling about a checkpoint must not harm it.

    Args:
        env: the variables that name the agent's files; default this process's.
    """

    def __init__(self, listener: Listener | None, env: Mapping[str, str] | None = None) -> None:
        self._listener = listener
        self._env = os.environ if env is None else env
        self._also: list[weakref.WeakMethod[Callable[[CheckpointEvent, Mapping[str, Any]], None]]] = []

    def also(self, call: Callable[[CheckpointEvent, Mapping[str, Any]], None]) -> None:
        """Let a method of this package hear each event as well, as long as its object lives."""
        self._also.append(weakref.WeakMethod(call))

    def __call__(self, event: CheckpointEvent, **fields: Any) -> None:
        """Report one event; may be called from any thread."""
        when, fields = _both_clocks(), {name: _discreet(value) for name, value in fields.items()}
        text = ", ".join(f"{name} {value}" for name, value in fields.items())
        log.log(logging.INFO if event in _USUAL else logging.WARNING, "%s: %s", event, text)
        for inner in self._also:
            if (hear := inner()) is not None:
                hear(event, fields)
        before, _hearing.event = getattr(_hearing, "event", None), event
        _hearing.is_doubtful = False
        try:
            if self._listener is not None:
                self._listener(event, fields)
        except Exception:
            log.exception("the listener of checkpoint events failed on %s", event)
        finally:
            is_written, _hearing.event = _hearing.event is None, before
        if not is_written and not (_hearing.is_doubtful and _is_appended(self._env, event, fields)):
            append_for_agent(self._env, when, event, fields)
        if event == CheckpointEvent.COMMITTED:
            note_for_agent(self._env, when[0], fields)

    def tell_agent(self, event: CheckpointEvent, **fields: Any) -> None:
        """Report what only the account of the job's time needs."""
        append_for_agent(self._env, _both_clocks(), event, fields)

    def watch(self, store: ObjectStore) -> None:
        """Report from now on when the store has been away for a while, and when it is back.

        What asks the store (a heartbeat's thread) must keep neither this nor, by it, the listener alive.
        """
        mine, url = weakref.ref(self), store.url

        def tell(what: StoreAway | StoreBack) -> None:
            if (report := mine()) is None:
                return
            if isinstance(what, StoreAway):
                away = {"seconds": what.seconds, "cause": what.cause.value, "reason": what.reason}
                report(CheckpointEvent.STORE_AWAY, url=url, **away)
            else:
                report(CheckpointEvent.STORE_BACK, url=url, seconds=what.seconds)

        store.retries.health.tell = tell

    @contextlib.contextmanager
    def retries(self, store: ObjectStore, during: Literal["save", "restore"], **fields: Any) -> Iterator[None]:
        """Report `checkpoint_retried` afterwards, if the store needed further tries meanwhile."""
        before = store.retries.snapshot()
        try:
            yield
        finally:
            new = store.retries.snapshot().since(before)
            if new.num_by_cause:
                waited_s = round(new.waited_s, 3)
                self(
                    CheckpointEvent.RETRIED, during=during, retries=dict(new.num_by_cause), waited_s=waited_s, **fields
                )


def _discreet(value: Any) -> Any:
    """A field of an event, without the secrets of URLs in it."""
    if isinstance(value, str):
        return hide_secrets(value)
    return [_discreet(part) for part in value] if isinstance(value, (list, tuple)) else value


def note_for_agent(env: Mapping[str, str], ts: float, fields: Mapping[str, Any]) -> None:
    """Say which checkpoint is the last in the file that the agent names for it, if there is one."""
    path = AgentEnvironment.from_env(env).checkpoint
    if not path:
        return
    temporary = f"{path}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps({"step": fields.get("step"), "ts": round(ts, 3)}).encode())
        finally:
            os.close(fd)
        os.replace(temporary, path)  # the agent never reads half of it
    except OSError as error:
        log.debug("the agent cannot be told of the checkpoint: %s", error)


def _is_appended(env: Mapping[str, str], event: CheckpointEvent, fields: Mapping[str, Any]) -> bool:
    """Whether one of the last lines of the agent's file says just that."""
    with contextlib.suppress(OSError), open(AgentEnvironment.from_env(env).events, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOOKED_AT_BYTES))
        said = json.loads(json.dumps({"event": event, **fields}, default=str))
        for line in file.read(_LOOKED_AT_BYTES).splitlines():
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and all(found.get(name) == value for name, value in said.items()):
                    return True
    return False


def _both_clocks() -> tuple[float, float]:
    """The time, and the seconds since this host was started, of the same moment: as `launcher.events` has both."""
    for _ in range(_NUM_READINGS):
        before_s, ts = time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
        boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        if boot_s - before_s < _AT_ONCE_S:
            break
    return ts, boot_s


def append_for_agent(
    env: Mapping[str, str], when: tuple[float, float], event: CheckpointEvent, fields: Mapping[str, Any]
) -> None:
    """Append one event to the file of the agent that runs this worker, if there is one; a full disk costs the event.

    `when`: its time, and the seconds since this host was started.
    """
    agent = AgentEnvironment.from_env(env)
    if not agent.events:
        return
    generation, rank = (int(text) if text.isdecimal() else 0 for text in (agent.generation, env.get("RANK", "")))
    record: dict[str, Any] = {"ts": round(when[0], 6), "run_id": agent.run_id, "node": agent.node}
    record |= {"generation": generation, "event": event, "rank": rank, **fields, "boot_s": round(when[1], 6)}
    line = hide_secrets(json.dumps(record, default=str, separators=(",", ":"))) + "\n"
    try:
        fd = os.open(agent.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)
    except OSError as error:
        log.warning("event %s lost: cannot append to %s: %s", event, agent.events, error)
