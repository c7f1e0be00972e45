"""What the ranks agree on before each save: that all of them can, that they hold the same, and who writes what."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from storage.arena.pending import StagingListener
from storage.arena.stager import Staged, Stager
from storage.errors import Corrupt, Fenced, UsageError
from storage.format import layout
from storage.format.framing import EncodedItem
from storage.ranks.agreement import AgreeingGroup, Failure
from storage.run.attempt import StateContents
from storage.saving.committer import Committer
from storage.saving.describe import Holdings, contents_of, describe
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
    """Who writes what, valid while every rank's holdings keep their digest. `contents`: coordinator only."""

    digest: str
    picks: tuple[int, ...]
    contents: StateContents | None


@dataclass(frozen=True)
class _Report:
    """What a rank tells the coordinator of its part of a save.

    `is_planned`: the plan of the save before fits. `sums`: one fingerprint of all that every rank must hold alike.
    """

    is_planned: bool
    healthy: bool
    sums: str
    failure: Failure | None

    def dump(self) -> bytes:
        """JSON for the way to the coordinator."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def load(cls, data: bytes) -> _Report:
        """What `dump` dumped."""
        told = json.loads(data)
        return cls(**{**told, "failure": told["failure"] and Failure(**told["failure"])})


@dataclass(frozen=True)
class _Decision:
    """What the coordinator makes of the reports: what the ranks have to do before the save, and its attempt.

    `attempt` is None where nothing is to be saved, and not known yet where the ranks have to `compare` first.
    """

    healthy: bool
    attempt: str | None = None
    compare: bool = False
    plan: bool = False


@dataclass(frozen=True)
class Agreed:
    """One save: the attempt of all ranks, and what this rank writes. `contents`: coordinator only."""

    attempt: str
    healthy: bool
    contents: StateContents | None
    holdings: Holdings
    picks: tuple[int, ...]
    values: dict[int, EncodedItem]

    def stage(self, stager: Stager, listener: StagingListener) -> tuple[list[Payload], Staged | None, str | None]:
        """A copy of what this rank writes, or why there is none: it must still tell the others."""
        try:
            return *self.holdings.stage(self.picks, self.values, stager, listener), None
        except Exception as error:  # noqa: BLE001 - told by the receipt
            return [], None, f"{type(error).__name__}: {error}"


class Consensus:
    """What a group of ranks agrees on before each of its saves. Every method without underscore is a collective."""

    def __init__(self, group: AgreeingGroup, committer: Committer) -> None:
        self._group = group
        self._committer = committer
        self._plan: _Plan | None = None
        self._before: Holdings | None = None

    def reach(self, step: int, state: Mapping[str, Any], *, healthy: bool, compare_ranks: bool) -> Agreed | None:
        """What is to be saved; None if the step is committed already. On all ranks the same, or the same error.

        With `compare_ranks`, what ranks hold differently under one name is refused.

        Raises:
            Fenced, UsageError, StorageError: as `Checkpointer.save` says.
        """
        described = self._describe(state, compare_ranks=compare_ranks)
        decision = self._decide(step, self._report(described, healthy=bool(healthy)))
        assert not isinstance(described, Failure), "every rank's failure is raised on all"
        holdings, values = described
        attempt = self._compare(holdings.sums) if decision.compare else decision.attempt
        if attempt is None:
            return None
        if decision.plan or self._plan is None:
            self._plan = self._replan(holdings)
        return Agreed(attempt, decision.healthy, self._plan.contents, holdings, self._plan.picks, values)

    def _has_plan_of(self, holdings: Holdings) -> bool:
        return self._plan is not None and self._plan.digest == holdings.digest

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

    def _report(self, described: _Described | Failure, *, healthy: bool) -> _Report:
        if isinstance(described, Failure):
            return _Report(is_planned=False, healthy=healthy, sums="", failure=described)
        holdings, _ = described
        return _Report(self._has_plan_of(holdings), healthy, combined(holdings.sums), failure=None)

    def _decide(self, step: int, mine: _Report) -> _Decision:
        """What is to be done, by the reports of all ranks. Raises UsageError, Fenced, StorageError on all of them."""
        reports = [_Report.load(data) for data in self._group.gather(mine.dump()) or []]

        def decide() -> dict[str, Any]:
            layout.step_folder(step)
            if self._committer.fenced is not None:
                raise Fenced(self._committer.fenced)
            for rank, report in enumerate(reports):
                if report.failure is not None:
                    raise report.failure.error(f"rank {rank}: " if len(reports) > 1 else "")
            healthy = all(report.healthy for report in reports)
            if self._committer.has_committed(step, healthy=healthy):
                log.info("step %d is committed already; not saved again", step)
                return asdict(_Decision(healthy))
            differ = len({report.sums for report in reports}) > 1
            attempt = None if differ else self._committer.new_attempt()
            return asdict(_Decision(healthy, attempt, differ, not all(report.is_planned for report in reports)))

        return _Decision(**self._group.on_coordinator(decide))

    def _compare(self, sums: Mapping[str, str]) -> str:
        """An attempt, if ranks have different names and not different things under one. Raises UsageError."""
        gathered = self._group.gather(json.dumps(dict(sums)).encode())

        def compare() -> str:
            check_alike([json.loads(data) for data in gathered or []])
            return self._committer.new_attempt()

        attempt: str = self._group.on_coordinator(compare)
        return attempt

    def _replan(self, holdings: Holdings) -> _Plan:
        gathered = self._group.gather(dump_share(holdings.share))
        contents: StateContents | None = None

        def plan() -> str:
            nonlocal contents
            shares = [load_share(data) for data in gathered or []]
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
        return _Plan(holdings.digest, picks[self._group.rank], contents)


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
