"""Checks of saves that are copied behind the training's back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.gpu.checks import check


class Heard:
    """A listener that remembers which tensors have changed."""

    def __init__(self) -> None:
        self.changes: list[str] = []

    def held(self, seconds: float) -> None:
        """Nothing."""

    def changed(self, error: Any) -> None:
        self.changes.append(error.name)


def trained(device: Any, width: int) -> tuple[Any, Any, list[tuple[str, Any]]]:
    """A model and an optimizer that have made a step, and what both hold."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(2))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    step(model, optimizer, device, width)
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    for number, state in enumerate(optimizer.state.values()):
        named += [(f"{number}.{name}", tensor) for name, tensor in state.items()]
    return model, optimizer, named


def step(model: Any, optimizer: Any, device: Any, width: int) -> None:
    import torch

    model(torch.ones(8, width, device=device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@check("staging on a side stream")
def side_stream(device: Any, folder: Path) -> str:
    """The host goes on at once, the optimizer's kernels wait for the copy, and what is copied is as it was before."""
    import torch

    from storage.arena.arena import Arena
    from storage.arena.stager import Stager
    from storage.arena.staging import Staging

    is_gpu = device.type == "cuda"
    width = 6144 if is_gpu else 64
    arena, heard = Arena(1), Heard()
    stager = Stager(arena, Staging.OVERLAPPED)
    try:
        model, optimizer, named = trained(device, width)
        stager.stage(named, heard).release()  # the slot is made and pinned
        took_s = []
        for _ in range(3):
            expected = [tensor.cpu().clone() for _, tensor in named]
            began_s = time.monotonic()
            staged = stager.stage(named, heard)
            took_s.append(time.monotonic() - began_s)
            assert staged.is_pending
            assert staged.slot.is_pinned == is_gpu, "staging goes through pageable memory"
            step(model, optimizer, device, width)
            host_s = time.monotonic() - began_s
            staged.wait()
            copied_s = time.monotonic() - began_s
            assert all(torch.equal(a, b) for a, b in zip(staged.tensors, expected, strict=True)), "not as it was"
            staged.release()
        assert not heard.changes
        size_gib = sum(tensor.nbytes for _, tensor in named) / 2**30
    finally:
        stager.close()
        arena.close()
    return f"{size_gib:.2f} GiB: blocked {min(took_s) * 1000:.1f} ms, step {host_s:.3f} s, copied {copied_s:.3f} s"


@check("a state that changes too early is found")
def changed(device: Any, folder: Path) -> str:
    """By torch's count of changes, and the saves after that block until all is copied."""
    import torch

    from storage.arena.arena import Arena
    from storage.arena.changes import StateChanged
    from storage.arena.stager import Stager
    from storage.arena.staging import Staging

    arena, heard = Arena(1), Heard()
    stager = Stager(arena, Staging.OVERLAPPED)
    stager._num_threads = 1
    try:
        model, optimizer, named = trained(device, 64)
        stager._pool.shutdown()
        stager._pool.submit = lambda *args: None  # type: ignore[method-assign, assignment, return-value]
        staged = stager.stage(named, heard)
        with torch.no_grad():
            model[1].weight.mul_(2)
        try:
            staged.wait()
        except StateChanged as error:
            told = error.name
        else:
            raise AssertionError("it was not found")
        staged.release()
        step(model, optimizer, device, 64)
        expected = [tensor.cpu().clone() for _, tensor in named]
        staged = stager.stage(named, heard)
        assert not staged.is_pending
        assert all(torch.equal(a, b) for a, b in zip(staged.tensors, expected, strict=True))
        assert heard.changes == [told]
    finally:
        stager.close()
        arena.close()
    return told
