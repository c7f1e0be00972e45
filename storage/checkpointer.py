"""`Checkpointer`: the one class a training script needs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
import uuid
import weakref
from collections.abc import Collection, Mapping, MutableMapping
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from storage.agent import AgentEnvironment
from storage.errors import Fenced, UsageError
from storage.events import CheckpointEvent, Listener, Reporter
from storage.format import layout
from storage.loading.restorer import Restorer
from storage.parallel import before_pools_close
from storage.ranks.agreement import AgreeingGroup
from storage.ranks.steps import agreed_step
from storage.run import heartbeat, owner
from storage.run.heartbeat import Heartbeat
from storage.run.owner import Owner
from storage.saving.commit import Attempt, Origin
from storage.saving.consensus import Consensus, check_state
from storage.saving.saver import Job, Saver
from storage.saving.staging import StagingBuffer
from storage.state.wants import Ignored
from storage.stores.objects import Capability
from storage.stores.registry import as_url, open_store

log = logging.getLogger(__name__)

_WAIT_TOLD_S = 0.01  # a shorter one holds nobody up


class Checkpointer:
    """Saves and restores a training state; safe against the death of any process at any moment.

    ::

        with Checkpointer("s3://bucket/run", keep=3) as ckpt:
            step = ckpt.restore(state)
            while step < steps:
                ...
                ckpt.save(step, state)

    `state` is a dict of what the training needs to go on: modules, optimizers, schedulers and whatever else has a
    `state_dict` and a `load_state_dict`, as they are; tensors, DTensors, nested dicts and lists, plain Python values;
    and what each rank has of its own in a `PerRank`. Parameters go by their names, without those of wrappers (DDP,
    `torch.compile`), and so does an optimizer's state. Every rank of `process_group` makes the
    same calls in the same order, from one thread; without torch.distributed the process is alone.

    Opening claims the run for this process group: whoever claimed it before can no longer commit. Open it after
    torch.distributed is initialised.

    Args:
        url: the run's folder, see `storage.open_store`.
        keep: how many committed checkpoints to keep; at least 1. Unhealthy ones (see `save`) do not count for it.
        generation, lineage: who this is to be fenced by; default what an agent tells (`storage.agent`), else
            0 and "". Generations are compared within one lineage.
        mesh: recorded in the manifest; default what an agent tells.
        process_group: the ranks that take part; default the whole world.
        on_event: called with (name, fields) for checkpoint_staged, checkpoint_failed and restored on every rank, for
            checkpoint_committed, checkpoint_quarantined, checkpoint_passed_over, checkpoint_cleanup_failed and
            checkpoint_not_newest (steps beyond the saved one are there already, and a restore takes the newest) on the
            coordinator (rank 0);
            fields hold at least step, and seconds and bytes where they mean something. Besides, checkpoint_retried says
            on any rank what a save or a restore had to try again, and checkpoint_unconditional, once on the
            coordinator, that the store does not honour conditional puts, and checkpoint_taken_over, there as well, that
            the run was another job's, which had not let it go, and checkpoint_fenced, that another job has taken it
            meanwhile: the next save raises. checkpoint_cast tells on every rank of tensors that were restored into
            such of another dtype, checkpoint_store_away and checkpoint_store_back that the store has not answered for
            seconds, and does again. Called from background threads as well. Under `elastic-moe run` all of these go to
            its events.jsonl too, with or without a listener.
        timeout_s: how long a save waits for the other ranks before it counts as failed.
        run_id: the job's name, for the message to another job that wants the same URL; default what an agent tells, or
            TORCHELASTIC_RUN_ID.
        take_over: take the run from another job without asking whether it lives.
        read_only: only restore: claim nothing and write nothing, whoever owns the run and saves into it. A damaged
            checkpoint is passed over (an event, checkpoint_damaged) and stays where it is; `save` raises.
        compare_ranks: refuse to save what ranks hold differently under one name. Looked at are values and tensors
            outside of modules, by their first MiB, and in the first save the first 4 KiB of the modules' parameters.
            Without it, the lowest rank's wins.

    A run that another job has claimed and not closed is watched for 30 to 60 s; the next generation of the same job, by
    its lineage or torchrun's `--rdzv-id`, takes it at once.

    Raises:
        Fenced: a later generation of the same lineage has claimed the run.
        InUse: another job saves to the URL, and is alive.
        UsageError: bad URL or argument.
        Transient, Denied: by the store.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep: int = 3,
        generation: int | None = None,
        lineage: str | None = None,
        mesh: Mapping[str, Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_event: Listener | None = None,
        timeout_s: float = 1800.0,
        run_id: str | None = None,
        take_over: bool = False,
        read_only: bool = False,
        compare_ranks: bool = True,
    ) -> None:
        if keep < 1:
            raise UsageError(f"keep is {keep}; at least 1 checkpoint must be kept")
        if read_only and take_over:
            raise UsageError("take_over is for jobs that save; with read_only nothing is taken from another job")
        if read_only and layout.split_step_url(as_url(url))[1]:
            raise UsageError(f"{url} is one checkpoint; give the URL of its run, or read it with ShardReader")
        self._group = AgreeingGroup(process_group)
        self._report = Reporter(on_event)
        origin = _origin(os.environ, generation, lineage, mesh)
        self._heartbeat: Heartbeat | None = None
        self._read_only = read_only
        with contextlib.ExitStack() as opened:
            self._store = opened.enter_context(open_store(url))
            self._report.watch(self._store)
            mine = None if read_only else self._become_owner(_wanted_owner(os.environ, origin, run_id), take_over)
            opened.pop_all()
        self._restorer = Restorer(self._store, mine, self._group, self._report)
        self._saver = Saver(self._store, mine, origin, keep, self._report, timeout_s)
        self._buffer = StagingBuffer()
        self._consensus = Consensus(self._group, self._saver, self._fenced, compare_ranks)
        self._closed = False
        _open.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(abandon=error is not None)

    def save(self, step: int, state: Mapping[str, Any], wait: bool = False, *, healthy: bool = True) -> None:
        """Save `state` as the checkpoint of `step`.

        Returns once the state is copied; storing and committing go on in the background, and the state may change
        meanwhile. Waits first until the earlier save has stored its copy. With `wait` it returns only when the save
        has committed or failed. A failed save is an event and a warning, not an exception: the training goes on.
        A step that this Checkpointer has just committed is not saved again.

        `healthy=False`, on any rank, says that the state is not to go on from (a loss or a parameter that is not
        finite): it is kept to look into, restores pass it over, it makes no healthy checkpoint go, and makes way itself
        when its step is saved anew.

        Raises:
            Fenced: a newer owner has the run, as an earlier save or a look every 5 s has found; this process can never
                commit again.
            UsageError: the state cannot be saved, or `step` is no whole number from 0 to 2**63 - 1, or not the same
                number on every rank; raised on every rank. Or the run was opened with `read_only`.
            StorageError: a `state_dict` failed on some rank; that rank's log has the traceback.
        """
        if self._read_only:
            raise UsageError(f"{self._store.url} was opened with read_only, so nothing can be saved to it")
        started_s = time.monotonic()
        step = agreed_step(self._group, step)
        self._saver.wait_stored()
        agreed = self._consensus.reach(step, state, healthy)
        if agreed is not None:
            payloads, staging_error = agreed.stage(self._buffer)
            attempt = Attempt.of_step(step, agreed.attempt, self._group.world_size)
            staged_bytes = sum(payload.chunk.size_bytes for payload in payloads)
            seconds = round(time.monotonic() - started_s, 4)
            self._report(CheckpointEvent.STAGED, step=step, seconds=seconds, bytes=staged_bytes)
            self._saver.submit(
                Job(attempt, self._group.rank, payloads, agreed.contents, started_s, staging_error, agreed.healthy)
            )
        if wait:
            self.wait()

    def wait(self) -> bool:
        """Block until the last save has committed or failed; True if it committed, or there was none."""
        began_s = time.monotonic()
        committed = self._saver.wait()
        if (waited_s := time.monotonic() - began_s) >= _WAIT_TOLD_S:
            self._report.tell_agent(CheckpointEvent.WAITED, seconds=round(waited_s, 3))
        return committed

    def announce_end(self) -> None:
        """Tell that this job is about to end, before a last save that may take long; `close` tells it by itself.

        A job that wants the same URL then waits, up to 10 min, instead of being refused. No collective.
        """
        if self._heartbeat is not None:
            self._heartbeat.announce_end()

    def close(self) -> None:
        """Wait for the last save and end the background thread. Closing twice is harmless."""
        self._close(abandon=False)

    def restore(
        self,
        state: MutableMapping[str, Any],
        *,
        strict: bool = True,
        ignore: str | Collection[str] = (),
        unhealthy: bool = False,
        allow_casts: bool = False,
    ) -> int:
        """Fill `state` from the newest good checkpoint and return its step.

        Returns 0, with `state` untouched, if there is none.

        Works for any world size and mesh, whatever the ones that saved. Objects and tensors are filled in place, an
        optimizer also if it has made no step yet; values are replaced. What the state has and the checkpoint does not,
        or the other way round, is an error: at the top of the state, in modules and optimizers by name of parameter, of
        tensors in dicts that hold some on both sides. Other dicts and lists become what was saved, however long.

        Args:
            strict: False lets the state keep what the checkpoint does not have, leaves what the state does not ask for,
                and says so in the event `restored_in_part`.
            ignore: names, or patterns as of a shell, of what to leave alone on either side: `"optimizer"`,
                `"model.head.*"`.

        A checkpoint that turns out to be damaged is
        quarantined once the coordinator has seen the damage as well, and the one before it is taken; all ranks take the
        same. One that was saved with `healthy=False` is passed over, which an event `checkpoint_passed_over` tells;
        `unhealthy=True` takes it as any other.

        A tensor may go into one of another dtype if that holds all its values, or if the two are float32 and bfloat16;
        an event `checkpoint_cast` tells which did. `allow_casts=True` allows all changes, as of float32 to float16, and
        the event then also tells of finite numbers that have become infinite.

        Raises:
            OnlyUnhealthy: there are checkpoints, but each was saved as unhealthy.
            WrongModel: the checkpoint has other names or shapes than the state, or dtypes that would lose (see
                `allow_casts`).
            UnloadableValue: it has a value that is not damaged, but cannot be loaded safely; nothing was set aside, and
                the content of `state` is undefined.
            UsageError: an object of the state refuses what was saved.
            Corrupt: there are checkpoints, but none is good; the content of `state` is undefined.
            Disputed: a rank read damage that is not there when it is looked for again; the message names the rank and
                its host. The content of `state` is undefined.
            Fenced: a damaged checkpoint would have to be set aside, but the run has another owner now.
            Transient, Denied: by the store.
        """
        started_s = time.monotonic()
        self._saver.forget()
        check_state(state)
        patterns = [ignore] if isinstance(ignore, str) else ignore
        if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UsageError(f"ignore is {ignore!r}; it must be a name or pattern, or a list of them")
        ignored = Ignored(patterns)
        with self._report.retries(self._store, "restore"):
            restored = self._restorer.restore(
                state, strict=strict, ignored=ignored, unhealthy=unhealthy, allow_casts=allow_casts
            )
        if restored is None:
            return 0
        self._group.everywhere(lambda: state.update(restored.values))
        self._report(
            CheckpointEvent.RESTORED,
            step=restored.step,
            seconds=round(time.monotonic() - started_s, 3),
            bytes=restored.needed_bytes,
            fetched_bytes=restored.traffic.fetched_bytes,
            received_bytes=restored.traffic.received_bytes,
        )
        return restored.step

    def _become_owner(self, wanted: Owner, take_over: bool) -> owner.Claim:
        """Claim the run for all ranks. Raises InUse, Fenced, UsageError."""
        try:
            claim = self._group.on_coordinator(lambda: self._claim(wanted, take_over).model_dump())
            mine = owner.Claim(self._store, Owner(**claim))
            self._group.everywhere(self._check_shared)
            self._group.on_coordinator(self._check_conditions)
        except BaseException:
            self._let_go()
            raise
        return mine

    def _claim(self, wanted: Owner, take_over: bool) -> Owner:
        """Claim the run for this process (coordinator). Raises InUse, Fenced."""
        find = heartbeat.find_other if take_over else heartbeat.await_free
        other = find(self._store, wanted)
        heartbeat.write(self._store, wanted.token, 0)  # before the claim: a claim without a beat is free to take
        try:
            mine, before = owner.claim(self._store, wanted)
        except Fenced:
            self._store.delete(layout.heartbeat_name(wanted.token))
            raise
        replaced_token = None if before is None else before.token
        self._heartbeat = heartbeat.Heartbeat(self._store, mine, replaced_token, self._report).start()
        # who forgets to close must not keep the run from others, and from itself; at exit it closes by itself
        weakref.finalize(self, self._heartbeat.stop).atexit = False
        if other is not None:
            self._report(
                CheckpointEvent.TAKEN_OVER, url=self._store.url, by=mine.who, of=other.owner.who, reason=other.reason
            )
        return mine

    def _let_go(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _fenced(self) -> str | None:
        """Why this process can never commit again, as its looks at the run's owner have found (coordinator)."""
        return None if self._heartbeat is None else self._heartbeat.fenced

    def _check_shared(self) -> None:
        """A folder of each node's own would let every save wait for receipts that can never be seen."""
        if owner.read_owner(self._store) is None:
            raise UsageError(
                f"rank {self._group.rank} does not see in {self._store.url} what rank 0 wrote there; the checkpoint URL"
                " must be storage that all nodes share"
            )

    def _check_conditions(self) -> None:
        """A degraded store is told at once: a race between two owners is found by reading back only."""
        if not self._store.can(Capability.CONDITIONAL_PUTS):
            self._report(CheckpointEvent.UNCONDITIONAL, url=self._store.url)

    def _close(self, *, abandon: bool) -> None:
        if not self._closed:
            self._closed = True
            if self._saver.is_busy:
                self.announce_end()
            self._saver.close(abandon=abandon)
            self._let_go()
            self._store.close()


_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


def _close_at_exit() -> None:
    """Close what a script has left open. One that an exception has ended waits for no other rank."""
    for checkpointer in list(_open):
        try:
            checkpointer._close(abandon=getattr(sys, "last_value", None) is not None)
        except Exception:
            log.exception("a checkpointer that was left open cannot be closed")


before_pools_close(_close_at_exit)


def _wanted_owner(env: Mapping[str, str], origin: Origin, run_id: str | None) -> Owner:
    """Who claims the run, with a fresh token; the epoch follows from the claim before."""
    rendezvous = env.get("TORCHELASTIC_RUN_ID", "")
    return Owner(
        lineage=origin.lineage,
        generation=origin.generation,
        epoch=0,
        token=uuid.uuid4().hex,
        run_id=AgentEnvironment.from_env(env).run_id or rendezvous if run_id is None else run_id,
        host=socket.gethostname(),
        rendezvous=rendezvous,
    )


def _origin(
    env: Mapping[str, str], generation: int | None, lineage: str | None, mesh: Mapping[str, Any] | None
) -> Origin:
    """Who saves: the arguments, else the environment that the launcher gives its workers. Raises UsageError."""
    told = AgentEnvironment.from_env(env)
    number = told.generation or "0" if generation is None else str(generation)
    if not number.isdecimal():
        raise UsageError(f"the generation is {number!r}; it must be a whole number >= 0")
    if mesh is None and told.mesh:
        try:
            mesh = json.loads(told.mesh)
        except json.JSONDecodeError:
            raise UsageError(f"{AgentEnvironment.variable('mesh')} is not JSON: {told.mesh!r}") from None
    if mesh is not None and not isinstance(mesh, Mapping):
        raise UsageError(f"the mesh is {mesh!r}; it must be an object with the mesh's fields")
    return Origin(
        generation=int(number),
        lineage=told.lineage if lineage is None else lineage,
        mesh=None if mesh is None else dict(mesh),
    )
