"""A checkpoint that was found damaged is set aside, and never what has taken its place."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.cli.main import main
from storage import Checkpointer, JobIdentity, open_store, register_scheme
from storage.errors import AlreadyExists, Fenced, StorageError
from storage.run import catalog, owner, quarantine, retention
from storage.run.retention import Removal
from storage.saving import commit
from storage.stores.memory import MemoryStore
from storage.stores.objects import Capability, ObjectInfo, ObjectStore
from storage.stores.wrapper import StoreWrapper
from tests import sample
from tests.storage.pausing import PausingStore, abreast
from tests.storage.small_runs import Events, states

KINDS = ("local", "memory", "juicefs", "moto", sample.rest("fsspec-s3"))
METADATA = "step-000000020/.metadata"
_names = itertools.count()


class Plain(StoreWrapper):
    """A store that cannot remove one version and spare another."""

    def can(self, capability: Capability) -> bool:
        return capability is not Capability.CONDITIONAL_DELETES and super().can(capability)

    delete_version = ObjectStore.delete_version


def state(number: int) -> dict[str, Any]:
    return {"w": torch.full((300,), float(number)), "n": number}


def save(url: str, *steps: int) -> None:
    with Checkpointer(url, job=JobIdentity(lineage="a")) as ckpt:
        for step in steps:
            ckpt.save(step, state(step), wait=True)
            assert ckpt.wait()


def damage(store: ObjectStore, step: int) -> None:
    (key,) = (i.key for i in store.list(f"step-{step:09d}/") if i.key.endswith(".distcp"))
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, [data])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])  # which no command takes
def test_set_aside_and_saved_anew(kind: str, make_url: Callable[[str], str], events: Events) -> None:
    url = make_url(kind)
    save(url, 10, 20)
    store = open_store(url)
    damage(store, 20)
    with Checkpointer(url, job=JobIdentity(lineage="a"), on_event=events[1]) as ckpt:
        assert ckpt.restore(state(0)) == 10
        assert states(url) == [(20, "quarantined"), (10, "committed")]
        assert (catalog.committed_steps(store), catalog.quarantined_steps(store)) == ([10], [20])
        assert ckpt.restore(state(0)) == 10  # nothing is judged twice
        assert [name for name, _ in events[0]].count("checkpoint_quarantined") == 1
        ckpt.save(20, state(21), wait=True)
        assert ckpt.wait()
        found = state(0)
        assert ckpt.restore(found) == 20
    assert found["n"] == 21
    assert main(["ckpt", "verify", url]) == 0
    assert states(url) == [(20, "committed"), (10, "committed")]


def owned(url: str, generation: int, number: int) -> None:
    """Go on where the run stands, and save step 20 if it is not there."""
    with Checkpointer(url, job=JobIdentity(generation=generation, lineage="a")) as ckpt:
        if ckpt.restore(state(0)) == 10:
            ckpt.save(20, state(number), wait=True)
            assert ckpt.wait()


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("plain", "forwards"),
        ("conditional", "backwards"),
        *(sample.rest(kind, "at once") for kind in ("conditional", "plain")),
        *(sample.rest(*case) for case in (("conditional", "forwards"), ("plain", "backwards"))),
    ],
)
def test_a_restorer_that_is_paused_anywhere_spares_what_a_newer_owner_has_saved(
    kind: str, order: str, memory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "run_concurrently", abreast(order))
    wrap: Callable[[Any], Any] = Plain if kind == "plain" else lambda store: store
    seen = set()
    for pause_at in itertools.count():
        inner = MemoryStore(f"{memory_url}-{pause_at}")
        scheme = f"quarantine-{next(_names)}"
        register_scheme(scheme, lambda rest, inner=inner: wrap(inner))
        url = f"{scheme}://run"
        save(url, 10, 20)
        damage(inner, 20)
        store = PausingStore(inner, pause_at, lambda url=url: owned(url, 2, 22))
        register_scheme("paused", lambda rest, store=store: wrap(store))
        with (
            contextlib.suppress(StorageError),
            Checkpointer("paused://", job=JobIdentity(generation=1, lineage="a")) as old,
        ):
            if old.restore(state(0)) == 10:
                old.save(20, state(21), wait=True)
        print(f"paused before call {pause_at}: {store.paused_before}")
        if not store.paused_before:
            break
        seen.add(store.paused_before)
        found = state(0)
        with Checkpointer(url, job=JobIdentity(generation=3, lineage="a")) as newest:
            step = newest.restore(found)
        assert (found["w"] == found["n"]).all()
        # the newer owner has saved step 20, or has found the older one's
        assert (step, found["n"]) in ((20, 22), (20, 21)), store.paused_before
        if store.paused_before.startswith(("put step-000000020/quarantined-", "delete_version")):
            assert found["n"] == 22
    assert {f"read {METADATA}", f"info {METADATA}"} <= seen
    assert any("put step-000000020/quarantined-" in call for call in seen)
    assert (f"delete_version {METADATA}" in seen) == (kind == "conditional")


@pytest.mark.parametrize("kind", KINDS)
def test_a_judgement_of_an_older_version_sets_nothing_aside(kind: str, make_url: Callable[[str], str]) -> None:
    url = make_url(kind)
    save(url, 20)
    store = open_store(url)
    judged = store.info(METADATA)
    damage(store, 20)
    assert quarantine.set_aside(store, judged)
    owner.claim(store, owner.Owner(lineage="a", generation=0, epoch=0, token="b" * 32))
    with Checkpointer(url, job=JobIdentity(lineage="a")) as ckpt:
        ckpt.save(20, state(21), wait=True)
        assert ckpt.wait()
    assert not quarantine.set_aside(store, judged)
    assert states(url) == [(20, "committed")]


class Late(MemoryStore):
    """Lets a newer `.metadata` in right before the version that was looked at is removed."""

    newer: bytes | None = None

    def delete_version(self, key: str, etag: str) -> bool:
        if self.newer is not None:
            self.put(key, [self.newer])
        return super().delete_version(key, etag)


def test_old_checkpoints_go_and_nothing_that_came_since() -> None:
    store = Late("x")
    for key in ("step-000000010/.metadata", "step-000000010/attempt-aaaaaaaa/__0_0.distcp"):
        store.put(key, [b"old"])
    (seen,) = retention.observe(store)
    store.put("step-000000010/attempt-bbbbbbbb/__0_0.distcp", [b"of a newer owner"])
    store.newer = b"newer"
    retention.remove(store, Removal(10, None), seen)
    assert store.read("step-000000010/.metadata") == b"newer"
    assert len(store.list("step-000000010/")) == 3
    retention.remove(store, Removal(10, None), seen)  # looked at again, it is another one
    assert len(store.list("step-000000010/")) == 3
    store.newer = None
    store.put("step-000000010/.metadata", [b"old"])
    retention.remove(store, Removal(10, None), seen)
    assert [info.key for info in store.list("")] == ["step-000000010/attempt-bbbbbbbb/__0_0.distcp"]


@pytest.mark.parametrize("plain", [False, True])
def test_a_good_copy_mends_what_was_set_aside(tmp_path: Path, plain: bool, capsys: pytest.CaptureFixture[str]) -> None:
    save(f"{tmp_path}/run", 10, 20)
    inner = MemoryStore("x")
    scheme = f"quarantine-{next(_names)}"
    register_scheme(scheme, lambda rest: Plain(inner) if plain else inner)
    url = f"{scheme}://run"
    assert main(["ckpt", "push", f"{tmp_path}/run", url]) == 0
    damage(inner, 20)
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state(0)) == 10
    assert states(url)[0] == (20, "quarantined")
    capsys.readouterr()
    assert main(["ckpt", "push", f"{tmp_path}/run", url]) == 0
    assert "step-000000020: copied" in capsys.readouterr().out
    assert states(url)[0] == (20, "committed")
    assert main(["ckpt", "verify", url]) == 0


def owner_of(generation: int) -> owner.Owner:
    return owner.Owner(lineage="a", generation=generation, epoch=0, token=f"token-{generation}")


class Overtaken(MemoryStore):
    """Somebody acts right after it was looked up what is set aside."""

    meanwhile: Callable[[], object] | None = None

    def info(self, key: str) -> ObjectInfo:
        found = super().info(key)
        if "quarantined-" in key and self.meanwhile is not None:
            self.meanwhile()
        return found


@pytest.mark.parametrize("is_claimed_only", [False, True])
def test_a_late_owner_replaces_nothing_that_a_newer_one_has_committed(is_claimed_only: bool) -> None:
    """Where one version cannot be removed alone, a `.metadata` set aside is replaced by a put without condition."""
    store = Overtaken("x")
    plain = Plain(store)
    store.put(METADATA, [b"damaged"])
    assert quarantine.set_aside(plain, store.info(METADATA))
    mine = owner.Claim(plain, owner.claim(store, owner_of(0))[0])

    def overtake() -> None:
        owner.claim(store, owner_of(1))
        if not is_claimed_only:
            store.put(METADATA, [b"newer"])

    store.meanwhile = overtake
    with pytest.raises(Fenced):
        commit.put_metadata(plain, "step-000000020/", b"older", mine)
    assert store.read(METADATA) == (b"damaged" if is_claimed_only else b"newer")


def test_a_late_copy_replaces_nothing_that_was_committed_meanwhile() -> None:
    store = Overtaken("x")
    plain = Plain(store)
    store.put(METADATA, [b"damaged"])
    assert quarantine.set_aside(plain, store.info(METADATA))
    store.meanwhile = lambda: store.put(METADATA, [b"newer"])
    with pytest.raises(AlreadyExists):
        commit.put_metadata(plain, "step-000000020/", b"a copy")
    assert store.read(METADATA) == b"newer"
