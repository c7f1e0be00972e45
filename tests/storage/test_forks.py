"""Processes that a script forks while it has a Checkpointer open, as data loaders do."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from storage import Checkpointer, UsageError, register_scheme
from storage.stores.buffers import Buffer
from storage.stores.local import LocalStore
from storage.stores.objects import ObjectInfo

_fork = multiprocessing.get_context("fork")


class Gated(LocalStore):
    """A folder that takes data once it is let."""

    is_let = threading.Event()

    def put(self, key: str, buffers: Sequence[Buffer], *, if_absent: bool = False) -> ObjectInfo:
        if key.endswith(".distcp"):
            assert self.is_let.wait(60)
        return super().put(key, buffers, if_absent=if_absent)


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[Checkpointer]:
    """A Checkpointer whose first save is under way until `Gated.is_let`."""
    register_scheme("gated", Gated)
    Gated.is_let.clear()
    ckpt = Checkpointer(f"gated://{tmp_path}", service=False)
    try:
        ckpt.save(1, {"w": torch.ones(4)})
        yield ckpt
    finally:
        Gated.is_let.set()
        ckpt.close()


def run(call: Callable[..., object], *args: object) -> int | None:
    """A fork that makes that call and ends; its exit code, None if it does not end."""
    process = _fork.Process(target=call, args=args)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def test_a_fork_that_ends_closes_nothing_of_its_parents(saving: Checkpointer) -> None:
    """It waits for no save, and ends no connection: `multiprocessing` has it run what the interpreter's end runs."""
    assert run(int) == 0
    Gated.is_let.set()
    assert saving.wait()


def use(ckpt: Checkpointer, told: Connection) -> None:
    for call in (ckpt.start, ckpt.wait, lambda: ckpt.save(2, {"w": torch.ones(4)})):
        try:
            call()
        except UsageError as error:
            told.send(str(error))
    ckpt.close()


def test_a_fork_is_told_that_it_cannot_save_for_its_parent(saving: Checkpointer) -> None:
    mine, theirs = _fork.Pipe(duplex=False)
    assert run(use, saving, theirs) == 0
    for _ in range(3):
        assert mine.poll(0)
        assert "is a fork of it; use it there, or open another one here" in mine.recv()
    Gated.is_let.set()
    saving.save(2, {"w": torch.ones(4)}, wait=True)
    assert saving.wait()
