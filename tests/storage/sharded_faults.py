"""What the ranks of `test_sharded` do while something fails on one of them; functions by name, as there."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from storage import Checkpointer, JobIdentity, ShardReader, open_store, register_scheme
from storage.errors import Fenced, StorageError, Transient
from storage.format.layout import is_heartbeat_name
from storage.run import owner
from storage.stores.local import LocalStore
from storage.stores.objects import ObjectInfo
from tests.cluster import until


class Failing(LocalStore):
    """Fails to put what `fails` says."""

    fails: Callable[[str], bool] = staticmethod(lambda key: False)

    def put(self, key: str, buffers: Sequence[Any], *, if_absent: bool = False) -> ObjectInfo:
        if self.fails(key):
            raise Transient("no more space")
        return super().put(key, buffers, if_absent=if_absent)


def fail_on_one_rank(folder: str, victim: int, where: str) -> list[tuple[str, dict[str, Any]]]:
    """A save that fails on rank `victim`, then one that does not; the events of this rank."""
    events: list[tuple[str, dict[str, Any]]] = []
    store = Failing(folder)
    register_scheme("failing", lambda rest: store)
    state = rows(1)
    with Checkpointer("failing://", on_event=lambda name, fields: events.append((name, fields)), timeout_s=20) as ckpt:
        if dist.get_rank() == victim:
            store.fails = lambda key: where in key  # type: ignore[method-assign]
        ckpt.save(1, state, wait=True)
        assert not ckpt.wait()
        store.fails = lambda key: False  # type: ignore[method-assign]
        assert ckpt.restore(rows(0)) == 0
        ckpt.save(2, state, wait=True)
        assert ckpt.wait()
    return events


def rows(number: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": distribute_tensor(torch.full((8, 5000), float(number)), mesh, [Shard(0)]), "n": number}


def mistake_on_one_rank(folder: str) -> list[str]:
    """Errors that only rank 1 can see; what every rank raises."""
    messages = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except StorageError as error:
            messages.append(f"{type(error).__name__}: {error}")

    odd = dist.get_rank() == 1
    with Checkpointer(folder) as ckpt:
        attempt(lambda: ckpt.save(1, {**rows(1), "extra": (lambda: 0) if odd else 0}))
        attempt(lambda: ckpt.save(1, {**rows(1), "only": torch.ones(2 + dist.get_rank())}))
        ckpt.save(1, rows(1), wait=True)
        attempt(lambda: ckpt.restore({**rows(0), **({"other": 1} if odd else {})}))
    return messages


def fall_back(folder: str) -> tuple[int, int, list[str]]:
    """Restore a run whose newest checkpoint only one rank can find damaged: step, value, events of this rank."""
    names: list[str] = []
    state = rows(0)
    with Checkpointer(folder, on_event=lambda name, fields: names.append(name)) as ckpt:
        step = ckpt.restore(state)
    whole = state["w"].full_tensor()
    assert (whole == state["n"]).all()
    return step, state["n"], names


def fenced(folder: str) -> list[str]:
    """Two saves after another owner has taken the run over; what the second one raises."""
    messages = []
    with Checkpointer(folder, job=JobIdentity(generation=1, lineage="a")) as ckpt:
        dist.barrier()
        if dist.get_rank() == 0:
            owner.claim(open_store(folder), owner.Owner(lineage="b", generation=0, epoch=0, token="another launch"))
        with contextlib.suppress(Fenced):  # where that was found out already, by a look at the claim
            ckpt.save(1, rows(1), wait=True)
        for step in (2, 3):
            try:
                ckpt.save(step, rows(step))
            except Fenced as error:
                messages.append(str(error))
    return messages


class Hasty(LocalStore):
    """Shows the newest step to rank 0 only: a save has just committed it."""

    def folders(self, prefix: str) -> Sequence[str]:
        found = super().folders(prefix)
        return found if prefix or dist.get_rank() == 0 else found[:-1]


def read_while_saving(folder: str) -> list[int]:
    """What `dcp.load` reads of a run where the ranks see different steps; then what each rank reads alone."""
    register_scheme("hasty", lambda rest: Hasty(folder))
    numbers: list[Any] = []
    for alone in (False, True):
        whole = torch.zeros(8, 5000)
        state: dict[str, Any] = {"w": whole, "n": 0} if alone else rows(0)
        dcp.load(state, storage_reader=ShardReader("hasty://", no_dist=alone), no_dist=alone)
        assert ((whole if alone else state["w"].full_tensor()) == state["n"]).all()
        numbers.append(state["n"])
        dist.barrier()
    return numbers


def not_shared(folder: str) -> str:
    """Open a folder that each rank has for itself; what is raised."""
    try:
        Checkpointer(f"{folder}/{dist.get_rank()}").start().close()
    except StorageError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Silent(LocalStore):
    """Swallows the receipt of rank 1; the coordinator, which then waits for it alone, is the last to write its own."""

    def put(self, key: str, buffers: Sequence[Any], *, if_absent: bool = False) -> ObjectInfo:
        if key.endswith("receipt-000001.json"):
            raise Transient("swallowed")
        if key.endswith("__0_0.distcp"):
            until("the receipt of rank 2", lambda: any("receipt-000002" in info.key for info in self.list("")))
        return super().put(key, buffers, if_absent=if_absent)


def silent_rank(folder: str) -> str:
    """A save of which one rank can tell nobody how it went; the reason of its failure."""
    reasons: list[str] = []
    register_scheme("silent", lambda rest: Silent(folder))
    with Checkpointer(
        "silent://", on_event=lambda _, fields: reasons.append(fields.get("reason", "")), timeout_s=0.5
    ) as c:
        c.save(1, rows(1), wait=True)
        assert not c.wait()
    return reasons[-1]


class BadMemory(LocalStore):
    """Every byte that is read into memory arrives with a flipped bit."""

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        buffers[-1][-1] ^= 1
        return etag


def bad_reader(folder: str) -> str:
    """Restore where rank 1's memory is bad; what is raised."""
    register_scheme("bad-memory", lambda rest: BadMemory(folder))
    with Checkpointer("bad-memory://" if dist.get_rank() == 1 else folder) as ckpt:
        try:
            ckpt.restore(rows(0))
        except StorageError as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


class Unregistered:
    """A class that no safe loader knows."""


def unloadable(folder: str) -> tuple[str, str, list[str]]:
    """Restore a value of a class that was registered for the save only; what is raised by both ways, and events."""
    seen: list[str] = []
    with torch.serialization.safe_globals([Unregistered]), Checkpointer(folder) as ckpt:
        ckpt.save(1, rows(1), wait=True)
        ckpt.save(2, {**rows(2), "value": Unregistered()}, wait=True)
    found = []
    with Checkpointer(folder, on_event=lambda name, fields: seen.append(name)) as ckpt:
        for read in (
            lambda: ckpt.restore({**rows(0), "value": None}),
            lambda: dcp.load({"value": None}, storage_reader=ShardReader(f"{folder}/step-000000002")),
        ):
            try:
                read()
            except (StorageError, dcp.CheckpointException) as error:
                found.append(f"{type(error).__name__}: {error}")
    return found[0], found[1], seen


class Unreachable(LocalStore):
    """Data objects cannot be read."""

    def read_into(self, key: str, *args: Any, **kwargs: Any) -> str:
        raise Transient("unreachable")


def damage_and_outage(folder: str) -> str:
    """Restore where rank 0 finds damage and rank 1 finds the store unreachable; what is raised."""
    register_scheme("unreachable", lambda rest: Unreachable(folder))
    url = "unreachable://" if dist.get_rank() == 1 else folder
    with Checkpointer(url) as ckpt:
        try:
            ckpt.restore(rows(0))
        except StorageError as error:
            return type(error).__name__
    return "nothing"


def save_rows(folder: str, steps: Sequence[int]) -> None:
    with Checkpointer(folder) as ckpt:
        for step in steps:
            ckpt.save(step, rows(step), wait=True)
            assert ckpt.wait()


class Deadly(LocalStore):
    """Counts the changes it makes, and kills its process at one of them: before it, in the middle, or after.

    Beats do not count: they come at any time.
    """

    def __init__(self, root: str, kill_at: int, moment: str) -> None:
        super().__init__(root)
        self.num_changes = 0
        self._kill_at = kill_at
        self._moment = moment
        place = self._files.place

        def place_or_die(temporary: Path, path: Path, *, if_absent: bool) -> None:
            if not is_heartbeat_name(path.name):
                self._die("middle")
            place(temporary, path, if_absent=if_absent)

        self._files.place = place_or_die  # type: ignore[method-assign]

    def _die(self, moment: str) -> None:
        if self.num_changes == self._kill_at and self._moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def put(self, key: str, buffers: Sequence[Any], *, if_absent: bool = False) -> ObjectInfo:
        if is_heartbeat_name(key):
            return super().put(key, buffers, if_absent=if_absent)
        self._die("before")
        info = super().put(key, buffers, if_absent=if_absent)
        self._die("after")
        self.num_changes += 1
        return info

    def delete(self, key: str) -> None:
        if is_heartbeat_name(key):
            super().delete(key)
            return
        self._die("before")
        super().delete(key)
        self._die("after")
        self.num_changes += 1


def save_and_die(folder: str, step: int, victim: int, kill_at: int, moment: str) -> int:
    """Save `step`, keeping only it; rank `victim` kills itself at its change number `kill_at`. Changes made."""
    store = Deadly(folder, kill_at if dist.get_rank() == victim else -1, moment)
    register_scheme("deadly", lambda rest: store)
    with Checkpointer("deadly://", keep=1, job=JobIdentity(lineage="a")) as ckpt:
        ckpt.save(step, rows(step), wait=True)
        assert ckpt.wait()
    return store.num_changes
