"""Where layers are gathered: on a CPU into the memory of two, by turns, which is never given back."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elastic_moe.model.decoder import Decoder
from elastic_moe.pool import Pool
from elastic_moe.torch_private import gather_into
from launcher import MeshPlan

_NUM_TURNS = 2
_MATRICES_OF_EXPERT = 3


class Turns:
    """The places of a model's gathered parameters: the layers' in turn, and those of whatever stays gathered.

    No more than two layers are gathered at a time, which are neighbours: FSDP2 gathers one ahead in the backward pass,
    and the engine of autograd is through with a layer, the reduction of its gradients included, before it begins
    anything of the one before it: it takes operations in the reverse of the order in which they were recorded. The
    last layer may stay gathered from the forward to the backward pass and what is outside the layers does (see
    `begin_round`), so these have places of their own; so has each layer where all stay gathered.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.all_stay = False
        self._places: dict[tuple[object, ...], Tensor] = {}
        self._has_turns = False

    def stay(self) -> None:
        """Have layers stay gathered; to be said before the first is. Raises RuntimeError after that."""
        if self._has_turns:  # no assert, which may be left out: what follows would be wrong numbers
            raise RuntimeError("layers of this model are gathered by turns, so they cannot stay gathered")
        self.all_stay = True

    def of_layer(self, layer: int, unit: str) -> Callable[[int, int, torch.dtype], Tensor]:
        """Where a unit of a layer that takes turns is gathered."""

        def place(index: int, num: int, dtype: torch.dtype) -> Tensor:
            self._has_turns |= not self.all_stay
            turn = layer if self.all_stay else layer % _NUM_TURNS
            key = (turn, unit, index, num, dtype)
            if key not in self._places:
                self._places[key] = self.pool.take([num], dtype)
            return self._places[key]

        return place

    def apart(self, index: int, num: int, dtype: torch.dtype) -> Tensor:
        """Where a unit is gathered that takes no turns."""
        return self.pool.take([num], dtype)


_turns: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()


def gather_by_turns(model: Decoder, pool: Pool) -> None:
    """Have the units of a model gathered into memory that is theirs, or their turn's, for good."""
    turns = _turns[model] = Turns(pool)
    for layer, block in enumerate(model.blocks[:-1]):
        for name, module in block.named_modules():
            if isinstance(module, FSDPModule):
                gather_into(module, turns.of_layer(layer, name))
    for module in (model, *model.blocks[-1].modules()):
        if isinstance(module, FSDPModule):
            gather_into(module, turns.apart)


def turns_of(model: Decoder) -> Turns | None:
    """Those of a model that `gather_by_turns` has seen."""
    return _turns.get(model)


def expect_first_step(model: Decoder, plan: MeshPlan, compute: torch.dtype) -> mmap.mmap | None:
    """Map what a first step takes of a model's pool: gradients, and parameters where they are gathered and reduced.

    None where there is no pool.
    """
    turns = turns_of(model)
    if turns is None:
        return None
    own_num, of_root, of_experts = 0, 0, 0
    of_layer = [0] * len(model.blocks)
    for name, param in model.named_parameters():
        local_num = (param.to_local() if isinstance(param, DTensor) else param).numel()
        is_expert = ".experts." in name
        num = local_num * plan.shard * (1 if is_expert else plan.expert)
        own_num += local_num
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            of_layer[layer] += num
            of_experts = max(of_experts, num if is_expert else 0)
        else:
            of_root += num
    gathered = of_root + sum(sorted(of_layer)[-1 - _NUM_TURNS :])
    flat = max(of_layer) if plan.shard * plan.expert > 1 else 0
    sent = of_root + max(of_layer)
    experts = _MATRICES_OF_EXPERT * of_experts
    return turns.pool.expect(4 * (own_num + sent) + compute.itemsize * (gathered + flat + experts))
