"""What the ranks agree on before each save: that all of them can, that they hold the same, and who writes what."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from storage.arena.pending import StagingListener
from storage.arena.stager import Staged, Stager
from storage.errors import Corrupt, UsageError
from storage.format.framing import EncodedItem
from storage.priority import without_collections
from storage.ranks.agreement import AgreeingGroup, Failure
from storage.run.attempt import StateContents
from storage.saving.committer import Committer
from storage.saving.describe import Holdings, contents_of, describe
from storage.saving.proposal import Decision, Fate, Proposal, decide
from storage.saving.saveplan import assign, dump_picks, dump_share, load_picks, load_share
from storage.saving.writing import Payload
from storage.state.fingerprint import combined, differing
from storage.state.tree import tree_of

log = logging.getLogger(__name__)

_Described = tuple[Holdings, dict[int, EncodedItem]]


def check_state(state: object) -> None:
    """Raise UsageError unless it is a dict."""
    if not isinstance(state, Mapping):
        kind = type(state).__qualname__
        raise UsageError(f"the state is a {kind}; it must be a dict, such as {{'model': model}}")


@dataclass(frozen=True)
class _Plan:
    """Who writes what, valid while every rank's holdings keep their digest. `contents`: coordinator only.

    `number` counts the plans from 1, the same on all ranks.
    """

    number: int
    digest: str
    picks: tuple[int, ...]
    contents: StateContents | None


@dataclass(frozen=True)
class CopiedPart:
    """What this rank writes, copied, or why it could not be (`error`): the others have to be told that, too."""

    payloads: list[Payload]
    staged: Staged | None
    error: str | None = None

    @property
    def size_bytes(self) -> int:
        """Of all payloads."""
        return sum(payload.chunk.size_bytes for payload in self.payloads)

    @property
    def is_pending(self) -> bool:
        """Whether it is not copied yet."""
        return self.staged is not None and self.staged.is_pending

    def go_on(self, *, is_last: bool) -> None:
        """The save is about to return, see `Staged.go_on`."""
        if self.staged is not None:
            self.staged.go_on(is_last=is_last)

    def cancel(self) -> None:
        """Nobody wants it."""
        if self.staged is not None:
            self.staged.cancel()


@dataclass(frozen=True)
class RankPart:
    """What this rank writes of a state: the chunks at `picks`. `values`: those that are encoded already."""

    holdings: Holdings
    picks: tuple[int, ...]
    values: dict[int, EncodedItem]

    @without_collections()
    def copy(self, stager: Stager, listener: StagingListener) -> CopiedPart:
        """A copy of it; of the state's tensors none is whole before `go_on`, where they are copied behind the save."""
        try:
            return CopiedPart(*self.holdings.stage(self.picks, self.values, stager, listener))
        except Exception as error:  # noqa: BLE001 - told by the receipt
            return CopiedPart([], None, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Agreed:
    """One save: the attempt of all ranks, and what this rank writes. `contents`: coordinator only."""

    attempt: str
    healthy: bool
    contents: StateContents | None
    part: RankPart


@dataclass(frozen=True)
class Proposed:
    """What this rank has told the others of a save.

    `part`: what it writes, should all agree to save as they did before; None where they never did. `settle`: see
    `Consensus.propose`.
    """

    part: RankPart | None
    settle: Callable[[], tuple[Decision, Agreed | None]]


class Consensus:
    """What a group of ranks agrees on before each of its saves. Every method without underscore is a collective."""

    def __init__(self, group: AgreeingGroup, committer: Committer) -> None:
        self._group = group
        self._committer = committer
        self._plan: _Plan | None = None
        self._num_plans = 0
        self._before: Holdings | None = None

    def propose(self, mine: Proposal, state: Mapping[str, Any], *, compare_ranks: bool) -> Proposed:
        """Tell the other ranks of a save. They meet in `settle` of what is returned: it is to be called, and before any
        other collective. It returns what all ranks decide, and what is to be saved, if anything is; on all ranks the
        same, or raises the same error.

        Where the state has the shape that it had in the save before, and no rank has much to say, that is one
        collective. The state is looked at before it, on each rank, since the `state_dict` of some objects is a
        collective too. With `compare_ranks`, what ranks hold differently under one name is refused.

        Args:
            mine: what there is to say of this rank but for its state.

        Raises (`settle`):
            Fenced, UsageError, StorageError: as `Checkpointer.save` says.
        """
        described, part = self._describe(state, compare_ranks=compare_ranks), None
        if not isinstance(described, Failure) and self._plan is not None and self._has_plan_of(described[0]):
            part = RankPart(described[0], self._plan.picks, described[1])
        meet = self._group.begin_all_gather(self._proposal(mine, described).dump())
        return Proposed(part, functools.partial(self._settle, described, part, meet))

    def _settle(
        self, described: _Described | Failure, part: RankPart | None, meet: Callable[[], list[bytes]]
    ) -> tuple[Decision, Agreed | None]:
        decision = decide([Proposal.load(data) for data in meet()])
        if decision.skip or self._is_there(decision):
            return decision, None
        assert not isinstance(described, Failure), "every rank's failure is raised on all"
        assert decision.attempt is not None
        holdings, values = described
        if decision.compare:
            self._compare(holdings.sums)
        if decision.plan or self._plan is None or part is None:
            self._plan = self._replan(holdings)
            part = RankPart(holdings, self._plan.picks, values)
        return decision, Agreed(decision.attempt, decision.healthy, self._plan.contents, part)

    def _has_plan_of(self, holdings: Holdings) -> bool:
        return self._plan is not None and self._plan.digest == holdings.digest

    @without_collections()
    def _describe(self, state: Mapping[str, Any], *, compare_ranks: bool) -> _Described | Failure:
        """What this rank holds, and those of its values that it is likely to write, encoded; or why it cannot tell."""
        try:
            check_state(state)
            compares = compare_ranks and self._group.world_size > 1
            is_first = self._plan is None
            holdings = describe(
                state,
                self._group.rank,
                compares=compares,
                compares_parameters=compares and is_first,
                before=self._before,
            )
            self._before = holdings.without_state()
            picks = self._plan.picks if self._plan and self._has_plan_of(holdings) else range(len(holdings.chunks))
            return holdings, holdings.encode_values(picks)
        except ValueError as error:
            return Failure(UsageError.__name__, Failure.of(error).text)
        except Exception as error:
            if not isinstance(error, UsageError):
                log.exception("the state cannot be described")
            return Failure.of(error)

    def _proposal(self, mine: Proposal, described: _Described | Failure) -> Proposal:
        if isinstance(described, Failure):
            mine = replace(mine, failure=described)
        else:
            holdings, _ = described
            number = self._plan.number if self._plan is not None and self._has_plan_of(holdings) else 0
            mine = replace(mine, sums=combined(holdings.sums), plan=number)
        if not self._group.is_coordinator:
            return mine
        committer = self._committer
        fate = Fate.NONE if mine.step is None else committer.fate_of(mine.step)
        return replace(mine, attempt=committer.new_attempt(), fenced=committer.fenced, fate=fate)

    def _is_there(self, decision: Decision) -> bool:
        """Whether the step is committed already; a save of it that is under way is waited for."""
        step, healthy = decision.step, decision.healthy
        is_there = decision.attempt is None or (
            decision.awaits
            and bool(self._group.on_coordinator(lambda: self._committer.has_committed(step, healthy=healthy)))
        )
        if is_there:
            log.info("step %d is committed already; not saved again", step)
        return is_there

    def _compare(self, sums: Mapping[str, str]) -> None:
        """Raise UsageError if ranks have different things under one name, and not just different names."""
        gathered = self._group.gather(json.dumps(dict(sums)).encode())
        self._group.on_coordinator(lambda: check_alike([json.loads(data) for data in gathered or []]))

    def _replan(self, holdings: Holdings) -> _Plan:
        if not self._num_plans:  # the first save takes long as it is, and nobody saves who has only begun to restore
            self._group.connect_nearby()
        mine = self._group.rank
        gathered = self._group.gather(b"" if self._group.is_coordinator else dump_share(holdings.share))
        contents: StateContents | None = None

        @without_collections()
        def plan() -> str:
            nonlocal contents
            told = enumerate(gathered or [])
            shares = [holdings.share if rank == mine else load_share(data) for rank, data in told]
            try:
                picks = assign([share.chunks for share in shares])
                contents = contents_of(shares)
                if len(shares) > 1:  # each rank's alone is a tree
                    tree_of(contents.paths, contents.containers)
            except ValueError as error:
                raise UsageError(str(error)) from None
            except Corrupt as error:
                raise UsageError(f"ranks hold different things: {error}") from None
            return dump_picks(picks).decode()

        picks = load_picks(self._group.on_coordinator(plan).encode())
        self._num_plans += 1
        return _Plan(self._num_plans, holdings.digest, picks[mine], contents)


def check_alike(sums_of_rank: Sequence[Mapping[str, str]]) -> None:
    """Raise UsageError if two ranks hold different things under one name."""
    found = differing(sums_of_rank)
    if not found:
        return
    name, rank, other = found[0]
    more = f", and so do {len(found) - 1} more" if len(found) > 1 else ""
    raise UsageError(
        f"state {name!r} differs between rank {rank} and rank {other}{more}: wrap in PerRank(...) what each rank has of"
        " its own, and make the rest the same on all ranks"
    )
