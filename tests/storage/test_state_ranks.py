"""States of several ranks: models in any layout, what each rank has of its own, and what ranks must hold alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import sample
from tests.ranks import Ranks
from tests.storage import state_cases as cases
from tests.storage.states import plain, same

pytestmark = pytest.mark.slow


def _moments(state: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(moments) for name, moments in sorted(state["optimizer"]["state"].items())}


def test_a_model_with_its_optimizer_in_any_layout(ranks: Ranks, tmp_path: Path) -> None:
    saved = {
        layout: ranks.run(cases.save_layout, str(tmp_path), layout, world_size=world_size)[0]
        for layout, world_size in cases.LAYOUTS.items()
    }
    for number, (layout, world_size) in enumerate(cases.LAYOUTS.items()):
        sources = sample.turn(list(cases.LAYOUTS), number, 2)
        found = ranks.run(cases.load_layouts, str(tmp_path), layout, sources, world_size=world_size)[0]
        assert list(found) == sources
        for before, after in found.items():
            where = f"{before} -> {layout}"
            assert after["model"].keys() == saved[before]["model"].keys(), where
            for name, tensor in saved[before]["model"].items():
                assert torch.equal(after["model"][name], tensor), f"{where}: {name}"
            assert same(_moments(after).keys(), _moments(saved[before]).keys()), where
            for name, moments in _moments(saved[before]).items():
                assert same(_moments(after)[name], moments), f"{where}: {name}"
            assert same(plain(after["schedule"]), plain(saved[before]["schedule"])), where
            rates = [group["lr"] for group in after["optimizer"]["param_groups"]]
            assert rates == [group["lr"] for group in saved[before]["optimizer"]["param_groups"]], where


def test_each_rank_gets_its_own_back_and_others_keep_what_they_have(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(cases.own_of_ranks, str(tmp_path), True, world_size=2)
    for world_size in (1, 2, 3):
        results = ranks.run(cases.own_of_ranks, str(tmp_path), False, world_size=world_size)
        for rank, ((own, first_batch), events) in enumerate(results):
            if rank < 2:
                expected = {"rng": torch.full((rank + 2,), rank + 10), "position": [rank] * rank, f"only-{rank}": rank}
                assert same(plain(own), plain(expected))
                assert first_batch == 100 * rank + 2 * (rank + 1)
            else:
                assert own == {"fresh": rank} and first_batch == 100 * rank
            assert ("per_rank_resized" in events) == (rank == 0 and world_size != 2)


def test_what_differs_between_ranks_is_found_and_refused(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(cases.different, str(tmp_path), world_size=3):
        assert found[0].startswith("state 'x' differs between rank 0 and rank 1: wrap in PerRank(...)")
        assert "state 'd.rng' differs" in found[1]
        assert "state 'big' differs between rank 0 and rank 1, and so do 1 more" in found[2]
        assert "state 'model.weight' differs" in found[3]
        assert found[4:7] == ["", "", ""]
        assert "state 'o.param_groups.0." in found[7]
        assert "ranks hold different things" in found[8] and "'kind'" in found[8]
        assert "state 'hist[]' differs" in found[9]
        assert found[10] == ""


def test_what_comes_to_differ_later_is_found_too(ranks: Ranks, tmp_path: Path) -> None:
    for message in ranks.run(cases.later_difference, str(tmp_path), world_size=2):
        assert "state 'y' differs between rank 0 and rank 1" in message


def test_a_rank_that_fails_keeps_none_in_a_collective(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(cases.failure_beside_collectives, str(tmp_path), world_size=2):
        assert "broken on purpose" in found[0]
        assert "StatefulDataLoader" in found[1]
        assert "Fine.load_state_dict refuses what was saved: RuntimeError: broken on purpose" in found[2]
