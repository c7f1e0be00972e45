"""What the ranks of `test_live_state` do; functions by name, because they run in other processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from storage.events import Reporter
from storage.live.state import LivePart, LiveState
from storage.ranks.agreement import AgreeingGroup
from tests.cluster import until

DEADLINE_S = 60.0
Local = dict[str, torch.Tensor]
Events = list[tuple[str, dict[str, Any]]]


class Probe(nn.Module):
    """In a forward and a backward pass, calls `look` of that name while the parameters beside it are whole."""

    def __init__(self) -> None:
        super().__init__()
        self.look: dict[str, Callable[[], None]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.look.pop("forward", lambda: None)()
        passed: torch.Tensor = _Passing.apply(x, self)  # type: ignore[no-untyped-call]
        return passed


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probe: Probe) -> torch.Tensor:
        ctx.probe = probe
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.probe.look.pop("backward", lambda: None)()
        return grads[0], None


class Rank:
    """A rank's training with a live state whose parts end here."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.probe = Probe()
        layers = (nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 6, bias=False), self.probe), nn.Linear(6, 4))
        self.model = nn.Sequential(*layers)
        if shape:
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
            for layer in self.model:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "step": 0}
        self.parts: list[LivePart] = []
        self.contents: list[Local] = []
        self.events: Events = []
        group = AgreeingGroup()
        self.rank = group.rank
        report = Reporter(lambda name, fields: self.events.append((name, fields)))
        self.live = LiveState(group, self._publish, report).start()

    def _publish(self, part: LivePart) -> None:
        """As the service does, copy what must outlive the slot."""
        self.parts.append(part)
        tensors = {p.chunk.key: p.content for p in part.payloads if isinstance(p.content, torch.Tensor)}
        self.contents.append({key: tensor.clone() for key, tensor in tensors.items()})

    def train(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        self.state["step"] = step

    def loss(self) -> torch.Tensor:
        return self.model(torch.full((2, 8), 0.5)).square().sum()

    def local(self) -> Local:
        """Copies of what this rank holds of the model."""
        return {
            f"model.{name}": (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in self.model.state_dict().items()
        }

    def has_captured(self, expected: Local, number: int = -1) -> bool:
        """Whether the part of that number, by default the last, is that state."""
        found = self.contents[number]
        return all(torch.equal(found[name], value) for name, value in expected.items() if value.numel())


def in_thread(call: Callable[[], object]) -> None:
    """Make a call from another thread, while this one is where it is."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def captures_within_a_step(shape: tuple[int, ...]) -> list[bool]:
    """A capture from another thread in the middle of a forward, and of a backward pass; whether each was right."""
    rank = Rank(shape)
    rank.train(1)
    rank.live.note(1, rank.state)
    found: list[bool] = []

    def look() -> None:
        whole = [parameter for parameter in rank.model[1].parameters() if not isinstance(parameter, DTensor)]
        assert whole, "the layer is unsharded now"
        rank.state["step"] = 77
        in_thread(lambda: found.append(rank.live.capture(DEADLINE_S) == step))
        found.append(rank.has_captured(before))

    for step, where in ((1, "forward"), (2, "backward")):
        before = rank.local()
        rank.probe.look[where] = look
        rank.train(step + 1)
        rank.live.note(step + 1, rank.state)
    rank.live.close(rescue=False)
    return found


def captures_while_it_hangs(folder: str) -> list[Any]:
    """Rank 0 waits in a collective for rank 1, which comes only when rank 0's state has been staged meanwhile."""
    rank, staged = Rank((2,)), Path(folder, "staged")
    rank.train(1)
    rank.live.note(1, rank.state)
    before, answers = rank.local(), []
    if rank.rank == 0:

        def answer(step: int | str) -> None:
            answers.append(step)
            staged.touch()

        rank.live.ask(DEADLINE_S, answer)
        dist.barrier()
        assert rank.has_captured(before)
    else:
        until("the state of rank 0 is staged", staged.exists, DEADLINE_S)
        dist.barrier()
    rank.live.close(rescue=False)
    return answers


def captures_at_the_door(folder: str) -> list[Any]:
    """Ranks 2 and 3 come to the door of step 2 only when the states of 0 and 1 have been staged, who wait there."""
    rank = Rank((2, 2))
    answers: list[int | str] = []

    def apply() -> None:
        rank.optimizer.step()
        rank.state["step"] = 2

    def ask() -> None:
        until("the door", lambda: rank.live._door._turn, DEADLINE_S)
        answers.append(rank.live.capture(DEADLINE_S))
        Path(folder, str(rank.rank)).touch()

    rank.train(1)
    rank.live.note(1, rank.state)
    before = rank.local()
    rank.optimizer.zero_grad()
    rank.loss().backward()
    asking = threading.Thread(target=ask, daemon=True)
    if rank.rank < 2:
        asking.start()
    else:
        until("what is staged", lambda: all(Path(folder, str(each)).exists() for each in range(2)), DEADLINE_S)
    rank.live.finish(2, rank.state, apply)
    if asking.is_alive():
        asking.join(DEADLINE_S)
    steps = [part.attempt.step for part in rank.parts]
    right = [rank.has_captured(each, number) for number, each in enumerate((before, rank.local())) if rank.parts]
    updates = {int(state["step"]) for state in rank.optimizer.state.values()}
    rank.live.close(rescue=False)
    return [answers, steps, right, sorted(updates)]


def tells_what_all_hold() -> list[Any]:
    """Replicas on ranks 0 and 1, without rank 2 and 3's: the parts of half of the ranks are all of the state."""
    rank = Rank((2, 2))
    rank.train(1)
    rank.live.note(1, rank.state)
    rank.live.close(rescue=True)
    part = rank.parts[0]
    sizes = {key: content.numel() for key, content in rank.contents[0].items()}
    shapes = {key: entry.shape for key, entry in part.contents.tensors.items()}
    return [part.attempt, part.rank, sizes, shapes, sorted(part.contents.values)]


def one_rank_cannot() -> tuple[Events, list[Any]]:
    """Rank 1 has what cannot be saved, from the first note or from the second step on."""
    outcomes = []
    for bad_step in (1, 2):
        rank = Rank(())
        for step in (1, 2, 3):
            rank.train(step)
            rank.state["odd"] = {"x": lambda: 1} if rank.rank == 1 and step >= bad_step else {"x": 1}
            rank.live.note(step, rank.state)
        outcomes.append(rank.live.capture(DEADLINE_S, patient=False))
        rank.live.saved(4, rank.state)
        outcomes.append(rank.live.capture(DEADLINE_S, patient=False))
        rank.live.saved(5, rank.state)
        rank.live.close(rescue=True)
        events = rank.events
    return events, outcomes


def the_state_grows() -> list[Any]:
    """A tensor more after step 2, on all ranks: the live state is off until the next save."""
    rank = Rank(())
    found: list[Any] = []
    for step in (1, 2, 3, 4):
        rank.train(step)
        if step >= 2:
            rank.state["more"] = torch.full((3,), float(step))
        if step == 3:
            rank.live.saved(step, rank.state)
        else:
            rank.live.note(step, rank.state)
        found.append(rank.live.capture(DEADLINE_S, patient=False))
    found.append("more" in rank.parts[-1].contents.tensors)
    rank.train(5)
    rank.live.saved(5, rank.state, healthy=False)
    found.append(rank.live.capture(DEADLINE_S, patient=False))
    rank.live.close(rescue=False)
    return found
