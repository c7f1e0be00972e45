"""The store on objects: what it asks of them, what is refused, and leases judged by what is seen."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cli.main import main
from elastic_moe.register import StoreRegister, open_register
from launcher.errors import Compacted, KVUnavailable, UsageError
from launcher.kv import Prefixed
from launcher.kv.bucket.beat import beat_name
from launcher.kv.bucket.client import LOCAL_PACE, REMOTE_PACE, BucketKV
from launcher.kv.bucket.journal import KEPT_VERSIONS, Journal
from launcher.kv.bucket.judge import Judge
from launcher.kv.bucket.ops import PutKey
from launcher.kv.bucket.register import Pause, Steps, answer
from launcher.kv.bucket.version import LOG, TOMBSTONE, version_name
from launcher.kv.lease import Lease
from storage import Capability
from storage.stores.memory import MemoryStore
from tests.cluster import until
from tests.launcher.stores import CountedRegister
from tests.storage.refused_calls import refuse

# --- a client on a store


@pytest.fixture
def register() -> CountedRegister:
    return CountedRegister(StoreRegister(MemoryStore(uuid.uuid4().hex)))


def run(steps: Steps[Any], register: CountedRegister) -> None:
    with contextlib.suppress(StopIteration):
        request = next(steps)
        while True:
            request = steps.send(None if isinstance(request, Pause) else answer(register, request))


def kv_on(register: CountedRegister) -> contextlib.closing[BucketKV]:
    return contextlib.closing(BucketKV(register, dataclasses.replace(LOCAL_PACE, slow_s=0.05)))


def test_old_versions_are_buried_and_late_readers_jump(register: CountedRegister) -> None:
    with kv_on(register) as writer, kv_on(register) as reader:
        assert reader.get("k") is None
        watch = writer.watch("", 1)
        for number in range(KEPT_VERSIONS + 20):
            writer.put("k", b"%d" % number)
        deadline = itertools.count()
        while register.read(version_name(10)) != TOMBSTONE:
            assert next(deadline) < 1000
            watch.next(0.01)
        entry = reader.get("k")
        assert entry is not None
        assert entry.value == b"%d" % (KEPT_VERSIONS + 19)
        with pytest.raises(Compacted):
            reader.watch("", 2).next(0.1)
        past = reader.watch("", entry.revision - 50).next(1)
        assert [event.revision for event in past] == list(range(entry.revision - 50, entry.revision + 1))


def test_a_quiet_client_asks_little(register: CountedRegister) -> None:
    """Two nodes that only wait: requests are bounded by the pace, and none depends on how much was written before."""
    # Leases that no stall of this process ends, renewed and looked at as often as those of 4 s.
    pace = dataclasses.replace(REMOTE_PACE, slows_down=2.0, renewals_per_ttl=30, checks_per_ttl=30)
    with contextlib.closing(BucketKV(register, pace)) as first, contextlib.closing(BucketKV(register, pace)) as second:
        leases = [first.lease(40.0), second.lease(40.0)]
        for kv, lease in zip((first, second), leases, strict=True):
            kv.put(f"n/{lease.lease_id}", b"node", lease=lease)
        revision = second.list("").revision
        watches = [first.watch("n/", revision + 1), second.watch("n/", revision + 1)]
        until("both are quiet", lambda: time.monotonic() > max(first._news_s, second._news_s) + 2.0)

        def ask_little() -> bool:
            before, began_s = register.count, time.monotonic()
            for _ in range(2):
                for watch in watches:
                    assert watch.next(1.0) == ()
            return register.count - before <= 2 * (2.0 * (time.monotonic() - began_s) + 1)

        # What a stall has put off comes after it.
        until("they ask no more than two requests a node and second", ask_little)
        assert not any(lease.lost.is_set() for lease in leases)


def test_what_a_client_knows_it_tells_with_no_request(register: CountedRegister) -> None:
    """A node that has just registered knows of all who did: it follows them from there."""
    with contextlib.closing(BucketKV(register, REMOTE_PACE)) as first, contextlib.closing(BucketKV(register)) as second:
        assert first.put("n/a", b"") is not None
        before = register.count
        assert [entry.key for entry in first.known("n/").entries] == ["n/a"]
        assert register.count == before
        assert [entry.key for entry in Prefixed(second, "n/").known("").entries] == ["a"], "it asks before it tells"


def test_who_has_just_come_looks_at_nobodys_lease(register: CountedRegister) -> None:
    """Nobody can be found silent yet, and many come at once."""
    with kv_on(register) as holder, kv_on(register) as other:
        assert holder.put("k", b"v", lease=holder.lease(600.0)) is not None
        assert other.put("l", b"v", lease=other.lease(600.0)) is not None
        until("both have leases in mind", lambda: holder._next_judging_s and other._next_judging_s)
    assert [name for name in register.num_read if name.startswith("beat/")] == []


def test_what_is_no_version_is_told(register: CountedRegister) -> None:
    register.write(version_name(1), b"<html>a captive portal</html>")
    with kv_on(register) as kv, pytest.raises(KVUnavailable, match="log/0000000000000001 is no version of a store"):
        kv.get("a")


class Unconditional(MemoryStore):
    def can(self, capability: Capability) -> bool:
        return False


def test_a_store_that_lets_two_writers_through_is_refused() -> None:
    with pytest.raises(UsageError, match="honours no conditional puts") as caught:
        StoreRegister(Unconditional("unconditional")).check()
    assert "\n" not in str(caught.value)


def test_a_folder_whose_locks_may_be_each_hosts_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket that is mounted as a folder, say: two hosts would each create the next version."""
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    with pytest.raises(UsageError, match="has no hard links"):
        open_register(str(tmp_path))


@pytest.mark.parametrize("url", ["nowhere://bucket/x", "/proc/no/such/folder", "s3://"])
def test_an_endpoint_that_is_no_store_is_told_in_one_line(url: str) -> None:
    with pytest.raises(UsageError, match="--rdzv-endpoint") as caught:
        open_register(url).check()
    assert "\n" not in str(caught.value)


# --- leases


def judged(judge: Judge, leases: dict[int, float], own: list[int], beats: dict[int, bytes], now_s: float) -> list[int]:
    looked = judge.begin(leases, own, now_s)
    for lease_id in looked:
        judge.note(lease_id, beats.get(lease_id), now_s, now_s)
    return judge.ended(leases, looked)


def test_a_lease_ends_only_after_its_ttl_without_a_change() -> None:
    judge, leases = Judge(), {1: 4.0, 2: 4.0}
    for now_s in range(10):
        assert judged(judge, leases, [2], {1: b"%d" % now_s}, float(now_s)) == []
    ended = [now_s for now_s in range(10, 20) if judged(judge, leases, [2], {1: b"9"}, float(now_s))]
    assert ended == [14, 15, 16, 17, 18, 19]


def test_one_that_is_silent_is_looked_at_when_its_lease_is_over() -> None:
    judge, leases = Judge(), {1: 4.0, 2: 4.0}
    judged(judge, leases, [2], {1: b"x"}, 0.5)
    assert judge.due_s(leases) == math.inf
    for now_s in (2.4, 3.4):
        judged(judge, leases, [2], {1: b"x"}, now_s)
    assert 4.5 < judge.due_s(leases) < 4.6
    assert judged(judge, leases, [2], {1: b"x"}, judge.due_s(leases)) == [1]


def test_each_looks_at_one_other_and_at_all_while_that_one_is_silent() -> None:
    leases = dict.fromkeys(range(1, 9), 4.0)
    looked = {own: Judge().begin(leases, [own], 0.0) for own in leases}
    assert sorted(seen for (seen,) in looked.values()) == list(leases), "each is looked at by one"
    judge = Judge()
    for now_s in range(3):
        judged(judge, leases, [4], {3: b"same"}, float(now_s))
    assert judge.begin(leases, [4], 3.0) == [3, 2, 1, 8, 7, 6, 5]
    assert Judge().begin(leases, [], 0.0) == [8]


def test_however_long_it_takes_to_look_at_all_only_who_is_silent_ends() -> None:
    """A hundred nodes, of which one is silent; reading all their objects takes a while."""
    leases = dict.fromkeys(range(1, 101), 4.0)
    judge, now_s, ended = Judge(), 0.0, list[tuple[int, float]]()
    for _ in range(12):
        looked = judge.begin(leases, [51], now_s)
        asked_s, now_s = now_s, now_s + (1.5 if len(looked) > 1 else 0.0)
        for lease_id in looked:
            judge.note(lease_id, b"" if lease_id == 50 else b"%f" % now_s, asked_s, now_s)
        ended += [(lease_id, now_s) for lease_id in judge.ended(leases, looked)]
        now_s += 0.2 if len(looked) > 1 else 1.0
    assert {lease_id for lease_id, _ in ended} == {50}
    assert ended[0][1] < 10.0, "not put off because a look took long"


def test_a_judge_that_was_stopped_blames_nobody() -> None:
    judge, leases = Judge(), {1: 4.0, 2: 4.0}
    for now_s in range(3):
        judged(judge, leases, [2], {1: b"x"}, float(now_s))
    assert judged(judge, leases, [2], {1: b"x"}, 600.0) == []
    ended = [now_s for now_s in range(601, 607) if judged(judge, leases, [2], {1: b"x"}, float(now_s))]
    assert ended == [605, 606]


def test_an_old_renewal_that_lands_once_more_after_newer_ones_ends_no_lease() -> None:
    """Found by the simulation: a judge that had looked at others meanwhile saw again what it had seen last."""
    judge, leases = Judge(), {1: 4.0, 2: 4.0, 3: 4.0}
    judge.begin(leases, [2], 0.0)
    judge.note(1, b"39", 0.0, 0.0)
    judge.begin(leases, [2], 4.5)
    judge.note(1, b"39", 4.5, 4.5)
    assert judge.ended(leases, [1]) == []


def kept_for(holder: BucketKV, other: BucketKV, ttl_s: float) -> tuple[Lease, Lease]:
    """A lease of each, after twice that time; anew where this process stood still: no holder lives then."""
    for _ in range(5):
        lease, second = holder.lease(ttl_s), other.lease(ttl_s)
        assert holder.put("k", b"v", lease=lease) is not None
        looks_s, ends_s = [time.monotonic()], lease.deadline_s + ttl_s
        while lease.deadline_s < ends_s and not lease.lost.wait(0.1):
            looks_s.append(time.monotonic())
        looks_s.append(time.monotonic())
        longest_s = max(after - before for before, after in itertools.pairwise(looks_s))
        if longest_s < ttl_s / 3:
            assert not lease.lost.is_set()
            return lease, second
        second.stop()
    pytest.skip(f"this machine stood still for {longest_s:.1f} s, as it did each time")


def test_a_lease_whose_holder_lives_is_never_ended_however_late_a_look_is(register: CountedRegister) -> None:
    with kv_on(register) as holder, kv_on(register) as other:
        lease, second = kept_for(holder, other, 3.0)
        assert other.get("k") is not None
        assert beat_name(lease.lease_id) in register.names("beat/")
        second.revoke()
        assert beat_name(second.lease_id) not in register.names("beat/")


def test_a_renewal_that_came_too_late_is_none(register: CountedRegister, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another may have looked for the last time before it was written, and be about to end the lease."""
    with kv_on(register) as holder:
        lease, was_late = holder.lease(0.4), threading.Event()
        write = register.write

        def late(name: str, content: bytes) -> None:
            if name == beat_name(lease.lease_id) and not was_late.is_set():
                was_late.wait(lease.deadline_s - time.monotonic() + 0.05)
                was_late.set()
            write(name, content)

        monkeypatch.setattr(register, "write", late)
        assert was_late.wait(60)
        assert lease.lost.wait(60)


def test_writers_that_keep_one_from_writing_keep_none_from_renewing(
    register: CountedRegister, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While others are first, again and again, what they wrote is learnt, and a renewal need not wait for the end."""
    with contextlib.closing(BucketKV(register, dataclasses.replace(LOCAL_PACE, slow_s=4.4))) as kv:
        lease, ends_s = kv.lease(4.0), time.monotonic() + 5.5
        assert kv.put("l", b"granted with it", lease=lease) is not None
        rival, create = Journal(lambda: uuid.uuid4().hex), register.create
        unhindered = CountedRegister(register._register)

        def overtaken(name: str, content: bytes) -> bool:
            assert time.monotonic() < lease.deadline_s, "fenced"
            if time.monotonic() < ends_s and name == version_name(kv._journal.number + 1):
                run(rival.change([PutKey("k", b"rival")]), unhindered)
            return create(name, content)

        monkeypatch.setattr(register, "create", overtaken)
        assert kv.put("k", b"mine") is not None
        assert time.monotonic() > ends_s


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "meet"


def test_versions_are_json_that_tells_what_was_done(folder: Path) -> None:
    with contextlib.closing(BucketKV(open_register(str(folder)))) as kv:
        kv.put("a", b"\x00")
    (name,) = (folder / LOG).iterdir()
    told = json.loads(name.read_text())
    assert told["number"] == 1
    assert told["events"] == [
        {"key": "a", "revision": 1, "entry": {"key": "a", "value": "AA==", "revision": 1, "create_revision": 1}}
    ]
    assert name.stat().st_mode & 0o777 == 0o600


def test_run_and_status_name_the_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (
            ["run", "--nnodes", "2", "--rdzv-endpoint", str(tmp_path), "x.py"],
            "--rdzv-id: jobs that share an etcd or a b",
        ),
        (["run", "--nnodes", "2", "--rdzv-backend", "bucket", "x.py"], "--rdzv-endpoint: bucket needs a folder"),
        (["status", "--rdzv-endpoint", str(tmp_path)], "--rdzv-id: needed"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
