"""States drawn from a grammar: nested containers with all kinds of keys, tensors, optimizers, schedulers, parts of each
rank's own. A seed and a rank make one; and one for a fresh start, whose containers are of other lengths or missing."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from storage import Checkpointer, PerRank

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.1, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
}
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "multistep": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "onecycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=50, cycle_momentum=False),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]),
}


def model(seed: int) -> nn.Module:
    """A small one with buffers, a frozen parameter and one that is used twice."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2))
    made[2].bias.requires_grad_(False)
    made.add_module("tied", nn.Linear(6, 8))
    made.tied.weight = made[0].weight
    return made


def train(made: nn.Module, optimizer: Optimizer, num_steps: int, seed: int = 0) -> list[float]:
    """Some steps on made-up data; the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(num_steps):
        x = torch.randn(5, 6, generator=generator)

        def closure(x: torch.Tensor = x) -> Any:
            optimizer.zero_grad()
            loss = made[3](made[2](made[1](made[0](x)))).square().mean()  # type: ignore[index]
            loss.backward()
            return loss.detach()

        losses.append(optimizer.step(closure).item())  # type: ignore[attr-defined]
    return losses


class Box:
    """An object with a state that can be anything."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Draw:
    """One state. `rank` matters only within what each rank has of its own."""

    def __init__(self, seed: int, rank: int, mesh: DeviceMesh | None = None) -> None:
        self._random = random.Random(seed)
        self._rank = rank
        self._mesh = mesh

    def state(self) -> dict[Any, Any]:
        """A dict of one to five parts."""
        pick = self._random
        parts = {f"part{number}": self._part() for number in range(pick.randint(1, 4))}
        if pick.random() < 0.3:
            parts["model"] = model(pick.randrange(100))
            optimizer = OPTIMIZERS[pick.choice(list(OPTIMIZERS))](
                [p for p in parts["model"].parameters() if p.requires_grad]
            )
            train(parts["model"], optimizer, pick.randint(0, 3))
            parts["optimizer"] = optimizer
            if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
                parts["scheduler"] = SCHEDULERS[pick.choice(list(SCHEDULERS))](optimizer)
        return parts

    def _part(self) -> Any:
        pick = self._random
        kind = pick.randrange(10)
        if kind == 0:
            return PerRank(self._own(3))
        if kind == 1:
            return Box(self._container(3))
        if kind == 2 and self._mesh is not None:
            return distribute_tensor(self._tensor(min_dims=1), self._mesh, [Shard(0)])
        return self._value(3)

    def _own(self, depth: int) -> Any:
        """Something else on each rank, also in its form."""
        seed = self._random.randrange(1 << 30)
        return Draw(seed + self._rank, self._rank)._value(depth)

    def _value(self, depth: int) -> Any:
        kind = self._random.randrange(10)
        if depth and kind < 4:
            return self._container(depth)
        return self._tensor() if kind < 7 else self._plain()

    def _container(self, depth: int) -> Any:
        pick = self._random
        kind = pick.randrange(7)
        length = pick.choice([0, 1, 2, 2, 3, 5])
        if kind == 0:
            return [self._value(depth - 1) for _ in range(length)]
        if kind == 1:
            return Counter({self._key(): pick.randrange(9) for _ in range(length)})
        children = [(self._key(), self._value(depth - 1)) for _ in range(length)]
        if kind == 2:
            return OrderedDict(children)
        if kind == 3:
            return defaultdict(pick.choice([int, list, None]), children)
        return dict(children)

    def _key(self) -> Any:
        pick = self._random
        number = pick.randrange(4)
        return pick.choice(
            [f"k{number}", f"k{number}", number, str(number), None, "None", True, "a.b", "", (1, "x"), b"\0", 0.5]
        )

    def _plain(self) -> Any:
        pick = self._random
        return pick.choice(
            [
                None,
                True,
                3,
                -(1 << 80),
                2.5,
                math.inf,
                math.nan,
                "text\n\0é",
                b"\xff",
                1j,
                [],
                [1, [2]],
                (),
                (1, (None,)),
                {1, 2},
                (torch.arange(3), {"a": 1}),
                pick.random(),
            ]
        )

    def _tensor(self, min_dims: int = 0) -> torch.Tensor:
        pick = self._random
        shape = [pick.choice([0, 1, 1, 2, 3, 7]) for _ in range(pick.randint(min_dims, 3))]
        dtype = pick.choice(DTYPES)
        generator = torch.Generator().manual_seed(pick.randrange(1 << 30))
        made = (torch.randn(shape, generator=generator) * 50).to(dtype)
        if dtype is torch.complex64:
            made = torch.complex(made.real, torch.randn(shape, generator=generator))
        if len(shape) > 1 and pick.random() < 0.3:
            made = made.transpose(0, 1).contiguous().transpose(0, 1)
        if len(shape) and pick.random() < 0.2:
            made = torch.cat([made, made])[: shape[0]]
        return made


def fresh(value: Any, seed: int) -> Any:
    """What a restart has in the place of `value`, before it is restored: zeros, and containers that fit badly."""
    pick = random.Random(seed)

    def other(value: Any, inside: bool) -> Any:
        if isinstance(value, DTensor):
            return distribute_tensor(torch.zeros(value.shape, dtype=value.dtype), value.device_mesh, value.placements)
        if isinstance(value, torch.Tensor):
            return torch.zeros(value.shape, dtype=value.dtype)
        if isinstance(value, PerRank):
            return PerRank(other(value.value, True))
        if isinstance(value, Box):
            return Box(pick.choice([None, {}, [], other(value.state, True)]))
        if isinstance(value, list):
            kept = [other(entry, True) for entry in value]
            return kept[: pick.randint(0, len(kept))] if pick.random() < 0.5 else [*kept, pick.choice([None, 5, {}])]
        if isinstance(value, Mapping):
            if any(isinstance(child, torch.Tensor) for child in value.values()):  # those are asked for by name
                return (
                    type(value)({key: other(child, True) for key, child in value.items()})  # type: ignore[call-arg]
                    if not isinstance(value, defaultdict)
                    else defaultdict(value.default_factory, {key: other(child, True) for key, child in value.items()})
                )
            return pick.choice([{}, None if inside else {}, {"other": 1}, {3: None}])
        return pick.choice([None, 0, "other"])

    made: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, nn.Module):
            made[key] = model(1000)
        elif isinstance(part, Optimizer):
            name = next(
                name
                for name, make in OPTIMIZERS.items()
                if _settings(make([nn.Parameter(torch.zeros(1))])) == _settings(part)
            )
            made[key] = OPTIMIZERS[name]([p for p in made["model"].parameters() if p.requires_grad])
        elif isinstance(part, schedulers.LRScheduler) or hasattr(part, "last_epoch"):
            made[key] = next(
                make(made["optimizer"]) for make in SCHEDULERS.values() if type(make(_throwaway())) is type(part)
            )
        else:
            made[key] = other(part, False)
    return made


def _throwaway() -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def _settings(optimizer: Optimizer) -> Any:
    names = ("amsgrad", "fused", "momentum", "foreach")
    return type(optimizer), [optimizer.param_groups[0].get(name) for name in names]


def plain(value: Any) -> Any:
    """The state as what can be compared; objects as their states."""
    if isinstance(value, PerRank):
        return plain(value.value)
    if isinstance(value, Box):
        return plain(value.state)
    if hasattr(value, "state_dict"):
        return plain(dict(value.state_dict()))
    if isinstance(value, Mapping):
        return (
            type(value),
            [(key, plain(child)) for key, child in value.items()],
            getattr(value, "default_factory", 0),
        )
    if isinstance(value, (list, tuple)):
        return (type(value), [plain(entry) for entry in value])
    return value


def same(left: Any, right: Any) -> bool:
    """Whether two results of `plain` are equal in types and content, order of keys included."""
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor) or left.dtype != right.dtype or left.shape != right.shape:
            return False
        if isinstance(left, DTensor):
            left, right = left.to_local(), right.to_local()  # type: ignore[attr-defined]
        return torch.equal(
            torch.view_as_real(left) if left.is_complex() else left,
            torch.view_as_real(right) if right.is_complex() else right,
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and left != left:
        return right != right
    return bool(left == right)


class Net(nn.Module):
    """Linear layers of these names."""

    def __init__(self, *layers: str) -> None:
        super().__init__()
        for name in layers:
            self.add_module(name, nn.Linear(2, 2))


def saved_then_restored(folder: Path, saved: dict[Any, Any], fresh: dict[Any, Any], **options: Any) -> dict[Any, Any]:
    """`fresh` after a restore of what was `saved`."""
    with Checkpointer(str(folder)) as checkpointer:
        checkpointer.save(1, saved, wait=True)
    with Checkpointer(str(folder)) as checkpointer:
        assert checkpointer.restore(fresh, **options) == 1
    return fresh
