"""The pool of threads that works until the interpreter has ended."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import CancelledError

import pytest

from storage.parallel import Pool, run_all
from tests.cluster import until


def test_calls_go_at_once_on_as_many_threads_as_are_allowed() -> None:
    meeting = threading.Barrier(3, timeout=60)
    with Pool(3, "storage-test") as pool:
        names = run_all(pool, [lambda: (meeting.wait(), threading.current_thread().name)[1]] * 3)
        assert sorted(names) == ["storage-test_0", "storage-test_1", "storage-test_2"]
        assert sum(run_all(pool, [lambda: 1] * 50)) == 50
        assert list(pool.map(abs, [-1, -2])) == [1, 2]


def test_an_error_is_the_callers_and_ends_no_thread() -> None:
    with Pool(1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 / 0).result(timeout=60)
        assert pool.submit(int, "7").result(timeout=60) == 7
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(int)


def test_a_shutdown_finishes_what_was_handed_in_or_cancels_it() -> None:
    for cancels in (False, True):
        pool, go = Pool(1), threading.Event()
        first = pool.submit(go.wait, 20)
        later = pool.submit(int, "7")
        closing = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": cancels})
        closing.start()
        if cancels:
            with pytest.raises(CancelledError):
                later.result(timeout=60)
        go.set()
        closing.join(60)
        assert first.result(timeout=60)
        assert cancels or later.result(timeout=60) == 7


def test_threads_of_a_pool_that_nobody_has_end() -> None:
    pool = Pool(2)
    run_all(pool, [int] * 4)
    threads = list(pool._threads)
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_what_a_call_held_is_let_go_when_it_has_ended() -> None:
    class Held:
        def use(self) -> None:
            pass

    with Pool(1) as pool:
        held = Held()
        gone = weakref.ref(held)
        pool.submit(held.use).result(timeout=60)
        del held
        until("it is let go", lambda: gone() is None)


def test_where_no_thread_can_be_started_the_caller_makes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `atexit` functions from Python 3.12 on."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with Pool(2) as pool:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert run_all(pool, [threading.current_thread] * 3) == [threading.current_thread()] * 3
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 / 0).result(timeout=0)
