"""The Checkpointer in one process: round trips, fencing, retention, cleaning, and users' mistakes."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from storage import Access, Checkpointer, JobIdentity, inspection, open_store
from storage.errors import Fenced, StorageError, UnsupportedValue, UsageError, WrongModel
from storage.format.sealed import seal
from storage.run import owner, retention
from tests.storage.mixed_runs import Events, every_object, make_state, names, same


def test_round_trip(tmp_path: Path, events: Events) -> None:
    url = str(tmp_path / "run")
    state = make_state(1)
    with Checkpointer(url, on_event=events[1]) as ckpt:
        assert ckpt.restore(state) == 0
        assert same(state, make_state(1))
        ckpt.save(10, state)
        state["model"]["weight"].zero_()  # the save has its own copy
        state["step"] = -1
        assert ckpt.wait()
    with Checkpointer(url, on_event=events[1]) as ckpt:
        assert ckpt.restore(state) == 10
    assert same(state, make_state(1))
    assert names(events) == ["checkpoint_staged", "checkpoint_committed", "restored"]
    for _, fields in events[0]:
        assert fields["step"] == 10
        assert fields["bytes"] > 84000
        assert fields["seconds"] >= 0


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, make_state(1), wait=True)
        state = make_state(2)
        before = {key: value.data_ptr() for key, value in state["model"].items()}
        assert ckpt.restore(state) == 1
    assert {key: value.data_ptr() for key, value in state["model"].items()} == before
    assert same(state, make_state(1))


def test_stateful_objects_and_optimizers(tmp_path: Path) -> None:
    def train(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Linear(8, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        return model, optimizer

    saved, loaded = train(1), train(2)
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(5, {"model": saved[0], "optimizer": saved[1]}, wait=True)
        assert ckpt.restore({"model": loaded[0], "optimizer": loaded[1]}) == 5
    assert same(saved[0].state_dict(), loaded[0].state_dict())
    left, right = saved[1].state_dict(), loaded[1].state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert same({str(k): v for k, v in left["state"].items()}, {str(k): v for k, v in right["state"].items()})


def test_other_dtypes_and_strided_destinations(tmp_path: Path) -> None:
    saved = {"a": torch.randn(6, 8), "b": torch.randn(64, 40000)}
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, saved, wait=True)
        other = {"a": torch.zeros(6, 8, dtype=torch.float64), "b": torch.zeros(40000, 64).t()}
        ckpt.restore(other)
    assert torch.equal(other["a"].float(), saved["a"])
    assert torch.equal(other["b"], saved["b"])


def test_newest_wins_and_old_ones_go(tmp_path: Path, events: Events) -> None:
    url = str(tmp_path)
    with Checkpointer(url, keep=2, on_event=events[1]) as ckpt:
        for step in (10, 20, 30, 40):
            ckpt.save(step, make_state(step))
        ckpt.wait()
        state = make_state(0)
        assert ckpt.restore(state) == 40
    assert same(state, make_state(40))
    assert [row.step for row in inspection.summaries(inspection.locate(url))] == [40, 30]
    assert "checkpoint_failed" not in names(events)


def test_what_was_just_committed_stays_though_newer_steps_are_there(tmp_path: Path, events: Events) -> None:
    def folders() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("step-*"))

    with Checkpointer(str(tmp_path), keep=1) as ckpt:
        ckpt.save(100, make_state(1), wait=True)
    with Checkpointer(str(tmp_path), keep=1, on_event=events[1]) as ckpt:
        for step in (5, 6):
            ckpt.save(step, make_state(2), wait=True)
            assert ckpt.wait()
            assert folders() == [f"step-{step:09d}", "step-000000100"]
            assert events[0][-1] == ("checkpoint_not_newest", {"step": step, "newest": 100})


def test_a_step_just_committed_is_not_saved_again(tmp_path: Path, events: Events) -> None:
    with Checkpointer(str(tmp_path), on_event=events[1]) as ckpt:
        ckpt.save(10, make_state(1))
        ckpt.save(10, make_state(1), wait=True)
    assert names(events) == ["checkpoint_staged", "checkpoint_committed"]


def test_a_step_of_somebody_else_is_not_overwritten(tmp_path: Path, events: Events) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(10, make_state(1), wait=True)
    with Checkpointer(str(tmp_path), on_event=events[1]) as ckpt:
        ckpt.save(10, make_state(2), wait=True)
        assert not ckpt.wait()
        state = make_state(0)
        ckpt.restore(state)
    assert same(state, make_state(1))
    assert "committed already" in dict(events[0])["checkpoint_failed"]["reason"]


@pytest.mark.usefixtures("no_look_at_claims")
def test_an_older_owner_cannot_commit(tmp_path: Path, events: Events) -> None:
    old = Checkpointer(str(tmp_path), job=JobIdentity(generation=1, lineage="a"), on_event=events[1]).start()
    with Checkpointer(str(tmp_path), job=JobIdentity(generation=2, lineage="a")) as new:
        new.save(10, make_state(10), wait=True)
        old.save(20, make_state(20), wait=True)
        assert not old.wait()
        with pytest.raises(Fenced, match="belongs to generation 2"):
            old.save(30, make_state(30))
        assert new.restore(make_state(0)) == 10
        new.save(20, make_state(22), wait=True)
        state = make_state(0)
        assert new.restore(state) == 20
    assert same(state, make_state(22))
    old.close()
    assert names(events) == ["checkpoint_staged", "checkpoint_failed"]
    assert "belongs to generation 2" in events[0][1][1]["reason"]
    with pytest.raises(Fenced, match="generation 1"):
        Checkpointer(str(tmp_path), job=JobIdentity(generation=1, lineage="a")).start()
    Checkpointer(str(tmp_path), job=JobIdentity(generation=0, lineage="b")).start().close()


def test_the_rightful_owner_claims_the_run_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    early = owner.Owner(lineage="a", generation=1, epoch=1, token="paused between its look at the owner and its claim")
    with Checkpointer(str(tmp_path), job=JobIdentity(generation=2, lineage="a")) as ckpt:
        for step in (10, 20):
            open_store(str(tmp_path)).put("owner.json", [seal("owner", early)])
            ckpt.save(step, make_state(step), wait=True)
            assert ckpt.wait()
            assert "generation 1 claimed the run late" in caplog.text
            caplog.clear()
        late = owner.Claim(open_store(str(tmp_path)), early)
        with pytest.raises(Fenced, match="belongs to generation 2"):
            late.check()


def test_attempts_that_no_live_job_owns_are_removed(tmp_path: Path) -> None:
    for step, attempt in ((10, "dead0000"), (20, "dead1111"), (30, "dead2222")):
        open_store(str(tmp_path)).put(f"step-{step:09d}/attempt-{attempt}/__0_0.distcp", [b"left over"])
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(20, make_state(20), wait=True)
        ckpt.wait()
    assert not [name for name in every_object(tmp_path) if "dead" in name]
    assert inspection.checkpoints(inspection.locate(str(tmp_path))) == ["step-000000020/"]


def test_cleaning_spares_attempts_that_start_meanwhile(memory_url: str) -> None:
    store = open_store(memory_url)
    with Checkpointer(memory_url) as ckpt:
        ckpt.save(10, make_state(10), wait=True)
    for attempt in ("dead0000", "beef1111"):
        store.put(f"step-000000020/attempt-{attempt}/__0_0.distcp", [b"data"])

    def live(seen: Collection[str]) -> set[str]:
        store.put("step-000000020/attempt-beef2222/__0_0.distcp", [b"started after the look"])
        return {"beef1111"}

    mine = owner.Claim(store, owner.claim(store, owner.Owner(lineage="", generation=0, epoch=0, token="token"))[0])
    cleaned = retention.clean(store, mine, 3, live, 10)
    assert cleaned == retention.Cleaned([retention.Removal(20, frozenset({"dead0000"}))], ())
    assert store.folders("step-000000020/") == ["attempt-beef1111", "attempt-beef2222"]
    owner.claim(store, owner.Owner(lineage="", generation=0, epoch=0, token="another"))
    with pytest.raises(Fenced):
        retention.clean(store, mine, 1, set, 10)
    assert store.folders("step-000000020/") == ["attempt-beef1111", "attempt-beef2222"]


def test_a_listener_that_fails_harms_nothing(tmp_path: Path) -> None:
    def listener(name: str, fields: dict[str, Any]) -> None:
        raise RuntimeError("listener")

    with Checkpointer(str(tmp_path), on_event=listener) as ckpt:
        ckpt.save(1, make_state(1), wait=True)
        assert ckpt.restore(make_state(0)) == 1


def test_another_model_is_told_by_its_differences(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, {"w": torch.ones(2, 3), "v": 1, "t": torch.ones(1)}, wait=True)
        state: dict[str, Any] = {"w": torch.ones(3, 2), "x": torch.ones(1), "v": torch.ones(1), "t": 5}
        with pytest.raises(WrongModel) as caught:
            ckpt.restore(state)
        for part in ("'w' has shape [3, 2], the checkpoint [2, 3]", "it has no 'x'", "'v' is a tensor", "'t' is a int"):
            assert part in str(caught.value)
        assert caught.value.exit_code == 2
        assert ckpt.restore({"w": torch.ones(2, 3)}, strict=False) == 1


class Broken:
    """A Stateful object that fails."""

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("out of order")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_state_dict_that_fails_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(str(tmp_path)) as ckpt, pytest.raises(StorageError, match="RuntimeError: out of order"):
        ckpt.save(1, {"broken": Broken()})
    assert "out of order" in caplog.text


def test_nothing_is_claimed_before_it_starts_nor_after_it_is_closed(memory_url: str) -> None:
    threads = set(threading.enumerate())
    ckpt = Checkpointer(memory_url)
    assert (open_store(memory_url).list(""), set(threading.enumerate()) - threads) == ([], set())
    with ckpt:
        assert owner.read_owner(open_store(memory_url)) is not None
        assert ckpt.start() is ckpt  # once more does no harm
    assert not set(threading.enumerate()) - threads
    for call in (ckpt.start, lambda: ckpt.save(1, make_state(1)), lambda: ckpt.restore(make_state(0))):
        with pytest.raises(UsageError, match="is closed; open another one"):
            call()
    ckpt.close()


def test_the_first_call_starts_it(memory_url: str) -> None:
    ckpt = Checkpointer(memory_url)
    assert ckpt.wait()
    ckpt.save(1, make_state(1), wait=True)
    ckpt.close()
    assert restored_step(memory_url) == 1


def restored_step(url: str) -> int:
    ckpt = Checkpointer(url, access=Access.READ)
    try:
        return ckpt.restore(make_state(0))
    finally:
        ckpt.close()


def test_mistakes_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="keep is 0"):
        Checkpointer(str(tmp_path), keep=0)
    with Checkpointer(str(tmp_path)) as ckpt:
        with pytest.raises(UnsupportedValue, match=r"'deep\.f'"):
            ckpt.save(1, {"deep": {"f": lambda: 0}})
        with pytest.raises(UsageError, match="meta device"):
            ckpt.save(1, {"w": torch.empty(2, device="meta")})
        with pytest.raises(UsageError, match="sparse"):
            ckpt.save(1, {"w": torch.ones(2, 2).to_sparse()})
        with pytest.raises(UsageError, match="step is -1"):
            ckpt.save(-1, {"w": torch.ones(2)})
        ckpt.save(2, {"w": torch.ones(2)}, wait=True)
        assert ckpt.wait()
    monkeypatch.setenv("ELASTIC_MOE_GENERATION", "seven")
    with pytest.raises(UsageError, match="'seven'"):
        Checkpointer(str(tmp_path))


def test_who_saved_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_MOE_GENERATION", "4")
    monkeypatch.setenv("ELASTIC_MOE_LINEAGE", "launch-a")
    monkeypatch.setenv("ELASTIC_MOE_MESH", '{"replicate":1,"shard":1,"expert":1}')
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, make_state(1), wait=True)
    (row,) = inspection.summaries(inspection.locate(str(tmp_path)))
    assert (row.generation, row.lineage, row.mesh) == (4, "launch-a", {"replicate": 1, "shard": 1, "expert": 1})
    assert row.state == "committed"


def test_leaving_on_an_error_does_not_wait_for_others(memory_url: str) -> None:
    def train() -> None:
        with Checkpointer(memory_url) as ckpt:
            ckpt.save(1, make_state(1))
            raise RuntimeError("training")

    with pytest.raises(RuntimeError, match="training"):
        train()
