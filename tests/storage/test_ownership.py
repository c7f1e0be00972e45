"""Whoever opens a store closes it, and nobody closes a store that was handed to it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from elastic_moe.cli.main import main
from elastic_moe.trainer.loop import _healthy_steps
from storage import Access, Checkpointer, JobIdentity, ShardReader, ShardWriter, inspection, open_store, register_scheme
from storage.errors import Fenced, InUse, NoCheckpoint, UsageError
from storage.run import heartbeat, in_use, owner
from storage.run.heartbeat import Heartbeat
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from storage.stores.retrying_store import RetryingStore
from storage.stores.s3.store import S3Store
from storage.stores.wrapper import StoreWrapper
from tests.cluster import until
from tests.storage.heartbeat_cases import QUIET, owner_of
from tests.storage.small_runs import save, state


class Opened(StoreWrapper):
    """A store that counts how often it was closed."""

    num_closes = 0

    def close(self) -> None:
        self.num_closes += 1
        super().close()


Opens = Callable[[], list[int]]


def heartbeats() -> set[threading.Thread]:
    """The threads of all that beat here, those among them that a test before has left, and that end by themselves."""
    return {thread for thread in threading.enumerate() if thread.name == "storage-heartbeat"}


@pytest.fixture
def opens(memory_url: str) -> Opens:
    """`counted://run` is one store in memory, opened anew by each; how often each opened one was closed."""
    found: list[Opened] = []
    memory = MemoryStore.named(memory_url.removeprefix("memory://"))

    def opener(rest: str) -> ObjectStore:
        found.append(Opened(memory))
        return found[-1]

    register_scheme("counted", opener)
    return lambda: [store.num_closes for store in found]


URL = "counted://run"


def test_a_checkpointer_closes_its_store_once(opens: Opens) -> None:
    ckpt = Checkpointer(URL)
    ckpt.save(1, state(1), wait=True)
    assert opens() == [0]
    ckpt.close()
    ckpt.close()
    assert opens() == [1]
    with Checkpointer(URL, access=Access.READ) as reader:
        assert reader.restore(state(0)) == 1
    assert opens() == [1, 1]


def test_a_checkpointer_that_cannot_open_closes_its_store(opens: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    before = heartbeats()
    with Checkpointer(URL, job=JobIdentity(lineage="a", generation=2)):
        with pytest.raises(Fenced):
            Checkpointer(URL, job=JobIdentity(lineage="a", generation=1)).start()
        monkeypatch.setattr(in_use, "SILENCE_S", 0.0)
        monkeypatch.setattr(heartbeat, "INTERVAL_S", 100.0)
        monkeypatch.setattr(in_use.Watch, "liveness", lambda self, now_s: in_use.Liveness.ALIVE)
        with pytest.raises(InUse):
            Checkpointer(URL, job=JobIdentity(lineage="b")).start()
        assert opens() == [0, 1, 1]
    assert opens() == [1, 1, 1]
    assert not heartbeats() - before


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_readers_and_writers_close_what_they_have_opened(opens: Opens) -> None:
    found = {"w": torch.zeros(3)}
    with ShardWriter(f"{URL}/step-000000001") as writer:
        dcp.save({"w": torch.arange(3.0)}, storage_writer=writer)
        writer.reset(f"{URL}/step-000000002")
        assert opens() == [0], "one store, however often DCP resets it to a step of the same run"
    with ShardReader(URL) as reader:
        dcp.load(found, storage_reader=reader)
        reader.reset("memory://another")
        assert opens() == [1, 1], "it reads from another store now"
        reader.reset(URL)
        assert opens() == [1, 1, 0]
    assert opens() == [1, 1, 1]
    reader.reset()
    assert opens() == [1, 1, 1, 0], "and it may be used again"
    reader.close()
    reader.close()
    assert opens() == [1, 1, 1, 1]
    assert found["w"].tolist() == [0.0, 1.0, 2.0]


def test_locations_close_their_store(opens: Opens) -> None:
    with pytest.raises(NoCheckpoint):
        inspection.locate(URL)
    assert opens() == [1]
    save(URL, 1)
    with inspection.locate(URL) as location:
        assert [row.step for row in inspection.summaries(location)] == [1]
        assert opens() == [1, 1, 0]
    with pytest.raises(NoCheckpoint):
        inspection.locate(f"{URL}/step-000000002")
    assert _healthy_steps(URL) == [1]
    assert opens() == [1] * 5


@pytest.mark.parametrize(
    ("verb", "code"), [("ls", 0), ("show", 0), ("verify", 0), ("gc", 0), ("push", 0), ("push --step 7", 2), ("gc", 2)]
)
def test_commands_close_what_they_open(verb: str, code: int, opens: Opens, tmp_path: Path) -> None:
    save(URL, 1)
    before = len(opens())
    name, *options = verb.split()
    target = [str(tmp_path / "copy")] if name == "push" else []
    name = "pull" if name == "push" else name
    url = f"{URL}/step-000000001" if (name, code) == ("gc", 2) else URL
    assert main(["ckpt", name, url, *target, *options]) == code
    assert opens()[before:] == [1]


@pytest.mark.parametrize("is_target", [False, True])
def test_a_copy_closes_both_stores(is_target: bool, opens: Opens, tmp_path: Path) -> None:
    save(URL if not is_target else f"{tmp_path}/from", 1)
    source, target = (f"{tmp_path}/from", URL) if is_target else (URL, f"{tmp_path}/to")
    assert main(["ckpt", "push" if is_target else "pull", source, target, "--quiet"]) == 0
    assert set(opens()) == {1}


def test_what_is_handed_a_store_leaves_it_open(opens: Opens) -> None:
    store: Any = open_store(URL)
    mine, _ = owner.claim(store, owner_of("a", "a"))
    with Heartbeat(store, mine, None, QUIET, interval_s=0.01):
        until("it beats", lambda: bool(store.list("beat-")))
    assert store.list("beat-") == []
    assert opens() == [0]


def test_a_heartbeat_has_no_thread_before_its_start(memory_url: str) -> None:
    store, before = open_store(memory_url), heartbeats()
    mine, _ = owner.claim(store, owner_of("a", "a"))
    beats = Heartbeat(store, mine, None, QUIET, interval_s=0.01)
    assert not heartbeats() - before
    beats.close()  # nothing to end
    with contextlib.closing(Heartbeat(store, mine, None, QUIET, interval_s=0.01).start()):
        assert heartbeats() - before
    assert not heartbeats() - before


def test_a_bucket_that_is_closed_keeps_no_thread_and_no_connection(make_url: Callable[[str], str]) -> None:
    with open_store(make_url("juicefs") + "&part_size_mib=5") as store:
        assert isinstance(store, S3Store)
        store.put("k", [bytes(11 << 20)])
        brisk = store.impatient(5.0)
        assert isinstance(brisk, RetryingStore)
        assert brisk.read("k")[:3] == bytes(3)
        assert store.list("")
        pools = [store._bucket._connections, store._bucket._client._connections, brisk._store._connections]  # type: ignore[attr-defined]
        assert all(pool._idle._connections for pool in pools)
        brisk.close()
        assert all(pool._idle._connections for pool in pools), "it goes with the store that it is of"
        assert store._pool._threads
    assert not any(pool._idle._connections for pool in pools)
    assert not any(thread.is_alive() for thread in store._pool._threads)
    assert brisk.read("k")[:3] == bytes(3), "what was late still has its answer"
    assert not any(pool._idle._connections for pool in pools), "and leaves nothing open"


def test_a_store_is_closed_after_an_error(opens: Opens) -> None:
    with pytest.raises(UsageError), open_store(URL):
        raise UsageError("x")
    assert opens() == [1]
