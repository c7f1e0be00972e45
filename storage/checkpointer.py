"""`Checkpointer`: the one class a training script needs."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import torch.distributed as dist

from storage import at_exit
from storage.errors import UsageError
from storage.events import Listener, Reporter
from storage.format import layout
from storage.live.session import LiveSession, live_session
from storage.loading.memory_tier import MemoryAccess
from storage.loading.restorer import Restorer
from storage.options import Access, CheckpointerOptions, divided, limits, translated
from storage.pace.rules import Tier
from storage.ranks.agreement import AgreeingGroup
from storage.run.job import JobIdentity
from storage.saving.committer import Committer, InProcess
from storage.saving.consensus import check_state
from storage.saving.ownership import Ownership
from storage.saving.pacer import Pacer
from storage.saving.saver import Saver
from storage.saving.uploads import SaveRules, Uploads
from storage.service.choice import backend_for, held_by, memory_of
from storage.service.handed import Saves
from storage.state.objects import opened_once
from storage.state.wants import Ignored
from storage.stores.registry import as_url, open_store


@dataclass(frozen=True)
class _Started:
    """What a Checkpointer has once its ranks have met. A reader has no `ownership` and no `saver`."""

    restorer: Restorer
    ownership: Ownership | None = None
    saver: Saver | None = None
    pacer: Pacer | None = None
    live: LiveSession | None = None


class Checkpointer:
    """Saves and restores a training state; safe against the death of any process at any moment.

    ::

        with Checkpointer("s3://bucket/run", keep=3) as ckpt:
            step = ckpt.restore(state)
            while step < steps:
                ...
                ckpt.save(step, state)

    With `every=` the script calls `save` after each step all the same, and most calls do nothing; see `SavingOptions`.

    `state` is a dict of what the training needs to go on: modules, optimizers, schedulers and whatever else has a
    `state_dict` and a `load_state_dict`, as they are; tensors, DTensors, nested dicts and lists, plain Python values;
    and what each rank has of its own in a `PerRank`. Parameters go by their names, without those of wrappers (DDP,
    `torch.compile`), and so does an optimizer's state. Every rank of `process_group` makes the
    same calls in the same order, from one thread; without torch.distributed the process is alone.

    A Checkpointer claims the run for its ranks when it starts: at `start`, at the beginning of a `with`, or with the
    first call. That has to be after torch.distributed is initialised.

    Args:
        url: the run's folder, see `storage.open_store`.
        keep: how many committed checkpoints to keep; at least 1. Unhealthy ones (see `save`) do not count for it.
        timeout_s: how long a save waits for the other ranks before it counts as failed.
        access: `Access.CLAIM`, `TAKE_OVER` or `READ`.
        job: who this is to be fenced by, and called in messages; default what the launcher tells its workers.
            Generations are compared within one lineage.
        process_group: the ranks that take part; default the whole world.
        on_event: called with each `CheckpointEvent` and its fields, from background threads as well. What happens to
            the run (commits, damage, owners) is told on the coordinator (rank 0), what happens to a rank on that rank.
            Under `elastic-moe run` all of these go to its events.jsonl too, with or without a listener.
        options: when to save, and how, see `storage.options`; and some as they were called before, see `FormerOptions`.

    A run that another job has claimed and not closed is watched for 30 to 60 s; the next generation of the same job, by
    its lineage or torchrun's `--rdzv-id`, takes it at once.

    Raises:
        UsageError: bad URL or argument.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep: int = 3,
        timeout_s: float = 1800.0,
        access: Access = Access.CLAIM,
        job: JobIdentity | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_event: Listener | None = None,
        **options: Unpack[CheckpointerOptions],
    ) -> None:
        self._keep, self._timeout_s = limits(keep, timeout_s)
        if on_event is not None and not callable(on_event):
            raise UsageError(f"on_event is {on_event!r}; it must be a function of an event and its fields")
        self._plan, former = divided(options)
        if former:
            access, job = translated(former, access, job)
        self._compares_ranks = former.get("compare_ranks", True)
        if layout.split_step_url(as_url(url))[1]:  # a run in there would begin anew, and lie within a checkpoint
            raise UsageError(f"{url} is one checkpoint; give the URL of its run, or read it with ShardReader")
        self._access = access
        self._origin = (job or JobIdentity()).resolve(os.environ)
        self._process_group = process_group
        self._report = Reporter(on_event)
        self._opened = contextlib.ExitStack()
        self._store = self._opened.enter_context(open_store(url))
        self._report.watch(self._store)
        self._started: _Started | None = None
        self._is_closed = False
        at_exit.register(self, Checkpointer._close)

    def start(self) -> Self:
        """Claim the run, unless it is only read; harmless where that is done. A collective.

        Where nodes hold a state in memory that is done behind the restore, or the first save, which raises this then.

        Raises:
            Fenced: a later generation of the same lineage has claimed the run.
            InUse: another job saves to the URL, and is alive.
            UsageError: the URL is not storage that all nodes share, or this Checkpointer is closed.
            Transient, Denied: by the store.
        """
        self._start()
        return self

    def _start(self) -> _Started:
        if self._is_closed:
            raise UsageError(f"the Checkpointer of {self._store.url} is closed; open another one")
        at_exit.check_own(self, f"the Checkpointer of {self._store.url}")
        if self._started is None:
            try:
                self._started = self._meet()
            except BaseException:
                self._close(abandon=True)
                raise
        return self._started

    def _meet(self) -> _Started:
        store, report, take_over = self._store, self._report, self._access is Access.TAKE_OVER
        group = AgreeingGroup(self._process_group)
        if self._access is Access.READ:
            return _Started(Restorer(store, None, group, report))
        find_held = functools.partial(held_by, store.url, self._origin, self._plan.service)
        memory = self._memory(group)
        mine, can_wait = self._origin.claimant(), memory.has_a_state(report)
        ownership = Ownership(store, group, mine, report, take_over=take_over, find_held=find_held, can_wait=can_wait)
        self._opened.enter_context(ownership)
        plan, timeout_s, stop = self._plan, self._timeout_s, threading.Event()
        rules = SaveRules(self._keep, timeout_s)
        direct = InProcess(Uploads(store, ownership, self._origin, report, rules, stop), stop)
        saves = Saves(store.url, group.rank, self._origin, rules)
        backend = backend_for(saves, direct, ownership, report, plan.service)
        committer = Committer(ownership, backend, prefix_spread=plan.prefix_spread)
        live = live_session(store.url, self._origin, group, report, plan.service)
        saver = Saver(group, committer, report, plan, timeout_s=timeout_s, guard=live.guard if live else None)
        if live is not None:
            live.on_connect.append(saver.have_guarded)
        pacer = Pacer(group, plan, report, lambda: ownership.claim.failures, give_up_s=2 * timeout_s)
        restorer = Restorer(store, ownership.claim, group, report, memory, ownership)
        return _Started(restorer, ownership, saver, pacer, live)

    def _memory(self, group: AgreeingGroup) -> MemoryAccess:
        """What nodes hold in memory of this job's states."""
        local = memory_of(self._store.url, self._origin, self._plan.service)
        if local is not None:
            self._opened.callback(local.close)
        compares = self._plan.check_replicas is not None
        return MemoryAccess(local, self._store.url, self._origin.lineage, group, compares=compares)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(abandon=error is not None)

    def due(self, step: int) -> bool:
        """Whether `save(step, ...)` would save, by `every` and `ram_every`; for whom it costs to put a state together.

        To be called as `save` is: on all ranks, for the same step. It may be a collective.

        Raises:
            UsageError: `step` is no step, or the run is read only.
        """
        return self._savers()[1].due(step) is not None

    def wants(self, step: int) -> bool:
        """Whether `save(step, state)` would look at the state: to save it, or to compare replicas. Call it as `due`."""
        saver, pacer = self._savers()
        return pacer.due(step) is not None or saver.compares(step)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        wait: bool | Literal["held"] = False,
        now: bool = False,
        healthy: bool = True,
        compare_ranks: bool = True,
    ) -> None:
        """Save `state` as the checkpoint of `step`, if it is time to.

        It is where there is no `every`, where `every` says so, and with `now` or `wait`. A call that saves nothing
        costs no collective, but for the few by which ranks agree on the time.

        Returns once the state is copied (see `Staging`); storing and committing go on in the background, and the state
        may change meanwhile. Where an earlier save has not stored its copy yet, `backlog` says what happens. With
        `wait` it returns only when the save has committed or failed; with `wait="held"` once it is in the nodes' memory
        (see the method `wait`). A failed save is an event and a warning, not an exception: the training goes on. A step
        that this Checkpointer has just committed is not saved again.

        `healthy=False`, on any rank, says that the state is not to go on from (a loss or a parameter that is not
        finite): it is kept to look into, restores pass it over, it makes no healthy checkpoint go, and makes way itself
        when its step is saved anew.

        With `compare_ranks` it is refused to save what ranks hold differently under one name. Looked at are values and
        tensors outside of modules, by their first MiB, and in the first save the first 4 KiB of the modules'
        parameters. Without it, the lowest rank's wins.

        Raises:
            Fenced: a newer owner has the run, as an earlier save or a look every 5 s has found; this process can never
                commit again.
            UsageError: the state cannot be saved, or `step` is no whole number from 0 to 2**63 - 1, or not the same
                number on every rank; raised on every rank. Or the run is read only.
            ReplicasDiffer: with `check_replicas`, where no majority says who is right; on every rank.
            StorageError: a `state_dict` failed on some rank; that rank's log has the traceback.
            InUse, Denied: from the first save after a restore from memory, as `start` says.
        """
        saver, pacer = self._savers()
        saver.go_on()
        live = self._start().live
        tier = Tier.STORE if wait or now else pacer.due(step)
        saver.check_replicas(step, state, saves=tier is not None)
        state = opened_once(state)  # which is noted and saved
        if live is not None and (tier is None or live.state.is_agreed):  # else they agree once it is saved
            live.state.note(step, state, healthy=healthy)
        if tier is None:
            return
        pacer.began(step, tier)
        begun = None
        try:
            compares, asks = compare_ranks and self._compares_ranks, live is not None and live.state.asks
            begun = saver.save(step, state, tier, healthy=healthy, compare_ranks=compares, wait=wait, asks=asks)
        finally:
            pacer.returned(is_saving=begun is not None)
        if live is not None and begun is not None and begun.agree:
            live.state.saved(step, state, healthy=healthy)
        if wait:
            saver.wait(held=wait == "held")

    def note(self, step: int, state: Mapping[str, Any]) -> None:
        """Say that a step is complete, and that this is the state after it, as each `save` says.

        For a loop in which ranks meet between a step and its `save`: a peer may be lost there. If one is, and the
        others hold all of the state together, they go on from here, and nothing is done again. That is under an agent
        with its checkpoint service only; elsewhere this does nothing. Call it on all ranks; the first call is a
        collective, the others take references, and copies of what is small.

        Raises:
            UsageError: `step` is no step, or the run is read only.
        """
        self._savers()
        live = self._start().live
        if live is not None:
            live.state.note(layout.as_step(step), state)

    def finish_step(self, step: int, state: Mapping[str, Any], apply: Callable[[], object]) -> None:
        """Have `apply` do the last part of a step, the part in which no rank needs another, and note the step.

        That is the optimizer's step, and whatever else makes `state` the one after `step`; it must not communicate.
        Where the node's service keeps states for a lost peer (see `note`) all ranks meet before it, in one small
        all-reduce: no rank applies the step before each has all it needs to. If a peer is lost there, a thread beside
        applies it for a rank that waits, so that survivors are never a step apart. Elsewhere this is `apply()` alone.

        Raises:
            UsageError: as `note`.
            Exception: what `apply` raises.
        """
        self._savers()
        live, step = self._start().live, layout.as_step(step)
        if live is not None:
            live.state.finish(step, state, apply)
        else:
            apply()

    def _savers(self) -> tuple[Saver, Pacer]:
        started = self._start()
        if started.saver is None or started.pacer is None:
            raise UsageError(f"{self._store.url} was opened with Access.READ, so nothing can be saved to it")
        return started.saver, started.pacer

    def wait(self, *, held: bool = False) -> bool:
        """Block until the last save has committed or failed; True if it committed, or there was none.

        With `held` it is enough that this rank's part is in the memory of its node's checkpoint service: the save goes
        on there, and the next workers on these nodes go on from it at once, with the nodes that come. Without such a
        service it makes no difference.
        """
        at_exit.check_own(self, f"the Checkpointer of {self._store.url}")
        saver = self._started.saver if self._started is not None else None
        return saver is None or saver.wait(held=held)

    def announce_end(self) -> None:
        """Tell that this job is about to end, before a last save that may take long; `close` tells it by itself.

        A job that wants the same URL then waits, up to 10 min, instead of being refused. No collective.
        """
        if self._started is not None and self._started.ownership is not None:
            self._started.ownership.announce_end()

    def close(self) -> None:
        """Wait for the last save, let the run go, and end all threads. Closing twice is harmless."""
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
        started = self._start()
        if started.live is not None:
            started.live.state.forget("a restore has begun")
        if started.saver is not None:
            started.saver.forget()
        check_state(state)
        patterns = [ignore] if isinstance(ignore, str) else ignore
        if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
            raise UsageError(f"ignore is {ignore!r}; it must be a name or pattern, or a list of them")
        step = started.restorer.restore(
            state, strict=strict, ignored=Ignored(patterns), unhealthy=unhealthy, allow_casts=allow_casts
        )
        if started.pacer is not None and step:
            started.pacer.resume(step)
        return step

    def _close(self, *, abandon: bool) -> None:
        self._is_closed = True
        if not at_exit.is_own(self):  # a fork's copy has no threads, and shares its connections with the one that works
            return
        with self._opened:  # lets the run go and closes the store, whatever becomes of the last save
            if self._started is not None and self._started.live is not None:
                self._started.live.close(rescue=abandon)
            if self._started is not None and self._started.saver is not None:
                self._started.saver.close(abandon=abandon)
