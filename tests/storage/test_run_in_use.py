"""Two jobs on one URL: a living one is not disturbed, a dead one is not waited for."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from storage import Access, Checkpointer, JobIdentity, open_store, register_scheme
from storage.errors import Fenced, InUse, Transient
from storage.format import layout
from storage.run import heartbeat, in_use, owner
from storage.run.heartbeat import Heartbeat
from storage.run.in_use import SILENCE_S
from storage.saving.ownership import Ownership
from storage.stores.memory import MemoryStore
from storage.stores.retrying_store import RetryingStore
from tests import sample
from tests.cluster import until
from tests.storage.heartbeat_cases import Time, owner_of
from tests.storage.small_runs import Events

KINDS = ("local", "memory", "juicefs", "moto", "fsspec-s3")


def state(number: int) -> dict[str, Any]:
    return {"w": torch.full((4,), float(number)), "n": number}


def save_steps(ckpt: Checkpointer, *steps: int) -> None:
    """One who has lost the run is told by the second at the latest: sooner if a look at the claim was faster."""
    for step in steps:
        ckpt.save(step, state(step), wait=True)


def beating(url: str, until_s: int = 1000) -> Time:
    """Time in which the owner of the run beats every 5 s."""
    store = open_store(url)

    def each_second(second: int) -> None:
        if second % 5 == 0 and second <= until_s:
            recorded = owner.read_owner(store)
            assert recorded is not None
            heartbeat.write(store, recorded.token, 1000 + second)

    return Time(each_second)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Time], None]:
    """Has Checkpointers wait by that time."""
    await_free = in_use.await_free

    def use(times: Time) -> None:
        patched = functools.partial(await_free, clock=times.clock, sleep=times.sleep)
        monkeypatch.setattr(in_use, "await_free", patched)

    return use


def never(second: int) -> None:
    raise AssertionError("waited, and there was nothing to wait for")


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_job_is_refused_while_the_first_lives(
    kind: str, make_url: Callable[[str], str], use: Callable[[Time], None]
) -> None:
    url = make_url(kind)
    with Checkpointer(url, job=JobIdentity(lineage="a", generation=4, run_id="first")) as first:
        first.save(1, state(1), wait=True)
        times = beating(url)
        use(times)
        with pytest.raises(InUse, match=r"is in use: job 'first' \(generation 4, on .*\) saves there") as caught:
            Checkpointer(url, job=JobIdentity(lineage="b", run_id="second")).start()
        assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)
        assert SILENCE_S <= times.now_s <= SILENCE_S + 10
        assert "take_over" in str(caught.value)
        first.save(2, state(2), wait=True)
        assert first.wait()
        use(Time(never))
        with Checkpointer(url, job=JobIdentity(lineage="a", generation=5, run_id="first")) as following:
            assert following.restore(state(0)) == 2
            with pytest.raises(Fenced):
                save_steps(first, 3, 4)
    with Checkpointer(url, job=JobIdentity(lineage="b", run_id="second")) as second:  # the first has ended
        assert second.restore(state(0)) == 2
    assert [info.key for info in open_store(url).list("beat-")] == []


@pytest.mark.parametrize(
    ("dies_at_s", "kind"),
    [
        *((0, kind) for kind in ("local", "memory", "moto")),
        *((12, kind) for kind in ("memory", "juicefs")),
        *(sample.rest(0, kind) for kind in ("juicefs", "fsspec-s3")),
        *(sample.rest(12, kind) for kind in ("local", "moto", "fsspec-s3")),
    ],
)
def test_a_dead_job_is_superseded(
    kind: str, dies_at_s: int, make_url: Callable[[str], str], use: Callable[[Time], None], events: Events
) -> None:
    url = make_url(kind)
    dead, _ = owner.claim(open_store(url), owner_of("a", "d", 3, "first"))
    heartbeat.write(open_store(url), dead.token, 0)
    times = beating(url, until_s=dies_at_s)
    use(times)
    with Checkpointer(url, job=JobIdentity(lineage="b", run_id="second"), on_event=events[1]) as second:
        assert SILENCE_S <= times.now_s - dies_at_s // 5 * 5 <= SILENCE_S + 1
        second.save(1, state(1), wait=True)
        assert second.wait()
        with pytest.raises(Fenced, match=r"belongs to job 'second' \(generation 0, on .*\), epoch 2"):
            owner.Claim(open_store(url), dead).check()
        until("the dead job's beat is removed", lambda: len(open_store(url).list("beat-")) == 1)
    fields = dict(events[0])["checkpoint_taken_over"]
    assert fields["of"] == "job 'first' (generation 3, on node-1)"
    assert (fields["by"].startswith("job 'second'"), fields["reason"]) == (True, "it was silent for 30 s")
    assert open_store(url).list("beat-") == []


def test_whoever_asks_for_it_waits_for_nobody(memory_url: str, use: Callable[[Time], None], events: Events) -> None:
    use(Time(never))
    with Checkpointer(memory_url, job=JobIdentity(lineage="a", run_id="first")) as first:
        with Checkpointer(
            memory_url, job=JobIdentity(lineage="b"), access=Access.TAKE_OVER, on_event=events[1]
        ) as second:
            second.save(1, state(1), wait=True)
            assert second.wait()
        assert dict(events[0])["checkpoint_taken_over"]["reason"] == "it was asked for"
        with pytest.raises(Fenced):
            save_steps(first, 2, 3)
    with Checkpointer(memory_url, job=JobIdentity(lineage="c"), access=Access.TAKE_OVER, on_event=events[1]):
        pass
    assert [name for name, _ in events[0]].count("checkpoint_taken_over") == 1  # the others had ended


def test_who_waits_is_told_for_how_long_and_what_spares_it(
    memory_url: str, use: Callable[[Time], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    store = open_store(memory_url)
    owner.claim(store, owner_of("", "d", run_id="first"))
    heartbeat.write(store, "d" * 32, 0)
    use(Time())
    with Checkpointer(memory_url, job=JobIdentity(lineage="b")):
        assert "job 'first' (generation 0, on node-1) has claimed" in caplog.text
        assert "up to 60 s" in caplog.text
        assert "--rdzv-id" not in caplog.text
        heartbeat.write(store, "e" * 32, 0)
        owner.claim(store, owner_of("", "e"))
        with Checkpointer(memory_url):
            assert "--rdzv-id" in caplog.text


def test_a_job_that_closes_while_it_saves_is_waited_for(memory_url: str, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(memory_url)
    mine, _ = owner.claim(store, owner_of("a", "a", run_id="first"))

    def each_second(second: int) -> None:
        if second == 100:
            store.delete(layout.heartbeat_name(mine.token))
        elif second % 5 == 0 and second < 100:
            heartbeat.write(store, mine.token, second, is_closing=second >= 10)

    times = Time(each_second)
    heartbeat.write(store, mine.token, 0)
    assert in_use.await_free(store, owner_of("b", "b"), clock=times.clock, sleep=times.sleep) is None
    assert times.now_s == 100
    assert caplog.text.count("job 'first' (generation 0, on node-1) is closing; waiting for its last save") == 1


def test_a_checkpointer_that_still_saves_says_that_it_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Held()
    register_scheme("held", lambda rest: store)
    ckpt = Checkpointer("held://run").start()
    store.may_go_on.clear()
    ckpt.save(1, state(1))
    closing = threading.Thread(target=ckpt.close)
    closing.start()
    try:
        until("its beat says so", lambda: any(store.read(i.key).endswith(b" closing\n") for i in store.list("beat-")))
    finally:
        store.may_go_on.set()
        closing.join(60)
    assert store.list("beat-") == []


class Held(MemoryStore):
    """Keeps whoever stores data until it may go on."""

    def __init__(self) -> None:
        super().__init__("held")
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def put(self, key: str, buffers: Any, *, if_absent: bool = False) -> Any:
        if key.endswith(".distcp"):
            self.may_go_on.wait(60)
        return super().put(key, buffers, if_absent=if_absent)


def test_the_loser_of_two_that_claim_at_once_is_told(
    memory_url: str, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.saving.ownership.Heartbeat", functools.partial(Heartbeat, interval_s=0.01))
    with Checkpointer(memory_url, job=JobIdentity(lineage="a"), on_event=events[1]) as loser:
        owner.claim(open_store(memory_url), owner_of("b", "b", run_id="second"))
        until("it is told", lambda: bool(events[0]))
        ((name, fields),) = events[0]
        assert (name, fields["by"]) == ("checkpoint_fenced", "job 'second' (generation 0, on node-1)")
        with pytest.raises(Fenced, match="now belongs to job 'second'"):
            loser.save(1, state(1))


@pytest.mark.parametrize("kind", ["juicefs", "fsspec-s3"])
def test_beats_wait_behind_nothing_else(kind: str, make_url: Callable[[str], str]) -> None:
    store = open_store(make_url(kind))
    brisk = store.impatient(heartbeat.TIMEOUT_S)
    assert isinstance(store, RetryingStore)
    with contextlib.ExitStack() as full:
        for _ in range(store._retrier._limit.limit):
            full.enter_context(store._retrier._limit.slot())
        beating = threading.Thread(target=heartbeat.write, args=(brisk, "a" * 32, 7), daemon=True)
        beating.start()
        beating.join(60)
        assert not beating.is_alive()
    assert store.read("beat-" + "a" * 32) == b"7\n"


def test_a_run_that_a_third_job_takes_meanwhile_is_looked_at_anew(memory_url: str) -> None:
    store = open_store(memory_url)
    owner.claim(store, owner_of("a", "a", run_id="first"))
    heartbeat.write(store, "a" * 32, 0)

    def each_second(second: int) -> None:
        if second == SILENCE_S:
            heartbeat.write(store, "c" * 32, 0)
            owner.claim(store, owner_of("c", "c", run_id="third"))
        if second > SILENCE_S:
            heartbeat.write(store, "c" * 32, second)

    times = Time(each_second)
    with pytest.raises(InUse, match="job 'third'"):
        in_use.await_free(store, owner_of("b", "b"), clock=times.clock, sleep=times.sleep)


def test_a_checkpointer_that_cannot_be_opened_leaves_no_beat(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(memory_url, job=JobIdentity(lineage="a", generation=2)):
        with pytest.raises(Fenced):
            Checkpointer(memory_url, job=JobIdentity(lineage="a", generation=1)).start()

        def broken(self: Ownership) -> None:
            raise Transient("the store is away")

        monkeypatch.setattr(Ownership, "_check_conditions", broken)
        with pytest.raises(Transient):
            Checkpointer(memory_url, job=JobIdentity(lineage="a", generation=3)).start()
        monkeypatch.undo()
    assert open_store(memory_url).list("beat-") == []


def test_a_name_that_was_given_makes_no_job_the_same(
    memory_url: str, use: Callable[[Time], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with Checkpointer(memory_url, job=JobIdentity(run_id="llama")) as first:
        use(beating(memory_url))
        with pytest.raises(InUse, match="job 'llama'"):
            Checkpointer(memory_url, job=JobIdentity(run_id="llama")).start()
        first.save(1, state(1), wait=True)
        assert first.wait()


def test_the_next_workers_of_one_torchrun_wait_for_nobody(
    memory_url: str, use: Callable[[Time], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Time(never))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Checkpointer(memory_url, job=JobIdentity(run_id="llama")), Checkpointer(memory_url) as second:
        second.save(1, state(1), wait=True)
        assert second.wait()


def test_a_checkpointer_that_is_dropped_lets_the_run_go(memory_url: str) -> None:
    dropped = Checkpointer(memory_url)
    dropped.save(1, state(1), wait=True)
    assert len(open_store(memory_url).list("beat-")) == 1
    del dropped
    gc.collect()
    until("its beat is gone", lambda: not open_store(memory_url).list("beat-"))
