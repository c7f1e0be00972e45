"""What a rank raises, or goes on with, by what another one has met. The other rank is what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed as dist

from storage import (
    AgreeingGroup,
    Checkpointer,
    CheckpointEvent,
    Corrupt,
    PeerFailed,
    StorageError,
    Transient,
    UsageError,
    WrongModel,
    open_store,
)
from storage.events import Reporter
from storage.loading.restorer import Restorer
from storage.ranks.agreement import Failure
from tests.storage.small_runs import damage_data, save


class Pair(AgreeingGroup):
    """Rank 0 of two; rank 1 sends `other` whenever the two send something."""

    def __init__(self, other: object) -> None:
        super().__init__(alone=True)
        self.world_size = 2
        self._other = json.dumps(other).encode()

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data, self._other]

    def gather(self, data: bytes) -> list[bytes]:
        return [data, self._other]

    def broadcast(self, data: bytes | None) -> bytes:
        assert data is not None
        return data


def outcome(mine: Exception | None, other: Exception | None) -> Exception | None:
    """What rank 0 raises."""
    told = None if other is None else Failure.of(other)
    group = Pair(told and {"kind": told.kind, "text": told.text})

    def call() -> None:
        if mine is not None:
            raise mine

    try:
        group.everywhere(call)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(
    ("mine", "other", "raised"),
    [
        (None, None, None),
        (None, WrongModel("no bias"), WrongModel("no bias")),
        (None, ValueError("seven"), StorageError("ValueError: seven")),
        (Corrupt("damaged"), None, Corrupt("damaged")),
        (Corrupt("damaged"), Transient("away"), Transient("away")),
        (PeerFailed("given up"), Corrupt("damaged"), Corrupt("damaged")),
        (Transient("first"), Transient("second"), Transient("first")),
        (ValueError("seven"), Transient("away"), ValueError("seven")),
    ],
)
def test_what_is_raised(mine: Exception | None, other: Exception | None, raised: Exception | None) -> None:
    found = outcome(mine, other)
    assert (type(found), str(found)) == (type(raised), str(raised))


def test_an_error_of_this_rank_is_raised_itself() -> None:
    mine = Corrupt("damaged", key="a.distcp")
    assert outcome(mine, None) is mine


def test_damage_that_only_another_rank_has_met_is_told_in_its_words(memory_url: str) -> None:
    save(memory_url, 10)
    store, heard = open_store(memory_url), list[tuple[CheckpointEvent, dict[str, Any]]]()
    damage_data(store, 10)
    report = Reporter(lambda event, fields: heard.append((event, fields)))
    restorer = Restorer(store, None, Pair({"text": "a block is damaged", "key": None, "host": "node-2"}), report)
    assert restorer._chooser.newest({}, unhealthy=False) is not None
    assert restorer._judge(10, None) == "a block is damaged"
    assert heard == [(CheckpointEvent.DAMAGED, {"step": 10, "reason": "a block is damaged"})]


def test_a_rank_that_is_not_in_the_group_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 2 if group is None else -1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 3 if group is None else -1)
    with pytest.raises(UsageError, match="rank 2 is not in the process group"):
        AgreeingGroup(dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]


def test_ranks_that_come_after_the_start_are_not_saved_without_their_parts(
    memory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(memory_url) as ckpt:
        ckpt.save(1, {"n": 1}, wait=True)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        for call in (lambda: ckpt.save(2, {"n": 2}), lambda: ckpt.restore({"n": 0})):
            with pytest.raises(UsageError, match=r"has 2 ranks, .*: start it after init_process_group"):
                call()
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
        ckpt.save(2, {"n": 2}, wait=True)
