"""What ranks decide before a save, and how few collectives they need for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from storage import AgreeingGroup, Checkpointer, CheckpointEvent, PerRank, StorageError, UsageError
from storage.errors import Fenced
from storage.ranks.agreement import Failure
from storage.ranks.group import SHORT_BYTES, Group
from storage.saving.committer import Committer
from storage.saving.proposal import Fate, Proposal, as_step, decide
from storage.saving.uploads import SaveJob, Uploads
from tests.ranks import Ranks


def of(rank: int = 1, **said: Any) -> Proposal:
    """What a rank says of step 7, all being well."""
    if rank == 0:
        said = {"attempt": "a" * 40} | said
    complete: dict[str, Any] = {"step": 7, "sums": "s", "plan": 1} | said
    return Proposal(**complete)


def both(mine: dict[str, Any] | None = None, other: dict[str, Any] | None = None) -> list[Proposal]:
    """What the two ranks say."""
    return [of(0, **mine or {}), of(**other or {})]


def test_what_is_said_arrives_and_is_short() -> None:
    attempt = "f" * 16 + "-" + "f" * 8 + "-" + "f" * 16 + "-fff"
    told = of(0, step=2**63 - 1, waiting=attempt, attempt=attempt, sums="f" * 16, plan=10**6, fate=Fate.UNDER_WAY)
    assert Proposal.load(told.dump()) == told
    assert len(told.dump()) <= SHORT_BYTES
    failed = of(failure=Failure("Corrupt", "no"), problem="p", busy="b", healthy=False, asks=True, fenced="f")
    assert Proposal.load(failed.dump()) == failed


@pytest.mark.parametrize(
    ("told", "error", "says"),
    [
        (both({}, {"step": 8}), UsageError, "rank 0 saves step 7, and rank 1 step 8; give all ranks the same"),
        (both({}, {"step": None, "problem": "step is -1"}), UsageError, "rank 1: step is -1"),
        ([of(0, step=None, problem="step is -1")], UsageError, "^step is -1$"),
        (both({"fenced": "it has a newer owner"}, {"busy": "no memory"}), Fenced, "it has a newer owner"),
        (both({}, {"failure": Failure("UsageError", "a function")}), UsageError, "rank 1: a function"),
        (both({"failure": Failure("ValueError", "odd")}), StorageError, "rank 0: odd"),
    ],
)
def test_what_is_raised_on_all_ranks(told: list[Proposal], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        decide(told)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (both({}, {"busy": "the disk is slow", "failure": Failure("UsageError", "a function")}), "rank 1: the disk"),
        (both({"busy": "one"}, {"busy": "two"}), "rank 0: one"),
        (both({"waiting": "b" * 40}), "the save before is under way on some ranks, and waits on others"),
        (both({"waiting": "b" * 40}, {"waiting": "c" * 40}), "the save before is under way on some"),
    ],
)
def test_what_is_left_out_on_all_ranks(told: list[Proposal], reason: str) -> None:
    decision = decide(told)
    assert reason in decision.skip
    assert decision.attempt is None


def test_what_is_saved() -> None:
    decision = decide(both())
    assert (decision.step, decision.attempt, decision.healthy, decision.skip) == (7, "a" * 40, True, "")
    assert not (decision.plan or decision.compare or decision.awaits or decision.gives_way or decision.agree)
    assert not decide(both({}, {"healthy": False})).healthy
    assert decide(both({}, {"sums": "t"})).compare
    assert decide(both({}, {"asks": True})).agree
    assert [decide(both({}, {"is_copying": is_copying})).copies for is_copying in (False, True)] == [True, False]
    assert decide(both({"waiting": "b"}, {"waiting": "b"})).gives_way
    assert [decide(both({"plan": a}, {"plan": b})).plan for a, b in ((0, 0), (1, 0), (1, 2), (2, 2))] == [1, 1, 1, 0]


def test_what_is_committed_is_not_saved_again() -> None:
    sick = {"healthy": False}
    assert decide(both({"fate": Fate.COMMITTED})).attempt is None
    assert decide(both({"fate": Fate.COMMITTED}, sick)).attempt is None
    assert decide(both({"fate": Fate.UNHEALTHY})).attempt == "a" * 40
    assert decide(both({"fate": Fate.UNHEALTHY}, sick)).attempt is None
    assert decide(both({"fate": Fate.UNDER_WAY})).awaits


def test_numbers_of_other_kinds_are_steps_and_others_are_none() -> None:
    assert as_step(torch.tensor(3).numpy()[()]) == (3, None)
    number, problem = as_step("3")
    assert number is None
    assert problem is not None and problem.startswith("step is '3' (str)")


CALLS = ("broadcast", "gather", "all_gather", "all_reduce", "all_gather_into_tensor", "barrier", "batch_isend_irecv")


class Counted:
    """Counts the collectives that torch is asked for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        for name in CALLS:
            patch.setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return call(*args, **kwargs)

        return counted

    def taken(self) -> dict[str, int]:
        """Those since the last time."""
        found, self.calls = dict(self.calls), Counter()
        return found


def shards(number: int, rows: int = 8) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.full((rows, 2), float(number))
    return {
        "w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None),
        "same": torch.full((3,), float(number)),
        "mine": PerRank(torch.full((2,), float(dist.get_rank()))),
        "n": number,
    }


def counts(folder: str, is_near: bool) -> list[dict[str, int]]:
    """The collectives of saves, with `long` a state of another shape in between."""
    with pytest.MonkeyPatch.context() as apart:
        if not is_near:
            apart.setattr("storage.ranks.group.NUM_RANKS_MAX", 1)
        return _counts(folder)


def _counts(folder: str) -> list[dict[str, int]]:
    found = []
    with pytest.MonkeyPatch.context() as patch, Checkpointer(folder, keep=9) as ckpt:
        for step, rows in ((1, 8), (2, 8), (3, 8), (4, 16), (5, 16)):
            state = shards(step, rows)
            counted = Counted(patch)
            ckpt.save(step, state, wait=step == 3)
            found.append(counted.taken())
            patch.undo()
        state = shards(5, 16)
        counted = Counted(patch)
        ckpt.save(5, state)  # once more, which is found out by whoever asks the coordinator
        found.append({"again": int(sum(counted.taken().values()) <= 2)})
    return found


@pytest.mark.parametrize("is_near", [True, False])
def test_a_save_like_the_one_before_takes_one_collective(ranks: Ranks, tmp_path: Path, is_near: bool) -> None:
    """And none of torch's, where ranks of one host tell each other by themselves."""
    first, second = ranks.run(counts, str(tmp_path), is_near, world_size=2)
    assert first == second
    once: dict[str, int] = {} if is_near else {"all_gather": 1}
    assert first[1:3] == [once, once]
    assert first[4:] == [once, {"again": 1}]
    assert sum(first[0].values()) > 1 < sum(first[3].values())


def lengths() -> list[bool]:
    """What goes between ranks arrives whole, whether it is short on all ranks, on some or on none."""
    group, found = Group(), []
    for of_rank in (
        (0, 0),
        (5, 0),
        (SHORT_BYTES, SHORT_BYTES),
        (SHORT_BYTES + 1, 3),
        (0, 5 * SHORT_BYTES),
        (999, 1000),
    ):
        whole = [bytes([65 + rank]) * length for rank, length in enumerate(of_rank)]
        mine = whole[group.rank]
        found.append(group.all_gather(mine) == whole)
        found.append(group.gather(mine) == (whole if group.is_coordinator else None))
        found.append(group.broadcast(mine if group.is_coordinator else None) == whole[0])
        found.append(group.all_gather_long(mine) == whole)
    return found


def test_messages_of_any_length_arrive(ranks: Ranks) -> None:
    assert all(all(found) for found in ranks.run(lengths, world_size=2))


def ranks_go_apart(folder: str) -> list[str]:
    """What happens where one rank differs from the other, save after save; what was said, and what was committed."""
    rank, found = dist.get_rank(), list[str]()

    def hear(event: CheckpointEvent, fields: dict[str, Any]) -> None:
        if event == CheckpointEvent.COMMITTED:
            found.append(f"committed {fields['step']}")

    def attempt(step: object, state: dict[str, Any], **options: Any) -> None:
        try:
            ckpt.save(step, state, wait=True, **options)  # type: ignore[arg-type]
        except StorageError as error:
            found.append(f"{type(error).__name__} {error}")

    with Checkpointer(folder, keep=9, on_event=hear) as ckpt:
        attempt(1, shards(1))
        attempt(2 + rank, shards(2))
        attempt(2, shards(2) if rank == 0 else {**shards(2), "odd": lambda: 1})
        attempt(3, {**shards(3), "n": rank})  # ranks hold different things under one name
        attempt(4, {**shards(4), **({"more": 1} if rank else {})})  # and here under different names
        attempt("five" if rank else 5, shards(5))
        attempt(6, shards(6))
    return found


def test_ranks_that_differ_raise_or_save_alike(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(ranks_go_apart, str(tmp_path), world_size=2)
    errors = [text for text in first if not text.startswith("committed")]
    assert errors == second
    assert [text.split()[0] for text in errors] == ["UsageError", "UnsupportedValue", "UsageError", "UsageError"]
    assert "rank 0 saves step 2, and rank 1 step 3" in errors[0]
    assert errors[1].startswith("UnsupportedValue rank 1: state 'odd'")
    assert "state 'n' differs between rank 0 and rank 1" in errors[2]
    assert errors[3].startswith("UsageError rank 1: step is 'five'")
    assert [text for text in first if text.startswith("committed")] == ["committed 1", "committed 4", "committed 6"]


def saves_again_while_it_is_under_way(folder: str) -> int:
    """The same step twice, the second time before the first has been stored; how many saves there were."""
    go_on, run, ask = Event(), Uploads.run, AgreeingGroup.on_coordinator
    begun: list[int] = []

    def held(uploads: Uploads, job: SaveJob, *args: Any, **kwargs: Any) -> bool:
        begun.append(job.attempt.step)
        assert go_on.wait(60)
        return run(uploads, job, *args, **kwargs)

    def asking(group: AgreeingGroup, call: Callable[[], Any]) -> Any:
        go_on.set()
        return ask(group, call)

    with pytest.MonkeyPatch.context() as patch, Checkpointer(folder, keep=9) as ckpt:
        patch.setattr(Uploads, "run", held)
        patch.setattr(Committer, "await_free", lambda *_: "")
        ckpt.save(1, shards(1))
        patch.setattr(AgreeingGroup, "on_coordinator", asking)
        ckpt.save(1, shards(1))
        assert ckpt.wait()
    return len(begun)


def test_a_step_that_is_under_way_is_waited_for_and_not_saved_again(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(saves_again_while_it_is_under_way, str(tmp_path), world_size=2) == [1, 1]
