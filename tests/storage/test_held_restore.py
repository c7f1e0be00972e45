"""Restores from the memory of nodes: the newest state, the nearest good bytes, and never a wrong one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from storage.errors import Corrupt, NotFound, Transient
from storage.events import Reporter
from storage.format.manifest import ItemTable
from storage.format.sealed import seal
from storage.held.inventory import HeldObject, HeldPart
from storage.held.nearest import NearestStore, Nearness, Places, Reach
from storage.held.node_memory import NodeMemory
from storage.held.own_memory import OwnPart, PartMap, PlacedObject
from storage.stores.memory import MemoryStore
from storage.stores.objects import ObjectStore
from storage.stores.wrapper import StoreWrapper
from tests.storage.held_cases import (
    SIZE_BYTES,
    Seen,
    Staged,
    Told,
    add,
    check,
    damaged,
    in_shared_memory,
    nodes,
    of,
    restore,
    store_with,
)


class Away(StoreWrapper):
    """A store that does not answer."""

    def folders(self, prefix: str) -> list[str]:
        raise Transient("nobody listens")

    read = read_into = info = list = folders  # type: ignore[assignment]

    def impatient(self, timeout_s: float) -> ObjectStore:
        return self


def test_a_whole_state_in_memory_that_is_newer_than_the_stores_is_taken() -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        staged = Staged(20)
        add(a, staged, 0)
        add(b, staged, 1)
        check(20, restore(store_with(10), Seen([a, b]), told))
    (fields,) = of(told, "restored")
    assert fields["from_own"] > SIZE_BYTES / 2 < fields["from_peer"]
    assert (fields["attempt"], "from_store" in fields) == (staged.id, False)
    assert [name for name, _ in told] == ["restored"]


@pytest.mark.parametrize("has_mine", [True, False], ids=["half of it held", "another attempt"])
def test_a_newer_checkpoint_of_the_store_is_taken(has_mine: bool) -> None:
    told: Told = []
    with nodes(["a"]) as (a,):
        add(a, Staged(20), 0, 1)
        if has_mine:
            add(a, Staged(40), 0)
        check(30, restore(store_with(10, 30), Seen([a]), told))
    assert [name for name, _ in told] == (["checkpoint_held_in_part"] if has_mine else []) + ["restored"]
    assert "from_own" not in of(told, "restored")[0]


def test_a_state_of_an_earlier_generation_than_the_stores_newest_is_not_gone_back_to() -> None:
    with nodes(["a"]) as (a,):
        add(a, Staged(50, generation=2), 0, 1)
        check(30, restore(store_with(30, generation=3), Seen([a]), []))
        check(50, restore(store_with(30, generation=2), Seen([a]), []))


def test_bytes_of_a_stored_checkpoint_come_from_memory_where_that_very_attempt_is_held() -> None:
    store, told = store_with(10, 30), Told()
    (name,) = [key for key in store._objects if key.startswith("step-000000030/attempt-") and "manifest" in key]
    staged = Staged(30, world_size=1, id=name.split("/")[1].removeprefix("attempt-"))
    with nodes(["a"]) as (a,):
        part = staged.part(0)
        objects = {
            key.removeprefix("step-000000030/"): HeldObject([data])
            for key, (data, _) in store._objects.items()
            if key.startswith("step-000000030/") and key.endswith(".distcp")
        }
        a.add(HeldPart(part.papers, objects))
        check(30, restore(store, Seen([a]), told))
    (fields,) = of(told, "restored")
    assert fields["from_own"] > SIZE_BYTES
    assert "from_store" not in fields


@pytest.mark.parametrize("num_here", [1, 64], ids=["by threads", "by one"])
def test_a_damaged_slot_is_told_and_the_peers_copy_is_read_instead(num_here: int) -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        staged = Staged(20)
        add(a, staged, 0, 1, change=damaged)
        add(b, staged, 0, 1)
        check(20, restore(store_with(10), Seen([a, b], num_here=num_here), told))
    failed = of(told, "checkpoint_source_failed")
    assert {(row["node"], row["tier"], row["step"]) for row in failed} == {("a", "own", 20)}
    assert all("checksum at byte" in row["reason"] for row in failed)
    assert of(told, "restored")[0]["from_peer"] > SIZE_BYTES


@pytest.mark.parametrize(
    ("nearness", "num_here", "num"),
    [(Nearness.OWN, 1, 4), (Nearness.OWN, 3, 2), (Nearness.OWN, 64, 1), (Nearness.PEER, 64, 4)],
)
def test_ranks_of_a_host_share_its_processors_where_nobody_waits(
    nearness: Nearness, num_here: int, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    holders = {("deadbeef", 0): [SimpleNamespace(nearness=nearness)]}
    reach = Reach(is_stored=False, num_ranks_here=num_here)
    store = NearestStore(store_with(), "s/", holders, Places(), lambda *_: None, reach)
    assert store.num_readers("s/attempt-deadbeef/__0_0.distcp") == num
    assert store.num_readers("s/attempt-deadbeef/__1_0.distcp") is None


def test_where_every_copy_is_damaged_the_state_before_is_taken_and_then_the_stores() -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        older, newer = Staged(20), Staged(30)
        for node in (a, b):
            add(node, older, 0, 1)
            add(node, newer, 0, change=damaged)
            add(node, newer, 1)
        check(20, restore(store_with(10), Seen([a, b]), told))
        assert {row["node"] for row in of(told, "checkpoint_source_failed")} == {"a", "b"}
        for node in (a, b):
            add(node, older, 0, 1, change=damaged)
        check(10, restore(store_with(10), Seen([a, b]), told))


def test_of_replicas_what_is_damaged_in_one_is_read_from_another() -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        staged = Staged(20, is_all=True)
        add(a, staged, 0, change=damaged)
        add(b, staged, 1)
        check(20, restore(store_with(10), Seen([a, b]), told))
        assert {row["node"] for row in of(told, "checkpoint_source_failed")} == {"a"}
        check(20, restore(store_with(10), Seen([b]), []))  # its node is gone: the other replica is all of it


def odd(part: HeldPart) -> HeldPart:
    """The part with another tensor, of which all checksums are right: as a rank stages it whose memory is at fault."""
    other = Staged(21, 3, is_all=True, id=part.label.attempt).part(part.label.rank)
    items = [item for item in other.papers.receipt.items.rows() if item.key == "w"]
    kept = [item for item in part.papers.receipt.items.rows() if item.key != "w"]
    assert [item.length for item in items] == [i.length for i in part.papers.receipt.items.rows() if i.key == "w"]
    receipt = part.papers.receipt.model_copy(update={"items": ItemTable.of([*items, *kept])})
    assert other.label.size_bytes == part.label.size_bytes
    data = {name: bytearray(b"".join(held.pieces)) for name, held in part.objects.items()}
    for item in items:
        entry = receipt.objects[item.object].name
        data[entry][item.offset : item.offset + item.length] = b"".join(
            other.objects[entry].views(item.offset, item.length)
        )
    return HeldPart(
        part.papers.model_copy(update={"receipt": receipt}), {name: HeldObject([held]) for name, held in data.items()}
    )


@pytest.mark.parametrize("at", [0, 2])
def test_of_three_replicas_what_one_holds_differently_is_not_taken(at: int) -> None:
    told: Told = []
    with nodes(["a", "b", "c"]) as found:
        staged = Staged(20, 3, is_all=True)
        for rank, node in enumerate(found):
            add(node, staged, rank, change=odd if rank == at else lambda part: part)
        check(20, restore(store_with(10), Seen(found), told, world_size=3), world_size=3)
    (fields,) = of(told, "checkpoint_replica_differs")
    others = [rank for rank in range(3) if rank != at]
    assert (fields["on_rank"], fields["host"], fields["name"]) == (at, f"host-{'abc'[at]}", "w")
    assert (fields["others"], fields["healed"], fields["step"]) == (others, True, 20)


@pytest.mark.parametrize("compares", [False, True])
def test_of_two_replicas_that_differ_nobody_knows_who_is_right(compares: bool) -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        staged = Staged(20, 3, is_all=True)
        add(a, staged, 0)
        add(b, staged, 1, change=odd)
        seen = Seen([a, b], compares=compares)
        step, _ = restore(store_with(10, world_size=3), seen, told, world_size=3)
    assert step == (10 if compares else 20)
    assert [row["healed"] for row in of(told, "checkpoint_replica_differs")] == [False] * compares
    assert ["differently" in row["reason"] for row in of(told, "checkpoint_held_in_part")] == [True] * compares


def test_replicas_of_two_steps_make_no_state() -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        add(a, Staged(20), 0)
        add(b, Staged(21), 1)
        check(10, restore(store_with(10), Seen([a, b]), told))
    assert [fields["step"] for fields in of(told, "checkpoint_held_in_part")] == [21, 20]


class Standing(Seen):
    """Nodes that store nothing while their memory is read, and a save that one of them still has to store."""

    def __init__(self, store: MemoryStore, nodes: Sequence[NodeMemory]) -> None:
        super().__init__(nodes)
        self._stored = store_with(30)
        self._store = store
        self.told: list[str] = []
        self.adopted_step = 30

    def make_way(self, report: Reporter) -> None:
        self.told.append("make way")

    def way_free(self, report: Reporter, after_s: float = 0.0) -> None:
        self.told.append("way free after the first step" if after_s else "way free")

    def await_look(self) -> None:
        pass

    def settle(self) -> None:
        """As `Adopted`: the save is stored."""
        self.told.append("settle")
        self.adopted_step = -1
        for info in self._stored.list("step-"):
            self._store.put(info.key, [self._stored.read(info.key)])


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_is_still_stored_is_not_waited_for_while_it_stands_still_for_the_same_restore(is_damaged: bool) -> None:
    store = store_with(10)
    with nodes(["a"]) as (a,):
        add(a, Staged(20), 0, 1)
        memory = Standing(store, [a])
        if is_damaged:  # which is found while all stands still
            add(a, Staged(40), 0, 1, change=damaged)
        check(30, restore(store, memory, [], adopted=memory))
    assert memory.told == ["make way"] * is_damaged + ["way free", "settle", "way free after the first step"]


def test_a_node_that_goes_while_it_is_read_from_costs_only_its_bytes() -> None:
    told: Told = []
    with nodes(["a", "b", "c"]) as (a, b, c):
        staged = Staged(20)
        add(a, staged, 0)
        for node in (b, c):
            add(node, staged, 1)
        seen = Seen([a, b, c])
        tier = seen.open(None)  # type: ignore[arg-type]
        seen.open = lambda report: tier  # type: ignore[method-assign]
        b.close()
        check(20, restore(store_with(10), seen, told))
    assert {row["node"] for row in of(told, "checkpoint_source_failed")} == {"b"}


def test_the_store_is_not_waited_for_where_memory_has_a_state() -> None:
    told: Told = []
    with nodes(["a"]) as (a,):
        add(a, Staged(20), 0, 1)
        check(20, restore(Away(store_with(10)), Seen([a]), told))
        assert "nobody listens" in of(told, "checkpoint_store_unasked")[0]["reason"]
        a.drop(None, "for the test")
        with pytest.raises(Transient):
            restore(Away(store_with(10)), Seen([a]), told)


def test_an_unhealthy_state_in_memory_is_passed_over() -> None:
    with nodes(["a"]) as (a,):
        add(a, Staged(20, healthy=False), 0, 1)
        check(10, restore(store_with(10), Seen([a]), []))
        check(20, restore(store_with(10), Seen([a]), [], unhealthy=True))


def test_a_state_that_turns_out_bad_soon_is_dropped_with_all_in_memory_and_the_stores_is_taken() -> None:
    told: Told = []
    store = store_with(10)
    with nodes(["a"], told) as (a,):
        add(a, Staged(20), 0, 1)
        check(20, restore(store, Seen([a]), []))
        add(a, Staged(21, generation=2, healthy=False), 0, 1)
        check(10, restore(store, Seen([a]), []))
        (fields,) = of(told, "checkpoint_distrusted")
        assert (fields["steps"], "step 20, restored from memory" in fields["reason"]) == ([20, 21], True)
        add(a, Staged(11, generation=3), 0, 1)
        check(11, restore(store, Seen([a]), []))  # once: what is staged from then on is trusted again


def test_a_state_that_is_gone_on_from_in_vain_three_times_is_dropped() -> None:
    told: Told = []
    store = store_with(10)
    with nodes(["a"], told) as (a,):
        add(a, Staged(20), 0, 1)
        assert [restore(store, Seen([a]), [])[0] for _ in range(5)] == [20, 20, 20, 10, 10]
    assert of(told, "checkpoint_distrusted")[0]["steps"] == [20]


def test_a_state_in_memory_is_kept_where_the_store_has_nothing() -> None:
    with nodes(["a"]) as (a,):
        add(a, Staged(20), 0, 1)
        assert [restore(store_with(), Seen([a]), [])[0] for _ in range(5)] == [20] * 5


def test_memory_of_this_node_is_read_by_descriptor_and_what_is_overwritten_there_meanwhile_is_found() -> None:
    told: Told = []
    with nodes(["a", "b"]) as (a, b):
        staged = Staged(20)
        parts = [in_shared_memory(staged.part(rank)) for rank in (0, 1)]
        for part in parts:
            a.add(part)
        add(b, staged, 0, 1)
        a._server.close()  # nothing of it is read by its socket but the papers, which b has as well
        check(20, restore(store_with(10), Seen([a, b], local=a), told))
        assert of(told, "restored")[0]["from_own"] > SIZE_BYTES
        parts[1].memories[0].memory[100] ^= 255
        told.clear()
        check(20, restore(store_with(10), Seen([a, b], local=a), told))
        fields = of(told, "restored")[0]
        assert fields["from_own"] > SIZE_BYTES / 2 < fields["from_peer"]
        assert any("checksum at byte" in row["reason"] for row in of(told, "checkpoint_source_failed"))


def test_descriptors_do_not_pile_up_and_a_map_of_nonsense_is_refused() -> None:
    part = in_shared_memory(Staged(20).part(0))
    with nodes(["a"]) as (a,):
        a.add(part)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            OwnPart(a.descriptors(part.key))
        import gc

        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        others = a.descriptors(part.key)
        with pytest.raises(Corrupt):
            OwnPart(others[::-1])
        assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.parametrize(
    ("memory", "offset", "length"), [(0, 0, 9), (1, 4090, 7), (2, 0, 1), (-1, 0, 1), (1, 0, 1 << 40)]
)
def test_a_list_that_reaches_out_of_its_memory_is_refused(memory: int, offset: int, length: int) -> None:
    def descriptors(memory: int, offset: int, length: int) -> list[int]:
        of, at, size = (np.array([number]) for number in (memory, offset, length))
        placed = PlacedObject.model_construct(name="x", memory=of, offset=at, length=size)
        document = seal("pieces", PartMap.model_construct(objects=(placed,), inline_bytes=8))
        found = [os.memfd_create("pieces"), os.memfd_create("memory")]
        os.write(found[0], len(document).to_bytes(8, "little") + document + b"inlined!")
        os.truncate(found[1], 4096)
        return found

    own = OwnPart(descriptors(0, 0, 8))
    data = bytearray(8)
    own.read_into("x", 0, [memoryview(data)])
    own.close()
    assert data == b"inlined!"
    with pytest.raises(Corrupt):
        OwnPart(descriptors(memory, offset, length))


def read_all(own: OwnPart, part: HeldPart) -> None:
    for name, held in part.objects.items():
        own.read_into(name, 0, [memoryview(bytearray(held.size_bytes))])


def test_memory_that_its_holder_makes_shorter_is_a_source_that_fails() -> None:
    part = in_shared_memory(Staged(20).part(0))
    with nodes(["a"]) as (a,):
        a.add(part)
        descriptors = a.descriptors(part.key)
        own = OwnPart(descriptors)
        for name, held in part.objects.items():
            whole = bytearray(held.size_bytes)
            halves = memoryview(whole)[: held.size_bytes // 3], memoryview(whole)[held.size_bytes // 3 :]
            own.read_into(name, 0, halves[:1])
            own.read_into(name, halves[0].nbytes, halves[1:])
            assert whole == b"".join(held.pieces)
            with pytest.raises(NotFound):
                own.read_into(name, 1, halves)
        os.ftruncate(descriptors[0], 8)
        with pytest.raises(NotFound, match="shorter"):
            read_all(own, part)
        own.close()
