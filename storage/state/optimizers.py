"""An optimizer's state under its parameters' names, and back into an optimizer that may never have made a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from storage.errors import UnsupportedValue
from storage.state.modules import is_fsdp1, parameter_names
from storage.torch_private import init_optimizer_state, is_flattened_by_fsdp1

log = logging.getLogger(__name__)


class NamedOptimizer:
    """An optimizer, and the modules of the state in which its parameters' names are looked up.

    The state has the form that `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives it: names where
    an optimizer's own `state_dict` has numbers. Parameters that are in no module of the state go by the optimizer's
    own names for them, or by their number.
    """

    def __init__(self, optimizer: Optimizer, modules: Mapping[str, nn.Module]) -> None:
        self.optimizer = optimizer
        self.parameters: list[torch.Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._sharded = next(
            (
                module
                for module in modules.values()
                if is_fsdp1(module) and not {id(p) for p in module.parameters()}.isdisjoint(map(id, self.parameters))
            ),
            None,
        )
        if self._sharded is None and any(map(is_flattened_by_fsdp1, self.parameters)):
            raise UnsupportedValue(
                "an optimizer has parameters that FullyShardedDataParallel has flattened, and the module they are of is"
                " not in the state; keep it there, in a dict or a list"
            )
        known = parameter_names(modules, self.parameters)
        own = [
            name
            for group in optimizer.param_groups
            for name in group.get("param_names") or [None] * len(group["params"])
        ]
        self.names = [
            known.get(id(parameter), name or str(number))
            for number, (parameter, name) in enumerate(zip(self.parameters, own, strict=True))
        ]
        self.by_name = dict(zip(self.names, self.parameters, strict=True))
        if len(self.by_name) < len({id(parameter) for parameter in self.parameters}):
            raise UnsupportedValue(
                "an optimizer has two parameters of one name; keep all modules they are of in the state"
            )

    @property
    def is_fsdp1(self) -> bool:
        """Whether only torch can take the optimizer's state apart, which `state` and `load` then have it do."""
        return self._sharded is not None

    def state(self) -> dict[str, Any]:
        """The optimizer's state, to be saved."""
        if self._sharded is not None:
            from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

            return get_optimizer_state_dict(self._sharded, self.optimizer)
        raw = self.optimizer.state_dict()
        return {
            **raw,
            "state": {self._name(key): value for key, value in raw["state"].items()},
            "param_groups": [
                {**group, "params": [self._name(number) for number in group["params"]]} for group in raw["param_groups"]
            ],
        }

    def _name(self, key: Any) -> Any:
        return self.names[key] if type(key) is int and 0 <= key < len(self.names) else key

    def has_state(self) -> bool:
        """Whether the optimizer has a state for any parameter yet."""
        return bool(self.optimizer.state)

    def init_state(self) -> None:
        """Have the optimizer make the state of a first step, by a step that changes nothing."""
        init_optimizer_state(self.optimizer)

    def state_of(self, name: str) -> dict[str, Any]:
        """The state that the parameter of that name has now; empty if it has none."""
        found = self.optimizer.state.get(self.by_name[name], {})
        return found if isinstance(found, dict) else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load what `state` gave, or something of the same form."""
        if self._sharded is not None:
            from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

            set_optimizer_state_dict(self._sharded, self.optimizer, dict(state))
            return
        number_of = {name: number for number, name in enumerate(self.names)}
        of_parameter = {number_of.get(name, name): value for name, value in state["state"].items()}
        groups = [{**group, "params": [number_of[name] for name in group["params"]]} for group in state["param_groups"]]
        self.optimizer.load_state_dict({**state, "state": of_parameter, "param_groups": groups})
        for key, value in of_parameter.items():
            if type(key) is int and isinstance(value, dict):
                loaded = self.optimizer.state.get(self.parameters[key])
                if isinstance(loaded, dict):
                    _mend(loaded, value)


def _mend(loaded: dict[Any, Any], saved: Mapping[Any, Any]) -> None:
    """Undo what torch's `load_state_dict` does to states of another dtype than the parameter's, and to text in them."""
    for key, value in saved.items():
        now = loaded.get(key)
        if isinstance(value, torch.Tensor):
            if isinstance(now, torch.Tensor) and now.dtype != value.dtype and key != "step":
                loaded[key] = value.to(now.device)
        elif isinstance(value, (str, bytes)):
            loaded[key] = value


def like_parameter(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of the parameter's shape, on its device, and sharded as it is."""
    return torch.empty_like(parameter.detach(), dtype=dtype, requires_grad=False)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether each rank holds a part of the parameter."""
    return isinstance(parameter, DTensor)
