"""The commit's round trips, and which of several failures it tells."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage import open_store
from storage.errors import AlreadyExists, Corrupt, Fenced, Transient
from storage.format import layout
from storage.parallel import run_concurrently
from storage.run import catalog, owner
from storage.saving import commit
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectInfo
from tests.storage.commit_cases import ATTEMPT, DATA, FOLDER, MANIFEST, METADATA, STEP, Scripted, built, owner_of, ready
from tests.storage.pausing import ORDERS, abreast
from tests.template import template

in_any_order = pytest.mark.parametrize("order", ORDERS)


# round trips ----------------------------------------------------------------------------------------------------


class Lockstep(MemoryStore):
    """Answers the requests of a round once all of it have come: so none of them can have waited for another's answer.

    `is_looking`: a put that must not overwrite looks first, as where the server does not honour conditions.
    """

    def __init__(self, is_looking: bool) -> None:
        super().__init__("x")
        self._is_looking = is_looking
        self._changed = threading.Condition()
        self._rounds: list[set[str]] = []
        self._missing: set[str] = set()
        self.num_rounds = 0

    def begin(self, rounds: Sequence[set[str]]) -> None:
        """From here on every request has to be one of the round that is under way."""
        self._rounds = [set(names) for names in rounds]
        self._missing = set(self._rounds[0])

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        if if_absent and self._is_looking:
            self._meet(f"info {key}")
        self._meet(f"put {key}")
        return super().put(key, buffers, if_absent=if_absent)

    def read(self, key: str) -> bytes:
        self._meet(f"read {key}")
        return super().read(key)

    def info(self, key: str) -> ObjectInfo:
        self._meet(f"info {key}")
        return super().info(key)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        self._meet(f"list {prefix}")
        return super().list(prefix)

    def _meet(self, request: str) -> None:
        if not self._rounds:
            return
        with self._changed:
            number = self.num_rounds
            assert request in self._missing, f"{request} is not in round {number}, of which {self._missing} lacks"
            self._missing.remove(request)
            if not self._missing:
                self.num_rounds += 1
                self._missing = set(self._rounds[self.num_rounds]) if self.num_rounds < len(self._rounds) else set()
                self._changed.notify_all()
            came = self._changed.wait_for(lambda: self.num_rounds > number, timeout=60)
            assert came, f"{request} waits for {self._missing}, and those for its answer"


@pytest.mark.parametrize("is_copy", [False, True])
@pytest.mark.parametrize(("is_looking", "num_rounds"), [(False, 4), (True, 6)])
def test_a_commit_takes_few_round_trips(is_copy: bool, is_looking: bool, num_rounds: int) -> None:
    store = Lockstep(is_looking)
    manifest, metadata = built()
    claim = ready(store)
    look = set() if is_copy else {"read owner.json"}
    looks = {f"info {METADATA}", f"list {FOLDER}", *look}
    rounds = [{f"info {MANIFEST}", *looks}, {f"put {MANIFEST}"}] if is_looking else [{f"put {MANIFEST}", *looks}]
    rounds += [{f"read {MANIFEST}", f"put {STEP}manifest.json", *look}]
    rounds += [{f"info {METADATA}"}] if is_looking else []
    rounds += [{f"put {METADATA}"}, {f"read {METADATA}", f"list {FOLDER}"}]
    store.begin(rounds)
    commit.publish(store, ATTEMPT, manifest, metadata, None if is_copy else claim)
    assert store.num_rounds == len(rounds) == num_rounds


# which failure is told ------------------------------------------------------------------------------------------


def away() -> None:
    raise Transient("the store is away")


@in_any_order
def test_of_several_failures_the_gravest_is_told(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever comes first. And the copy at the top stays that of whoever has committed."""
    monkeypatch.setattr(commit, "run_concurrently", abreast(order))
    manifest, metadata = built()
    told: list[type[Exception]] = []
    for num_mended in range(4):
        store = Scripted()
        claim = ready(store)
        store.put(STEP + layout.MANIFEST, [b"another's"])
        if num_mended < 1:
            owner.claim(store, owner_of(1))
        if num_mended < 2:
            store.put(METADATA, [b"another's"])
        if num_mended < 3:
            store.delete(DATA)
        store.before[f"put {MANIFEST}"] = away
        with pytest.raises((Fenced, AlreadyExists, Corrupt, Transient)) as caught:
            commit.publish(store, ATTEMPT, manifest, metadata, claim)
        told.append(caught.type)
        assert store.read(STEP + layout.MANIFEST) == b"another's"
        assert (METADATA in {info.key for info in store.list("")}) == (num_mended < 2)
    assert told == [Fenced, AlreadyExists, Corrupt, Transient]


@in_any_order
def test_who_is_superseded_in_the_first_round_commits_nothing(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by one who claims the run after the first look at the owner (forwards)."""
    monkeypatch.setattr(commit, "run_concurrently", abreast(order))
    store, (manifest, metadata) = Scripted(), built()
    claim = ready(store)
    store.before[f"put {MANIFEST}"] = lambda: owner.claim(store, owner_of(1))
    with pytest.raises(Fenced):
        commit.publish(store, ATTEMPT, manifest, metadata, claim)
    assert not catalog.is_checkpoint(store, STEP)


class Late(Scripted):
    """A `.metadata` whose put is answered by an error, and lands when it is read."""

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        if key != METADATA:
            return super().put(key, buffers, if_absent=if_absent)
        data = b"".join(buffers)

        def land() -> None:
            self.delete(DATA)  # by a newer owner, who saw no `.metadata`
            MemoryStore.put(self, METADATA, [data])

        self.before[f"read {METADATA}"] = land
        raise Transient("no answer")


@in_any_order
def test_a_commit_that_lands_late_over_what_is_gone_is_taken_back(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "run_concurrently", abreast(order))
    store, (manifest, metadata) = Late(), built()
    with pytest.raises(Fenced, match=r"has cleaned this attempt up: .* is missing"):
        commit.publish(store, ATTEMPT, manifest, metadata, ready(store))
    assert not catalog.is_checkpoint(store, STEP)


# calls abreast --------------------------------------------------------------------------------------------------


def test_calls_abreast_have_all_ended_and_the_first_in_order_is_told() -> None:
    met, ended = threading.Barrier(3, timeout=60), list[str]()

    def call(name: str, error: BaseException | None) -> str:
        met.wait()
        if name == "slow":
            while len(ended) < 2:
                threading.Event().wait(0.001)
        ended.append(name)
        if error is not None:
            raise error
        return name

    assert run_concurrently([lambda: call("slow", None), lambda: call("b", None), lambda: call("c", None)]) == [
        *("slow", "b", "c")
    ]
    ended.clear()
    threads = set(threading.enumerate())
    with pytest.raises(KeyError):
        run_concurrently([lambda: call("slow", KeyError()), lambda: call("b", ValueError()), lambda: call("c", None)])
    assert sorted(ended) == ["b", "c", "slow"]
    assert not set(threading.enumerate()) - threads


_ENDS = """
import concurrent.futures, gc, sys, threading, time
import torch
from storage import Checkpointer, register_scheme
from storage.stores.local import LocalStore

stored = threading.Event()

class Slow(LocalStore):
    def put(self, key, buffers, *, if_absent=False):
        if "receipt-" in key:
            stored.set()
            pool, deadline_s = concurrent.futures.ThreadPoolExecutor(1), time.monotonic() + 60
            try:
                while time.monotonic() < deadline_s:
                    pool.submit(int)
                    time.sleep(0.01)
            except RuntimeError:
                print("no pool takes calls any more")
        return super().put(key, buffers, if_absent=if_absent)

register_scheme("slow", lambda rest: Slow(sys.argv[1]))
Checkpointer("slow://run").save(1, {"w": torch.ones(4)})
gc.collect()  # it is dropped, so nobody closes it at the end
stored.wait(60)
"""


def test_a_save_whose_checkpointer_was_dropped_outlasts_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_ENDS)
    (run := tmp_path / "run").mkdir()
    found = template().run("python", str(tmp_path / "script.py"), str(run), folder=tmp_path)
    assert (found.returncode, found.stdout) == (0, "no pool takes calls any more\n"), found.stderr
    assert catalog.committed_steps(open_store(str(run))) == [1]
