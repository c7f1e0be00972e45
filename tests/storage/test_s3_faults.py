"""What networks and servers do to requests, between the store and a real gateway.

After each fault the operation has succeeded, or has failed with an error that says so; a checkpoint is committed and
verifies, or the one before is restored. Nothing else.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from storage import Checkpointer, inspection, open_store
from storage.errors import AlreadyExists, Cause, NotFound, StorageError, Transient
from storage.stores import retry_policy
from storage.stores.objects import Fetch, ObjectInfo, ObjectStore
from storage.stores.s3 import store as s3_store
from storage.stores.s3.bucket import Bucket
from tests import sample
from tests.cluster import until
from tests.s3 import S3Server
from tests.storage.proxy import KINDS, Fault, FaultProxy

PART_BYTES = 5 << 20  # the proxy's URLs say so
DATA = memoryview(random.Random(3).randbytes(6 << 20))
NOT_DAMAGING = tuple(kind for kind in KINDS if kind not in ("corrupt", "corrupt_put"))
ALWAYS = 1_000_000
CAUSES = {
    "throttle": {"throttled"},
    "refuse": {"throttled", "reset"},
    "error": {"server_error"},
    "lose": {"reset", "stale"},
    "reset": {"reset", "truncated", "stale", "server_error"},  # the last is what botocore makes of half an answer
    "truncate": {"truncated", "reset", "server_error"},
    "stall": {"stalled"},
    "slow": set[str](),
    "repeat": set[str](),
    "twice": {"stale"},
    "corrupt_put": {"damaged"},
}


@pytest.fixture(scope="module")
def proxy(_juicefs: S3Server) -> Iterator[FaultProxy]:
    with pytest.MonkeyPatch.context() as patch, FaultProxy(_juicefs) as proxy:
        for name, value in _juicefs.environment.items():
            patch.setenv(name, value)
        for cause, rule in retry_policy.RULES.items():
            patch.setitem(retry_policy.RULES, cause, tried(min(rule.num_tries, 5)))  # type: ignore[arg-type]
        # a busy machine may be silent as well for the half a second that counts as a stall here
        patch.setitem(retry_policy.RULES, Cause.STALLED, tried(20))  # type: ignore[arg-type]
        yield proxy


def tried(num: int) -> retry_policy.Rule:
    """So often, and soon."""
    return retry_policy.Rule(num, 0.001, 0.01, 60.0)


@pytest.fixture(autouse=True)
def no_faults(proxy: FaultProxy) -> Iterator[None]:
    """Each test begins without any, and leaves none behind."""
    yield
    proxy.faults.clear()


@pytest.fixture(scope="module")
def prefix(proxy: FaultProxy) -> str:
    """Where two objects are."""
    prefix = uuid.uuid4().hex
    store = open_store(proxy.url(prefix))
    store.put("small", [b"small object"], if_absent=True)
    store.put("large", [DATA])
    return prefix


@pytest.fixture(scope="module")
def patient(proxy: FaultProxy, prefix: str) -> ObjectStore:
    return open_store(proxy.url(prefix))


@pytest.fixture(scope="module")
def hasty(proxy: FaultProxy, prefix: str) -> ObjectStore:
    """For faults that stall: it does not wait for long."""
    return open_store(proxy.url(prefix, stall_timeout_s=0.5))


@pytest.fixture
def store(request: pytest.FixtureRequest) -> ObjectStore:
    stalls = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind") == "stall"
    found: ObjectStore = request.getfixturevalue("hasty" if stalls else "patient")
    return found


def fresh(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex}"


def read_large(store: ObjectStore) -> None:
    memory = memoryview(bytearray(3 << 20))
    store.read_into("large", 77, [memory[:1000], memory[1000:]], if_match=store.info("large").etag)
    assert memory == DATA[77 : 77 + memory.nbytes]


def read_small(store: ObjectStore) -> None:
    assert store.read("small") == b"small object"


def put_small(store: ObjectStore) -> None:
    key = fresh("new")
    store.put(key, [b"new ", b"object"], if_absent=True)
    assert store.read(key) == b"new object"


def put_large(store: ObjectStore) -> None:
    key = fresh("new")
    info = store.put(key, [DATA[:5], DATA[5:]], if_absent=True)
    assert info == store.info(key)
    memory = memoryview(bytearray(DATA.nbytes))
    store.read_into(key, 0, [memory])
    assert memory == DATA


def listing(store: ObjectStore) -> None:
    assert [info.key for info in store.list("small")] == ["small"]
    assert store.folders("small/") == []


def delete(store: ObjectStore) -> None:
    key = fresh("gone")
    store.put(key, [b"x"])
    store.delete(key)
    assert store.list(key) == []


OPERATIONS: tuple[tuple[str, str, Callable[[ObjectStore], None]], ...] = (
    ("GET", "large", read_large),
    ("HEAD", "large", read_large),
    ("GET", "small", read_small),
    ("PUT", "new", put_small),
    ("POST", "uploads", put_large),
    ("PUT", "partNumber=2", put_large),
    ("POST", "uploadId=", put_large),
    ("GET", "list-type", listing),
    ("DELETE", "gone", delete),
)


@pytest.mark.parametrize("kind", [*NOT_DAMAGING, "corrupt_put"])
@pytest.mark.parametrize(("method", "contains", "operate"), OPERATIONS)
def test_an_operation_succeeds_in_spite_of_it(
    proxy: FaultProxy, store: ObjectStore, kind: str, method: str, contains: str, operate: Callable[[ObjectStore], None]
) -> None:
    fault = Fault(kind, method, contains, times=1 if kind in ("stall", "slow") else 2)
    before = store.retries.snapshot()
    proxy.faults.append(fault)
    operate(store)
    seen = set(store.retries.snapshot().since(before).num_by_cause)
    assert seen <= CAUSES[kind] | {"stale"}
    if fault.num_done and kind in ("throttle", "error", "lose", "stall"):
        assert seen & CAUSES[kind]


@pytest.mark.parametrize("kind", ["throttle", "error", "lose", "truncate", "stall"])
def test_one_that_stays_is_told_with_the_number_of_tries(
    proxy: FaultProxy, store: ObjectStore, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(retry_policy.RULES, Cause.STALLED, tried(3))  # type: ignore[arg-type]
    proxy.faults.append(Fault(kind, "GET", "small", times=ALWAYS))
    with pytest.raises(Transient, match=r"\(tried \d times\)") as caught:
        store.read("small")
    assert caught.value.cause.value in CAUSES[kind]
    assert "\n" not in str(caught.value)


def test_a_broken_read_is_not_begun_anew(proxy: FaultProxy, store: ObjectStore) -> None:
    etag = store.info("large").etag
    proxy.faults.append(Fault("truncate", "GET", "large", times=3))
    proxy.requests.clear()
    memory = memoryview(bytearray(DATA.nbytes))
    store.read_into("large", 0, [memory], if_match=etag)
    assert memory == DATA
    assert len(proxy.requests) == 4


def test_a_put_that_another_has_overwritten_meanwhile_is_not_ours(
    proxy: FaultProxy, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the put is lost, and before it is tried again somebody else has written the object."""
    key = fresh("prize")
    other = open_store(store.url)
    proxy.faults.append(Fault("lose", "PUT", key))
    monkeypatch.setattr(store._retrier, "_sleep", lambda seconds: other.put(key, [b"another's"]))  # type: ignore[attr-defined]
    with pytest.raises(AlreadyExists):
        store.put(key, [b"mine"], if_absent=True)
    assert other.read(key) == b"another's"


def test_a_failed_upload_leaves_no_parts_behind(proxy: FaultProxy, store: ObjectStore) -> None:
    proxy.faults.append(Fault("error", "PUT", "partNumber=2", times=ALWAYS))
    proxy.requests.clear()
    key = fresh("half")
    with pytest.raises(Transient):
        store.put(key, [DATA])
    assert ("DELETE", True) in [(method, "uploadId=" in target) for method, target in proxy.requests]
    assert store.list("half") == []


class Fetched:
    """Content of two parts. `hold`: called with a part's number before it is there."""

    def __init__(self, hold: Callable[[int], None] = lambda number: None) -> None:
        self.numbers: list[int] = []
        self._hold = hold

    def __call__(self, offset: int, length: int) -> list[memoryview]:
        self.numbers.append(offset // PART_BYTES)
        self._hold(offset // PART_BYTES)
        return [DATA[offset : offset + 7], DATA[offset + 7 : offset + length]]


def put_streamed(store: ObjectStore, key: str, fetch: Fetch) -> ObjectInfo:
    with ThreadPoolExecutor(2) as pool:
        return store.put_from(key, DATA.nbytes, fetch, pool)


def holds(store: ObjectStore, key: str) -> bool:
    memory = memoryview(bytearray(DATA.nbytes))
    store.read_into(key, 0, [memory])
    return memory == DATA


def test_the_first_part_is_sent_before_the_last_is_there(proxy: FaultProxy, store: ObjectStore) -> None:
    key, first = fresh("new"), "partNumber=1&"

    def hold(number: int) -> None:
        if number == 1:
            until("part sent", lambda: any(key in target and first in target for _, target in proxy.requests))

    put_streamed(store, key, Fetched(hold))
    assert holds(store, key)


def test_a_part_is_fetched_while_the_upload_is_begun_and_the_name_is_not_looked_at(
    proxy: FaultProxy, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, fetch, begin = fresh("new"), Fetched(), Bucket.create_upload

    def create_upload(bucket: Bucket, key: str) -> str:
        until("part fetched", lambda: fetch.numbers)
        return begin(bucket, key)

    monkeypatch.setattr(Bucket, "create_upload", create_upload)
    proxy.requests.clear()
    put_streamed(store, key, fetch)
    assert [method for method, target in proxy.requests if key in target] == ["POST", "PUT", "PUT", "POST"]
    assert holds(store, key)


def test_an_upload_that_cannot_be_begun(proxy: FaultProxy, store: ObjectStore) -> None:
    proxy.faults.append(Fault("error", "POST", "uploads", times=ALWAYS))
    proxy.requests.clear()
    key = fresh("half")
    with pytest.raises(Transient, match="tried"):
        put_streamed(store, key, Fetched())
    assert {method for method, target in proxy.requests if key in target} == {"POST"}


@pytest.mark.parametrize("kind", ["throttle", "reset", "corrupt_put"])
def test_a_part_that_is_sent_again_is_not_fetched_again(proxy: FaultProxy, store: ObjectStore, kind: str) -> None:
    key, fetch = fresh("new"), Fetched()
    proxy.faults.append(Fault(kind, "PUT", "partNumber=", times=3))
    put_streamed(store, key, fetch)
    assert sorted(fetch.numbers) == [0, 1]
    assert holds(store, key)


@pytest.mark.parametrize("is_ours", [True, False])
def test_where_etags_tell_nothing_an_upload_whose_end_is_in_doubt_is_compared(
    proxy: FaultProxy, store: ObjectStore, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with encryption by a key of the account's: parts' etags are no MD5 then."""
    key, fetch = fresh("new"), Fetched()
    monkeypatch.setattr(s3_store, "multipart_etag", lambda etags: None)
    proxy.faults.append(Fault("lose", "POST", "uploadId="))
    if not is_ours:
        other = open_store(store.url)
        monkeypatch.setattr(store._retrier, "_sleep", lambda seconds: other.put(key, [bytes(DATA.nbytes)]))  # type: ignore[attr-defined]
        with pytest.raises(NotFound):
            put_streamed(store, key, fetch)
        return
    assert put_streamed(store, key, fetch).size_bytes == DATA.nbytes
    assert sorted(fetch.numbers) == [0, 0, 1, 1]
    assert holds(store, key)


OUTAGES = ("error", "lose", "corrupt", "truncate", "corrupt_put")


def make_state(number: int) -> dict[str, Any]:
    return {"w": torch.full((600, 700), float(number)), "b": torch.full((5,), float(number)), "n": number}


def is_state(state: dict[str, Any], number: int) -> bool:
    wanted = make_state(number)
    return all(torch.equal(state[key], wanted[key]) for key in "wb") and state["n"] == number


PLACES = (
    *(("PUT", ".distcp"), ("PUT", "receipt-"), ("PUT", "manifest.json"), ("PUT", ".metadata"), ("GET", ".metadata")),
    *(("GET", "list-type"), ("GET", "receipt-"), ("GET", "manifest.json"), ("GET", "owner.json"), ("DELETE", "")),
)
"""In the order of what they are worth: of most faults the first six are enough."""
THOROUGH = ("lose", "corrupt", "corrupt_put", "truncate")


def places(kind: str) -> list[tuple[str, str]]:
    """Where a fault comes in saves: each place has every kind that is thorough or some of the others in the suite."""
    if kind in THOROUGH:
        return sample.turn(PLACES, THOROUGH.index(kind), 5)
    return sample.turn(PLACES[:6], [kind for kind in KINDS if kind not in THOROUGH].index(kind), 2)


@pytest.mark.usefixtures("saved_by")
@pytest.mark.parametrize("kind", KINDS)
def test_a_save_commits_what_verifies_or_the_one_before_is_restored(proxy: FaultProxy, kind: str) -> None:
    stall_timeout_s = 0.5 if kind == "stall" else 30.0
    url = proxy.url(fresh(kind), stall_timeout_s=stall_timeout_s)
    events: list[str] = []
    before = 1
    with Checkpointer(url, keep=1, on_event=lambda name, _: events.append(name)) as ckpt:
        ckpt.save(before, make_state(before), wait=True)
        for (method, contains), step in zip(places(kind), itertools.count(2)):
            proxy.faults[:] = [Fault(kind, method, contains)]
            ckpt.save(step, make_state(step), wait=True)
            committed = ckpt.wait()
            proxy.faults.clear()
            where = f"{kind} at {method} {contains}: {events}"
            # a damaged listing still fails a save; other damage is read again, and on the way there it is refused
            assert committed or (kind, contains) == ("corrupt", "list-type"), where
            state = make_state(0)
            restored = ckpt.restore(state)
            assert restored in (before, step) and is_state(state, restored), where
            assert restored == (step if committed else before), where
            before = restored
    assert not inspection.verify(open_store(url), f"step-{before:09d}/").problems


@pytest.mark.usefixtures("saved_by")
@pytest.mark.parametrize("kind", OUTAGES)
def test_an_outage_fails_the_save_and_the_one_before_is_restored(proxy: FaultProxy, kind: str) -> None:
    url = proxy.url(fresh(kind))
    before = 1
    with Checkpointer(url, keep=1, timeout_s=2.0) as ckpt:
        ckpt.save(before, make_state(before), wait=True)
        for (method, contains), step in zip(sample.turn(PLACES[:6], OUTAGES.index(kind), 2), itertools.count(2)):
            proxy.faults[:] = [Fault(kind, method, contains, times=ALWAYS)]
            ckpt.save(step, make_state(step), wait=True)
            proxy.faults.clear()
            ckpt.wait()
            state = make_state(0)
            restored = ckpt.restore(state)
            assert restored in (before, step) and is_state(state, restored), f"{kind} at {method} {contains}"
            before = restored
        last = len(PLACES) + 2
        ckpt.save(last, make_state(last), wait=True)
        assert ckpt.wait()
    assert not inspection.verify(open_store(url), f"step-{last:09d}/").problems


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("refuse", "corrupt_put", "repeat")])
def test_a_restore_gets_every_byte_right_or_says_no(proxy: FaultProxy, kind: str) -> None:
    url = proxy.url(fresh("restore"), stall_timeout_s=0.5 if kind == "stall" else 30.0)
    with Checkpointer(url) as ckpt:
        for step in (1, 2):
            ckpt.save(step, make_state(step), wait=True)
            assert ckpt.wait()
    reads = (".distcp", ".metadata", "manifest.json", "owner.json", "list-type")
    for contains in sample.turn(reads, KINDS.index(kind), len(reads) if kind == "corrupt" else 2):
        proxy.faults[:] = [Fault(kind, "GET", contains, times=1)]
        state = make_state(0)
        refusal: StorageError | None = None
        try:
            with Checkpointer(url) as ckpt:
                step = ckpt.restore(state)
        except StorageError as error:
            refusal = error
        proxy.faults.clear()
        if refusal is not None:
            assert kind == "corrupt", f"{kind} at {contains}: {refusal!r}"
            continue
        assert is_state(state, step)
        assert step == 2
    assert inspection.verify(open_store(url), "step-000000002/").problems == ()
