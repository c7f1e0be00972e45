"""A module's state under the names of its parameters, whatever the module is wrapped in."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from storage.torch_private import COMPILED_MODULE


class ModuleNames:
    """Takes out of the names in a module what DistributedDataParallel, DataParallel and torch.compile put into them."""

    def __init__(self, module: nn.Module) -> None:
        self._wrappers: set[str] = set()
        for name, inner in module.named_modules(remove_duplicate=False):
            attribute = _wrapper_attribute(inner)
            if attribute is not None:
                self._wrappers.add(f"{name}.{attribute}" if name else attribute)

    def clean(self, name: str) -> str:
        """The name that it would be without wrappers."""
        if not self._wrappers:
            return name
        parts, kept = name.split("."), []
        for number, part in enumerate(parts):
            if ".".join(parts[: number + 1]) not in self._wrappers:
                kept.append(part)
        return ".".join(kept)


def _wrapper_attribute(module: nn.Module) -> str | None:
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    # looked up by name: dynamo is a second to import, and who has compiled a module has imported it
    return COMPILED_MODULE if type(module).__name__ == "OptimizedModule" and hasattr(module, COMPILED_MODULE) else None


def is_fsdp1(module: nn.Module) -> bool:
    """Whether the module or one in it is a FullyShardedDataParallel, whose state only torch itself can name."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(inner, fsdp.FullyShardedDataParallel) for inner in module.modules())


def module_state(module: nn.Module) -> dict[str, Any]:
    """The module's `state_dict()` under clean names; sharded, where it is a FullyShardedDataParallel."""
    if is_fsdp1(module):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(module)
    names = ModuleNames(module)
    return {names.clean(name): value for name, value in module.state_dict().items()}


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `module_state` gave back into the module."""
    if is_fsdp1(module):
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(module, dict(state))
        return
    names = ModuleNames(module)
    raw = {names.clean(name): name for name in module.state_dict()}
    module.load_state_dict({raw[name]: value for name, value in state.items()})


def parameter_names(modules: Mapping[str, nn.Module], wanted: Collection[torch.Tensor]) -> dict[int, str]:
    """The names, by id, of the `wanted` parameters that are in one of the modules.

    `modules` are by their names in the state. Where the parameters are of several modules, these begin their names.
    """
    ids = {id(parameter) for parameter in wanted}
    found: dict[str, dict[int, str]] = {}
    for prefix, module in modules.items():
        names = ModuleNames(module)
        of_module = {id(p): names.clean(name) for name, p in module.named_parameters() if id(p) in ids}
        if of_module:
            found[prefix] = of_module
        ids -= of_module.keys()
    if len(found) == 1:
        return next(iter(found.values()))
    return {key: f"{prefix}.{name}" for prefix, names in found.items() for key, name in names.items()}


def shared_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that every rank holds whole, and so must be the same on all."""
    from torch.distributed.tensor import DTensor

    if is_fsdp1(module):
        return
    names = ModuleNames(module)
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            yield names.clean(name), parameter.detach()
