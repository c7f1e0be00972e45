"""Copies behind the training's back: who makes them, from when on, and whether they are still wanted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.storage.staging_rig import Rig, copies, same


@pytest.fixture
def rig() -> Iterator[Rig]:
    with contextlib.closing(Rig()) as made:
        yield made


class Later:
    """A pool that makes its calls when it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def submit(self, *call: Any) -> None:
        self.calls.append(call)

    def run(self) -> None:
        for function, *given in self.calls:
            function(*given)

    def shutdown(self, *, wait: bool) -> None:
        """Nothing."""


def test_threads_copy_from_when_the_save_returns_and_alone(rig: Rig) -> None:
    """A thread that only waits for the copy would take another processor from the training."""
    pool = rig.stager._pool = Later()  # type: ignore[assignment]
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    expected = copies(rig.named())
    staged = rig.stage(rig.named())
    assert staged._pending is not None
    late = staged._pending._help
    assert (late,) not in pool.calls
    staged.go_on()
    assert (late,) in pool.calls
    waiting = threading.Thread(target=staged.wait)
    waiting.start()
    try:
        waiting.join(0.05)  # for as long as it likes
        assert not staged._pending.work.has_ended
        assert not same(staged, expected)
    finally:
        pool.run()
        waiting.join(60)
    assert not waiting.is_alive()
    assert same(staged, expected)
    staged.release()


def test_what_follows_a_copy_is_done_once_it_is_whole_whoever_made_it(rig: Rig) -> None:
    rig.stager._pool = Later()  # type: ignore[assignment]
    optimizer, told = torch.optim.SGD(rig.model.parameters(), lr=0.1), list[bool]()
    rig.train(optimizer)
    staged = rig.stage(rig.named())
    pending = staged._pending
    assert pending is not None
    staged.then(lambda: told.append(pending.work.has_ended))
    assert told == []
    staged.go_on()
    rig.train(optimizer)
    assert told == [True]
    staged.then(lambda: told.append(False))
    staged.cancel()
    assert told == [True, False]
    staged = rig.stage(rig.named())
    staged.then(lambda: told.append(True))
    staged.cancel()
    assert told == [True, False, True], "what nobody wants ends as well"


def test_what_threads_have_not_copied_a_step_copies_itself(rig: Rig) -> None:
    rig.stager._pool = Later()  # type: ignore[assignment]
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    expected = copies(rig.named())
    staged = rig.stage(rig.named())
    staged.go_on()
    rig.train(optimizer)
    assert same(staged, expected)
    staged.wait()
    staged.release()


def test_a_copy_that_nobody_wants_is_not_made(rig: Rig) -> None:
    optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.train(optimizer)
    staged = rig.stage(rig.named())
    targets, expected = list(staged.tensors), copies(rig.named())
    late = [number for number, (name, _) in enumerate(rig.named()) if "running" not in name and "num" not in name]
    rig.model[0].weight.data.add_(1)  # nobody minds
    staged.cancel()
    assert not any(torch.equal(targets[number], expected[number]) for number in late)
    assert rig.arena.num_free == 1
    assert not rig.heard.changes
    rig.train(optimizer)
    staged = rig.stage(rig.named())
    assert staged.is_pending
    staged.release()
