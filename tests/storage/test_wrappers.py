"""What wraps a store can do all that the store can, and what a store cannot do it says."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from storage.errors import Cause, NotFound, Transient
from storage.stores.adaptive_limit import AdaptiveLimit
from storage.stores.buffers import Buffer
from storage.stores.memory import MemoryStore
from storage.stores.objects import Capability, Fetch, ObjectInfo, ObjectStore, Upload
from storage.stores.registry import open_store, register_scheme
from storage.stores.retry_policy import Retrier, RetryLog
from storage.stores.retrying_store import RetryingStore
from storage.stores.s3.store import S3Store
from storage.stores.wrapper import StoreWrapper

UPLOAD = Upload("k", "id", 1.0)
METHODS = sorted(name for name in vars(ObjectStore) if not name.startswith("_") and name != "retries")


class Able(MemoryStore):
    """Can all that a store can. The first call of each method fails, and may be tried again, while it is `shaky`."""

    def __init__(self, *, is_shaky: bool = False) -> None:
        super().__init__("able")
        self.is_shaky = is_shaky
        self.called: list[str] = []

    def can(self, capability: Capability) -> bool:
        self._shake("can")
        return True

    def put_from(self, key: str, size_bytes: int, fetch: Fetch, pool: Executor) -> ObjectInfo:
        self._shake("put_from")
        return super().put_from(key, size_bytes, fetch, pool)

    def delete_version(self, key: str, etag: str) -> bool:
        self._shake("delete_version")
        return super().delete_version(key, etag)

    def uploads(self) -> Sequence[Upload]:
        self._shake("uploads")
        return [UPLOAD]

    def abort(self, upload: Upload) -> None:
        self._shake("abort")

    def impatient(self, timeout_s: float) -> ObjectStore:
        self.called.append("impatient")
        return Able(is_shaky=self.is_shaky)

    def close(self) -> None:
        self.called.append("close")

    def _shake(self, name: str) -> None:
        self.called.append(name)
        if self.is_shaky and self.called.count(name) == 1:
            raise Transient("once", Cause.RESET)


def retrying(store: ObjectStore) -> RetryingStore:
    limit = AdaptiveLimit(1)
    return RetryingStore(store, Retrier(limit, RetryLog(), sleep=lambda seconds: None, uniform=random.Random(1).random))


WRAPPERS: dict[str, Callable[[ObjectStore], ObjectStore]] = {
    "plain": StoreWrapper,
    "retrying": retrying,
    "both": lambda store: retrying(StoreWrapper(store)),
}


@pytest.mark.parametrize("wrapper", [StoreWrapper, RetryingStore, S3Store])
@pytest.mark.parametrize("method", METHODS)
def test_no_wrapper_falls_back_to_what_holds_for_any_store(wrapper: type[ObjectStore], method: str) -> None:
    assert getattr(wrapper, method) is not getattr(ObjectStore, method)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"url", "close", "doubt", "bite_bytes", "num_readers"}))
def test_whatever_asks_the_store_is_tried_again(method: str) -> None:
    assert method in vars(RetryingStore)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_store_can_what_the_store_can(kind: str) -> None:
    store = Able(is_shaky=kind != "plain")
    wrapped = WRAPPERS[kind](store)
    assert all(wrapped.can(capability) for capability in Capability)
    with ThreadPoolExecutor(1) as pool:
        info = wrapped.put_from("k", 3, lambda at, size: [memoryview(b"abc")[at : at + size]], pool)
    assert not wrapped.delete_version("k", "another")
    assert wrapped.delete_version("k", info.etag)
    assert wrapped.uploads() == [UPLOAD]
    wrapped.abort(UPLOAD)
    assert wrapped.impatient(1.0).uploads() == [UPLOAD]
    wrapped.close()
    asked = {"can", "put_from", "delete_version", "uploads", "abort", "impatient", "close"}
    assert set(store.called) == asked
    assert wrapped.url == store.url


class Least(ObjectStore):
    """A back end with nothing but what the contract asks of every one."""

    def __init__(self) -> None:
        self._inner = MemoryStore("least")

    url = "least://"

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        return self._inner.put(key, buffers, if_absent=if_absent)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        return self._inner.read_into(key, offset, buffers, if_match=if_match)

    def read(self, key: str) -> bytes:
        return self._inner.read(key)

    def info(self, key: str) -> ObjectInfo:
        return self._inner.info(key)

    def list(self, prefix: str) -> Sequence[ObjectInfo]:
        return self._inner.list(prefix)

    def folders(self, prefix: str) -> Sequence[str]:
        return self._inner.folders(prefix)

    def delete(self, key: str) -> None:
        self._inner.delete(key)


@pytest.mark.parametrize("wrap", [lambda store: store, *WRAPPERS.values()], ids=["bare", *WRAPPERS])
def test_the_least_store_says_what_it_cannot_do(wrap: Callable[[ObjectStore], ObjectStore]) -> None:
    with wrap(Least()) as store:
        assert not any(store.can(capability) for capability in Capability)
        fetched: list[tuple[int, int]] = []

        def fetch(offset: int, size_bytes: int) -> list[memoryview]:
            fetched.append((offset, size_bytes))
            return [memoryview(b"abc")]

        with ThreadPoolExecutor(1) as pool:
            info = store.put_from("k", 3, fetch, pool)
        assert (store.read("k"), fetched) == (b"abc", [(0, 3)])
        with pytest.raises(NotImplementedError, match="least:// cannot delete one version"):
            store.delete_version("k", info.etag)
        assert store.uploads() == []
        with pytest.raises(NotFound, match="no upload of k"):
            store.abort(UPLOAD)
        assert store.impatient(1.0).read("k") == b"abc"
        assert store.retries.snapshot().num_by_cause == {}


def test_impatient_requests_wait_for_no_slot_and_are_tried_twice_at_most() -> None:
    limit, store = AdaptiveLimit(1), Able(is_shaky=True)
    patient = RetryingStore(store, Retrier(limit, RetryLog()))
    with limit.slot():
        brisk = patient.impatient(1.0)
        assert isinstance(brisk, RetryingStore)
        brisk._retrier._sleep = lambda seconds: None
        assert brisk.uploads() == [UPLOAD]
    assert brisk.retries.snapshot().num_by_cause == {"reset": 1}
    assert patient.retries.snapshot().num_by_cause == {}, "counted apart"
    assert brisk.retries.health is patient.retries.health


def test_impatient_requests_do_not_wait_for_one_another() -> None:
    """A renewal that is made once more because the first takes long would wait for the first."""
    meet = threading.Barrier(16)

    class Slow(MemoryStore):
        def impatient(self, timeout_s: float) -> ObjectStore:
            return self

        def read(self, key: str) -> bytes:
            meet.wait(30)
            return b""

    brisk = retrying(Slow("slow")).impatient(1.0)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(brisk.read, map(str, range(16)))) == [b""] * 16


def test_what_opens_a_scheme_must_give_a_store() -> None:
    register_scheme("no-store", lambda rest: {})  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="no-store:// was opened as a dict, which does not inherit from ObjectStore"):
        open_store("no-store://")
