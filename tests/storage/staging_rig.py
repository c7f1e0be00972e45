"""A stager whose copies are made by nobody but those that wait for them, and what is trained beside it."""

from __future__ import annotations

import torch
from torch import nn

from storage.arena.arena import Arena
from storage.arena.changes import StateChanged
from storage.arena.stager import Staged, Stager
from storage.arena.staging import Staging

Named = list[tuple[str, torch.Tensor]]


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.num_held = 0
        self.changes: list[str] = []

    def held(self, seconds: float) -> None:
        self.num_held += 1

    def changed(self, error: StateChanged) -> None:
        self.changes.append(error.name)


class Idle:
    """A pool without threads: what is left to it is done by whoever waits."""

    def submit(self, *args: object) -> None:
        """Nothing."""

    def shutdown(self, *, wait: bool) -> None:
        """Nothing."""


class Rig:
    """A stager, and a model to be trained."""

    def __init__(self, staging: Staging = Staging.OVERLAPPED) -> None:
        torch.manual_seed(1)
        self.arena = Arena(1)
        self.stager = Stager(self.arena, staging)
        self.stager._pool = Idle()  # type: ignore[assignment]
        self.heard = Heard()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 300))

    def train(self, *optimizers: torch.optim.Optimizer, num_backwards: int = 1) -> None:
        for _ in range(num_backwards):
            self.model(torch.randn(4, 8)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        self.model.zero_grad()

    def named(self, *optimizers: torch.optim.Optimizer) -> Named:
        found = [(name, tensor.detach()) for name, tensor in self.model.state_dict().items()]
        for optimizer in optimizers:
            for number, state in enumerate(optimizer.state.values()):
                found += [(f"{number}.{key}", v) for key, v in state.items() if isinstance(v, torch.Tensor)]
        return found

    def stage(self, named: Named) -> Staged:
        return self.stager.stage(named, self.heard)

    def close(self) -> None:
        self.stager.close()
        self.arena.close()


def copies(named: Named) -> list[torch.Tensor]:
    return [tensor.clone() for _, tensor in named]


def same(staged: Staged, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(found, tensor) for found, tensor in zip(staged.tensors, expected, strict=True))
