"""Checkpoints whose data is spread over prefixes: read by everything that reads others."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from elastic_moe.cli.main import main
from storage import Checkpointer, ShardReader, ShardWriter, inspection, open_store
from storage.format import layout
from storage.run import garbage
from storage.run.retention import observe
from storage.saving import writing
from tests.storage.copied_runs import contents
from tests.storage.mixed_runs import same
from tests.storage.small_runs import damage_data

SPREAD = 4
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(autouse=True)
def small_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four data objects a step."""
    monkeypatch.setattr(writing, "OBJECT_SIZE_BYTES", 1 << 20)


def make_state(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {**{f"part{i}": torch.randn(300, 1000, generator=generator) for i in range(4)}, "n": number}


def new_id(spread: int) -> str:
    return layout.with_spread(str(uuid.uuid4()), spread)


def folders(url: str, step: int) -> list[str]:
    """The prefixes, below its attempt, of a step's data objects."""
    names = [info.key for info in open_store(url).list(layout.step_folder(step)) if info.key.endswith(".distcp")]
    return [name.split("/")[2] for name in names]


def save(url: str, *steps: int) -> None:
    with Checkpointer(url, keep=9, prefix_spread=SPREAD) as ckpt:
        for step in steps:
            ckpt.save(step, make_state(step), wait=True)
            assert ckpt.wait()


def test_names_take_turns_and_lie_evenly_among_all() -> None:
    attempt = new_id(16)
    assert layout.parse_attempt(layout.attempt_folder(attempt)) == attempt
    names = [layout.data_name(attempt, rank, index) for rank in range(64) for index in range(2)]
    assert all(layout.is_data_name(name) and layout.is_spread(name) for name in names)
    turns = Counter(name.split("/")[1] for name in names)
    assert sorted(turns) == [f"{digit:x}0" for digit in range(16)]
    assert set(turns.values()) == {len(names) // 16}
    assert len(set(names)) == len(names)
    assert layout.attempts_in("|".join(names).encode()) == [attempt]
    for spread in (2, 3, 255, 256):
        attempt = new_id(spread)
        assert len({layout.data_name(attempt, 0, index).split("/")[1] for index in range(512)}) == spread


def test_without_a_spread_nothing_changes() -> None:
    attempt = new_id(1)
    assert layout.data_name(attempt, 3, 1) == f"attempt-{attempt}/__3_1.distcp"
    assert not layout.is_spread(layout.data_name(attempt, 3, 1))
    # an id that others have made, of as many digits as a spread one's end
    assert layout.data_name("12345678-10", 0, 0) == "attempt-12345678-10/__0_0.distcp"


@pytest.mark.parametrize("kind", ["folder", "moto"])
def test_what_is_spread_is_restored_and_verified_and_read_by_stock_dcp(
    kind: str, make_url: Callable[[str], str]
) -> None:
    url = make_url(kind)
    save(url, 10)
    assert sorted(set(folders(url, 10))) == ["00", "40", "80", "c0"]
    state = make_state(0)
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state) == 10
    assert same(state, make_state(10))
    assert inspection.verify(open_store(url), "step-000000010/").problems == ()
    for reader in stock_readers(layout.join_url(url, "step-000000010")):
        loaded = {name: torch.zeros_like(value) for name, value in make_state(0).items() if name != "n"}
        dcp.load(loaded, storage_reader=reader)
        assert all(torch.equal(loaded[name], value) for name, value in make_state(10).items() if name != "n")


def stock_readers(url: str) -> list[dcp.StorageReader]:
    if "://" not in url:
        return [FileSystemReader(url), ShardReader(url)]
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return [FsspecReader(url.split("?")[0]), ShardReader(url)]


def test_a_push_takes_them_along_and_the_copy_is_read(tmp_path: Path) -> None:
    here, there = f"{tmp_path}/here", f"{tmp_path}/there"
    save(here, 10, 20)
    assert main(["ckpt", "push", here, there, "--quiet"]) == 0
    assert contents(there) == contents(here)
    state = make_state(0)
    with Checkpointer(there) as ckpt:
        assert ckpt.restore(state) == 20
    assert same(state, make_state(20))


def test_damage_is_found_and_set_aside_and_the_step_saved_anew(tmp_path: Path) -> None:
    url = str(tmp_path)
    save(url, 10, 20)
    damage_data(open_store(url), 20)
    state = make_state(0)
    with Checkpointer(url, prefix_spread=SPREAD) as ckpt:
        assert ckpt.restore(state) == 10
        ckpt.save(20, make_state(21), wait=True)
        assert ckpt.restore(state) == 20
    assert same(state, make_state(21))


def test_what_a_dead_job_has_left_is_garbage_and_goes_as_a_whole(tmp_path: Path) -> None:
    url = str(tmp_path)
    save(url, 10, 20)
    store = open_store(url)
    attempt = new_id(SPREAD)
    left = [f"step-000000020/{layout.data_name(attempt, 0, index)}" for index in range(SPREAD)]
    for key in left:
        store.put(key, [b"half"])
    (found,) = [row for row in garbage.find(store, time.time() + 9e5, 3600.0) if row.kind == "attempt"]
    assert sorted(found.keys) == sorted(left)
    with Checkpointer(url, keep=1, prefix_spread=SPREAD) as ckpt:  # retention knows them as well
        ckpt.save(30, make_state(30), wait=True)
    assert [(state.step, len(state.attempts)) for state in observe(store)] == [(30, 1)]


def test_older_programs_refuse_it_as_newer_and_not_as_damaged(tmp_path: Path) -> None:
    save(str(tmp_path), 10)
    with Checkpointer(str(tmp_path), keep=9) as ckpt:
        ckpt.save(20, make_state(20), wait=True)
    spread, plain = ((tmp_path / f"step-{step:09d}" / "manifest.json").read_text() for step in (10, 20))
    assert '"version":3' in spread.replace(" ", "") and '"version":2' in plain.replace(" ", "")


def test_a_shard_writer_spreads_as_well(tmp_path: Path) -> None:
    url = f"{tmp_path}/step-000000010"
    state = {name: value for name, value in make_state(1).items() if name != "n"}
    dcp.save(state, storage_writer=ShardWriter(url, prefix_spread=SPREAD), no_dist=True)
    assert len(set(folders(str(tmp_path), 10))) == SPREAD
    loaded = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load(loaded, storage_reader=FileSystemReader(url), no_dist=True)
    assert same(loaded, state)
