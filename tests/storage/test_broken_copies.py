"""Copies of many small tensors, and what becomes of a slot whose copy does not begin or is broken off."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from storage.arena import moves
from storage.arena.moves import Move, SharedWork
from storage.parallel import Pool
from tests.storage.staging_rig import Rig, copies, same


@pytest.fixture
def rig() -> Iterator[Rig]:
    with contextlib.closing(Rig()) as made:
        yield made


@pytest.mark.parametrize("is_inference", [False, True])
def test_many_small_tensors_are_copied_by_few_calls(rig: Rig, is_inference: bool) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    named = [(str(n), torch.randn(n % 7, 3).to(kinds[n % 4])) for n in range(3000)]
    named += [("large", torch.randn(moves.PIECE_BYTES // 4 + 1)), ("turned", torch.randn(3, 2).t())]
    with torch.inference_mode(is_inference):
        staged = rig.stager.stage(named)
    assert same(staged, copies(named))
    laid = [Move(name, tensor, copy) for (name, tensor), copy in zip(named, staged.tensors, strict=True)]
    assert len(list(moves.pieces_of(laid))) == 3 + 2 + 1
    staged.release()


@pytest.mark.parametrize("where", ["storage.arena.stager.Move", "storage.arena.stager.tensor_over"])
def test_a_copy_that_cannot_begin_gives_its_slot_back(rig: Rig, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no more mappings")

    named = rig.named()
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(where, refuse)
            with pytest.raises(OSError, match="no more mappings"):
                rig.stage(named)
        assert rig.arena.num_free == 1
    staged = rig.stage(named)
    assert same(staged, copies(named))
    staged.release()


def test_an_interrupted_copy_gives_its_slot_back_when_nobody_writes_to_it_any_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    interrupts: list[type[BaseException]] = [KeyboardInterrupt]

    def slowly(move: Move, start: int) -> None:
        began.set()
        assert goes_on.wait(60)
        ended.set()

    def interrupted(work: SharedWork, *, helps: bool = True) -> None:
        assert began.wait(60)
        while interrupts:
            threading.Timer(0.05, goes_on.set).start()
            raise interrupts.pop()
        waited(work, helps=helps)

    waited = SharedWork.wait
    rig.stager._pool = Pool(2)  # type: ignore[assignment]
    rig.stager._num_threads = 3
    monkeypatch.setattr(moves, "_copy_bytes", slowly)
    monkeypatch.setattr(SharedWork, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rig.stager.stage([(name, torch.ones(moves.PIECE_BYTES // 64)) for name in "ab"])
    assert ended.is_set()
    assert rig.arena.num_free == 1
