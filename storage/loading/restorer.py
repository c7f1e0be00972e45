"""The way of a restore: the newest good checkpoint, the same on all ranks, and the judgement over damaged ones."""

from __future__ import annotations

import functools
import json
import logging
import socket
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from storage import inspection
from storage.errors import Corrupt, Disputed, NoCheckpoint, UnloadableValue, WrongModel
from storage.events import CheckpointEvent, Reporter
from storage.format import layout
from storage.format.dcp_view import metadata_of
from storage.format.index import Index
from storage.held.distrust import NUM_RESTORES_MAX, NUM_STEPS
from storage.held.nearest import NearestStore
from storage.loading.casts import Casts
from storage.loading.choosing import Adopted, Chooser, Settling, load_choice
from storage.loading.loadplan import SafeLoadPlanner, needed_bytes
from storage.loading.memory_tier import HeldIndex, MemoryAccess, MemoryTier
from storage.loading.phases import Phases
from storage.loading.reading import read_items
from storage.ranks.agreement import AgreeingGroup
from storage.run.owner import Claim
from storage.state.fingerprint import fingerprint
from storage.state.fit import finish, fit
from storage.state.misfit import NUM_SHOWN, misfit
from storage.state.wants import Fit, Ignored
from storage.stores.objects import ObjectStore
from storage.verified.source import Traffic

log = logging.getLogger(__name__)

_NUM_TRIES = 100
"""Of checkpoints that turn out to be no good: another job may save, and remove, faster than this one can read."""

_FIRST_STEP_S = 0.25
"""After a restore, until what stood still for it goes on: a whole job waits for the first step as well."""


@dataclass(frozen=True)
class _Read:
    """What a rank has read: bytes that its state needed, and what it fetched for them.

    `near`: where that came from, if nodes hold some of it in memory.
    """

    needed_bytes: int
    traffic: Traffic
    near: Mapping[str, Any]


@dataclass(frozen=True)
class _Damaged:
    """Some rank has read damage; `own` is what this rank has read, None where it is others only."""

    own: Corrupt | None


class Restorer:
    """Reads for one group of ranks. Every method without underscore is a collective.

    Without a `claim` nothing is written: a damaged checkpoint is passed over, and stays as it is. What was `adopted` is
    waited for, unless memory has a state that is as new.
    """

    def __init__(
        self,
        store: ObjectStore,
        claim: Claim | None,
        group: AgreeingGroup,
        report: Reporter,
        memory: MemoryAccess | None = None,
        adopted: Adopted | None = None,
    ) -> None:
        self._store = store
        self._memory = memory
        self._group = group
        self._report = report
        self._chooser = Chooser(store, claim, report, adopted)
        self._phases = Phases()

    def restore(
        self,
        state: MutableMapping[Any, Any],
        *,
        strict: bool,
        ignored: Ignored,
        unhealthy: bool = False,
        allow_casts: bool = False,
    ) -> int:
        """Fill `state` from the newest good checkpoint and return its step; 0, and `state` untouched, if there is none.

        Raises:
            WrongModel, UnloadableValue, UsageError, Corrupt, Disputed, Fenced, Transient, Denied: as
            `Checkpointer.restore` says.
        """
        self._phases = Phases()
        self._group.check_world()
        with self._report.retries(self._store, "restore"):
            if self._memory is not None and self._memory.is_there and self._group.is_coordinator:
                self._chooser.look_ahead()
            tier = self._memory.open(self._report) if self._memory is not None else None
            self._phases.ended("ask")
            read: _Read | None = None
            try:
                step, read = self._restore(
                    state, tier, strict=strict, ignored=ignored, unhealthy=unhealthy, allow_casts=allow_casts
                )
            finally:
                if tier is not None and self._memory is not None:
                    tier.close()
                    self._memory.way_free(self._report, _FIRST_STEP_S if read is not None else 0.0)
        if read is not None:
            self._report(
                CheckpointEvent.RESTORED,
                step=step,
                **self._phases.told(),
                bytes=read.needed_bytes,
                fetched_bytes=read.traffic.fetched_bytes,
                received_bytes=read.traffic.received_bytes,
                **read.near,
            )
        return step

    def _restore(
        self,
        state: MutableMapping[Any, Any],
        tier: MemoryTier | None,
        *,
        strict: bool,
        ignored: Ignored,
        unhealthy: bool,
        allow_casts: bool,
    ) -> tuple[int, _Read | None]:
        damaged: dict[int, str] = {}
        lost: set[str] = set()  # attempts in memory of which bytes turned out not to be had
        while True:
            chosen = self._choose(tier, damaged, lost, unhealthy=unhealthy)
            if chosen is None:
                return 0, None
            self._phases.ended("choose")
            index = chosen.index
            found = self._group.everywhere(
                functools.partial(fit, state, index, self._group.rank, ignored, strict=strict)
            )
            self._settle(found, index, strict=strict)
            self._phases.ended("fit")
            result = self._read(found.wants, chosen, tier, allow_casts=allow_casts)
            self._phases.ended("read")
            if isinstance(result, _Read):
                values = self._group.everywhere(functools.partial(finish, found, state, found.wants))
                self._group.everywhere(functools.partial(state.update, values))
                self._went_on(chosen, tier)
                self._phases.ended("load")
                return index.step, result
            if not chosen.is_stored:
                lost.add(index.save_id)
                continue
            damaged[index.step] = self._judge(index.step, result.own)
            if len(damaged) >= _NUM_TRIES:
                raise Corrupt(f"{len(damaged)} checkpoints in {self._store.url} are no good: {damaged[index.step]}")

    def _choose(
        self, tier: MemoryTier | None, damaged: Mapping[int, str], lost: Collection[str], *, unhealthy: bool
    ) -> HeldIndex | None:
        """See `Chooser.choose`. Services that stand still for this restore go on before it waits for them."""
        choose = functools.partial(self._chooser.choose, tier, damaged, lost, unhealthy=unhealthy)
        chosen = self._group.share(functools.partial(choose, way_free=tier is None), load_choice)
        if isinstance(chosen, Settling) and self._memory is not None:
            self._memory.way_free(self._report)
            chosen = self._group.share(choose, load_choice)
        assert not isinstance(chosen, Settling)
        return chosen

    def _went_on(self, chosen: HeldIndex, tier: MemoryTier | None) -> None:
        """Count for a state in memory that it was gone on from, or drop those that were too often in vain."""
        if self._memory is None or tier is None:
            return
        if not chosen.is_stored:
            self._memory.went_on(chosen.index.save_id, chosen.index.step, self._report)
        elif tier.worn_out:
            reason = f"the job has gone on from one of them {NUM_RESTORES_MAX} times, and staged nothing since"
            self._memory.distrust(reason, self._report)

    def _read(
        self, wants: dict[str, Any], chosen: HeldIndex, tier: MemoryTier | None, *, allow_casts: bool
    ) -> _Read | _Damaged:
        """Read into the tensors of `wants`, and put values there. All ranks have read, find damage, or raise alike."""
        index, near = chosen.index, None if tier is None else tier.nearest(self._store, chosen, self._report)
        if near is not None and self._memory is not None:
            self._memory.make_way(self._report)
        planner = SafeLoadPlanner(index)
        planner.set_up_planner(wants, metadata_of(index), self._group.is_coordinator)
        items = self._group.everywhere(lambda: planner.create_local_plan().items)
        own: Corrupt | None = None
        casts = Casts(allow_casts)

        def read() -> _Read:
            nonlocal own
            try:
                traffic = read_items(near or self._store, index, items, planner, self._group, casts=casts)
            except Corrupt as error:
                own = error
                raise
            except (UnloadableValue, WrongModel) as error:
                where = f"the checkpoint of step {index.step} in {self._store.url}"
                raise type(error)(f"{where}: {error}") from None
            return _Read(needed_bytes(items, index.entries), traffic, _told(near, chosen))

        try:
            result = self._group.everywhere(read)
        except Corrupt:
            return _Damaged(own)
        if told := casts.told():
            self._report(CheckpointEvent.CAST, step=index.step, **told)
        return result

    def _settle(self, found: Fit, index: Index, *, strict: bool) -> None:
        """Raise WrongModel on all ranks if the checkpoint does not fit the state of any. A collective.

        Ranks may ask for different things; surplus is what none of them asks for.
        """
        told = {"odd": found.odd, "vain": found.vain, "surplus": fingerprint(found.surplus)}
        reports = [json.loads(data) for data in self._group.all_gather(json.dumps(told).encode())]
        surplus = found.surplus
        if len({report["surplus"] for report in reports}) > 1:
            gathered = self._group.gather(json.dumps(surplus).encode())

            def common() -> list[str]:
                lists = [json.loads(data) for data in gathered or []]
                others = [set(names) for names in lists[1:]]
                return [name for name in lists[0] if all(name in names for names in others)]

            surplus = self._group.on_coordinator(common)
        odd = list(dict.fromkeys(text for report in reports for text in report["odd"]))
        vain = list(dict.fromkeys(name for report in reports for name in report["vain"]))
        where = f"the checkpoint of step {index.step} in {self._store.url}"
        if odd or (strict and (vain or surplus)):
            raise WrongModel(misfit(where, odd, vain, surplus))
        if vain or surplus:
            shown = {"missing": vain[:NUM_SHOWN], "left_out": surplus[:NUM_SHOWN]}
            counts = {"num_missing": len(vain), "num_left_out": len(surplus)}
            log.warning("%s", misfit(f"not strict: {where}", [], vain, surplus))
            self._report(CheckpointEvent.RESTORED_IN_PART, step=index.step, **counts, **shown)
        world_size = self._group.world_size
        resized = {name: num for name, num in found.resized.items() if num != world_size}
        if resized and self._group.is_coordinator:
            names, nums = list(resized), sorted(set(resized.values()))
            log.warning(
                "%s was saved by %s ranks for each of them, and there are %d now: the others keep what they have",
                ", ".join(names[:NUM_SHOWN]),
                " and ".join(map(str, nums)),
                world_size,
            )
            self._report(
                CheckpointEvent.PER_RANK_RESIZED, step=index.step, names=names, saved=max(nums), now=world_size
            )

    def _judge(self, step: int, own: Corrupt | None) -> str:
        """Set the checkpoint aside if the coordinator finds damage where the ranks that complain do; what is damaged.

        A single rank may be wrong, by its memory or by its mount, and would take every checkpoint for damaged.

        Args:
            own: what this rank complains of, if it does.

        Raises:
            Disputed: what the ranks complain of is whole when it is read again.
        """
        complaint = own and {"text": str(own), "key": own.key, "host": socket.gethostname()}
        gathered = self._group.gather(json.dumps(complaint).encode())

        def judge() -> str:
            told = {rank: json.loads(data) for rank, data in enumerate(gathered or [])}
            complaints = {rank: complaint for rank, complaint in told.items() if complaint is not None}
            keys = {complaint["key"] for complaint in complaints.values()}
            reason: str = next(iter(complaints.values()))["text"]
            try:
                verdict = inspection.verify(self._store, layout.step_folder(step) + "/", None if None in keys else keys)
            except NoCheckpoint:
                return reason  # somebody else was faster
            if not verdict.problems:
                raise Disputed(_dispute(step, complaints))
            assert self._chooser.version is not None
            self._chooser.set_aside(step, self._chooser.version, reason)
            return reason

        reason: str = self._group.on_coordinator(judge)
        return reason


def _told(near: NearestStore | None, chosen: HeldIndex) -> Mapping[str, Any]:
    if near is None:
        return {}
    trusted = {} if chosen.is_stored else {"trusted_after": chosen.index.step + NUM_STEPS}
    return {"attempt": chosen.index.save_id, **trusted, **{f"from_{t}": num for t, num in near.num_bytes_by.items()}}


def _dispute(step: int, complaints: Mapping[int, Mapping[str, str]]) -> str:
    told = "; ".join(f"rank {rank} on {told['host']}: {told['text']}" for rank, told in complaints.items())
    return (
        f"the checkpoint of step {step} reads as damaged ({told}), but rank 0 has read the same data again and found it"
        " whole; nothing was set aside: either another program replaced data while it was read (see what else writes to"
        " this run), or the memory or the storage mount of the host named here is at fault"
    )
