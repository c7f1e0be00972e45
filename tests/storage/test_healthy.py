"""Checkpoints that were saved as unhealthy: kept to look into, passed over by restores, and in nobody's way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from elastic_moe.cli.main import main
from storage import Checkpointer, JobIdentity, ShardReader, open_store
from storage.errors import AlreadyExists, Fenced, OnlyUnhealthy
from storage.run import catalog
from storage.run.owner import Claim, Owner
from storage.run.quarantine import find_aside
from tests.ranks import Ranks
from tests.storage.small_runs import Events, states


def told(events: Events, name: str) -> list[dict[str, Any]]:
    return [fields for told, fields in events[0] if told == name]


@pytest.mark.parametrize("kind", ["folder", "memory", "moto", "juicefs"])
def test_a_restore_takes_the_newest_healthy_one_and_says_so(
    kind: str, make_url: Callable[[str], str], events: Events
) -> None:
    url = make_url(kind)
    state = {"w": torch.zeros(3)}
    with Checkpointer(url, keep=1, on_event=events[1]) as ckpt:
        ckpt.save(10, {"w": torch.full((3,), 10.0)}, wait=True)
        for step in (20, 30, 40):  # more than `keep`
            ckpt.save(step, {"w": torch.full((3,), torch.nan)}, wait=True, healthy=False)
        assert states(url) == [(40, "unhealthy"), (10, "committed")]
        assert ckpt.restore(state) == 10
        assert state["w"].tolist() == [10.0] * 3
        assert told(events, "checkpoint_passed_over") == [{"step": 10, "passed_over": [40], "reason": "unhealthy"}]
        assert told(events, "checkpoint_committed")[-1]["healthy"] is False
        assert ckpt.restore(state, unhealthy=True) == 40
        assert state["w"].isnan().all()
        # the way on from step 10 meets the step of the unhealthy one, which makes way; nothing newer is warned of
        for step in (30, 40):
            ckpt.save(step, {"w": torch.full((3,), float(step))}, wait=True)
            assert ckpt.wait()
        assert not told(events, "checkpoint_not_newest")
        assert ckpt.restore(state) == 40
        assert state["w"].tolist() == [40.0] * 3
    assert states(url) == [(40, "committed")]


def test_a_step_that_is_healthy_after_all_is_saved_anew_and_none_the_other_way(tmp_path: Path) -> None:
    state = {"w": torch.zeros(3)}
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, {"w": torch.full((3,), torch.inf)}, healthy=False)
        ckpt.save(1, {"w": torch.ones(3)}, wait=True)
        assert states(str(tmp_path)) == [(1, "committed")]
        ckpt.save(1, {"w": torch.full((3,), torch.inf)}, wait=True, healthy=False)
        assert ckpt.restore(state) == 1
        ckpt.save(1, {"w": torch.full((3,), torch.inf)}, wait=True, healthy=False)  # in another life: taken
        assert not ckpt.wait()
        assert ckpt.restore(state) == 1
    assert state["w"].tolist() == [1.0] * 3


def test_where_only_unhealthy_ones_are_one_line_says_so(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"w": torch.ones(3)}, wait=True, healthy=False)
        with pytest.raises(OnlyUnhealthy, match=r"steps 2, 1 were saved as unhealthy; restore\(..., unhealthy=True\)"):
            ckpt.restore({"w": torch.zeros(3)})
        assert ckpt.restore({"w": torch.zeros(3)}, unhealthy=True) == 2
    assert OnlyUnhealthy.exit_code == 2


def test_a_damaged_one_does_not_count_for_the_newest_healthy_one(tmp_path: Path) -> None:
    state = {"w": torch.zeros(3)}
    with Checkpointer(str(tmp_path), keep=1) as ckpt:
        ckpt.save(1, {"w": torch.ones(3)}, wait=True)
        ckpt.save(2, {"w": torch.ones(3)}, healthy=False)
        ckpt.save(3, {"w": torch.ones(3)}, wait=True, healthy=False)
        for name in (tmp_path / "step-000000003").rglob("manifest.json"):
            name.write_bytes(b"{}")
        ckpt.save(4, {"w": torch.ones(3)}, wait=True, healthy=False)
        assert ckpt.restore(state) == 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_load_of_a_run_passes_it_over_and_of_its_folder_does_not(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, {"w": torch.ones(3)}, wait=True)
        ckpt.save(2, {"w": torch.full((3,), 2.0)}, wait=True, healthy=False)
    for url, number in ((tmp_path, 1.0), (tmp_path / "step-000000002", 2.0)):
        state = {"w": torch.zeros(3)}
        dcp.load(state, storage_reader=ShardReader(str(url)), no_dist=True)
        assert state["w"].tolist() == [number] * 3
    (tmp_path / "step-000000001" / ".metadata").unlink()
    with pytest.raises(OnlyUnhealthy, match="step-000000002"):
        ShardReader(str(tmp_path), no_dist=True).read_metadata()


def test_the_command_line_shows_and_copies_it_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save(1, {"w": torch.ones(3)}, wait=True)
        ckpt.save(2, {"w": torch.ones(3)}, wait=True, healthy=False)
    assert main(["ckpt", "push", str(tmp_path / "run"), str(tmp_path / "copy"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["ckpt", "verify", str(tmp_path / "copy")]) == 0
    capsys.readouterr()
    assert main(["ckpt", "ls", str(tmp_path / "copy")]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["2", "unhealthy"], ["1", "committed"]]
    assert main(["ckpt", "ls", str(tmp_path / "copy"), "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["unhealthy", "committed"]


def test_who_lost_the_run_sets_no_unhealthy_one_aside(tmp_path: Path) -> None:
    url = str(tmp_path)
    with Checkpointer(url, job=JobIdentity(generation=2)) as ckpt:
        ckpt.save(1, {"w": torch.ones(3)}, wait=True, healthy=False)
    store = open_store(url)
    late = Claim(store, Owner(lineage="", generation=1, epoch=0, token="late", run_id="", host="", rendezvous=""))
    with pytest.raises(Fenced):
        find_aside(store, "step-000000001/", late)
    with pytest.raises(AlreadyExists):  # nor does a copy, which nobody claims
        find_aside(store, "step-000000001/")
    assert catalog.committed_steps(store) == [1]


def save_as_seen(url: str) -> int:
    """Rank 1 alone finds its state unhealthy."""
    state = {"w": torch.ones(3)}
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state, wait=True)
        ckpt.save(2, state, wait=True, healthy=dist.get_rank() != 1)
        return ckpt.restore(state)


def test_one_rank_is_enough(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(save_as_seen, str(tmp_path), world_size=2) == [1, 1]
    assert states(str(tmp_path)) == [(2, "unhealthy"), (1, "committed")]
