"""Where layers are gathered: on a CPU into the memory of one, by turns, which is never given back."""

from __future__ import annotations

import mmap
import weakref
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elastic_moe.model.decoder import Decoder
from elastic_moe.pool import Pool
from elastic_moe.torch_private import gather_into
from launcher import MeshPlan

_MATRICES_OF_EXPERT = 3


class Turns:
    """The places of a model's gathered parameters: one where layers take turns, and those of whatever stays gathered.

    No two layers lie gathered at a time. What FSDP2 fetches one ahead in the backward pass it writes to its place only
    as that layer begins; and the engine of autograd is through with a layer, the reduction of its gradients included,
    before it begins anything of the one before it: it takes operations in the reverse of the order in which they were
    recorded. None of that is promised, so a layer that would be gathered over another one is an error. The last layer
    may stay gathered from the forward to the backward pass and what is outside the layers does (see `begin_round`), so
    these have places of their own; so has each layer where all stay gathered.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.all_stay = False
        self.places: dict[tuple[object, ...], Tensor] = {}
        self.computed_with: dict[str, int] = {}
        """By unit: the layer that is gathered where they take turns."""

    def stay(self) -> None:
        """Have layers stay gathered; to be said before the first is. Raises RuntimeError after that."""
        if self.places and not self.all_stay:  # no assert, which may be left out: what follows would be wrong numbers
            raise RuntimeError("layers of this model are gathered by turns, so they cannot stay gathered")
        self.all_stay = True


class TurnSeat:
    """Where a unit of a layer that takes turns is gathered."""

    def __init__(self, turns: Turns, layer: int, unit: str) -> None:
        self._turns, self._layer, self._unit = turns, layer, unit

    def place(self, index: int, num: int, dtype: torch.dtype) -> Tensor:
        """The same for each layer, unless all of them stay."""
        turns = self._turns
        key = (self._layer if turns.all_stay else 0, self._unit, index, num, dtype)
        if key not in turns.places:
            turns.places[key] = turns.pool.take([num], dtype)
        return turns.places[key]

    def take(self) -> None:
        """Raises RuntimeError where another layer is still computed with."""
        turns = self._turns
        if turns.all_stay:
            return
        other = turns.computed_with.setdefault(self._unit, self._layer)
        if other != self._layer:
            raise RuntimeError(f"layer {self._layer} would be gathered over layer {other}, which is still in use")

    def leave(self) -> None:
        """Let the next layer have the place."""
        if self._turns.computed_with.get(self._unit) == self._layer:
            del self._turns.computed_with[self._unit]


class OwnSeat:
    """Where a unit is gathered that takes no turns."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def place(self, index: int, num: int, dtype: torch.dtype) -> Tensor:
        """Its own."""
        return self._pool.take([num], dtype)

    def take(self) -> None:
        """Nobody else is there."""

    def leave(self) -> None:
        """Nobody else comes."""


_turns: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()


def gather_by_turns(model: Decoder, pool: Pool) -> None:
    """Have the units of a model gathered into memory that is theirs, or their turn's, for good."""
    turns = _turns[model] = Turns(pool)
    for layer, block in enumerate(model.blocks[:-1]):
        for name, module in block.named_modules():
            if isinstance(module, FSDPModule):
                gather_into(module, TurnSeat(turns, layer, name))
    for module in (model, *model.blocks[-1].modules()):
        if isinstance(module, FSDPModule):
            gather_into(module, OwnSeat(pool))


def turns_of(model: Decoder) -> Turns | None:
    """Those of a model that `gather_by_turns` has seen."""
    return _turns.get(model)


def expect_first_step(
    model: Decoder, plan: MeshPlan, compute: torch.dtype, *, exact: bool, keep_gathered: bool = False
) -> mmap.mmap | None:
    """Map what a first step takes of a model's pool: gradients, and parameters where they are gathered and reduced.

    None where there is no pool.

    Args:
        exact: whether the experts are gathered, and all gradients reduced, in float64; see `Precision`.
        keep_gathered: whether all layers stay gathered, each in its own place.
    """
    turns = turns_of(model)
    if turns is None:
        return None
    expert_bytes, reduced_bytes = (8, 8) if exact else (compute.itemsize, 4)
    own_num = 0
    of_root, of_layer, of_experts = _Bytes(), [_Bytes() for _ in model.blocks], 0
    for name, param in model.named_parameters():
        local_num = (param.to_local() if isinstance(param, DTensor) else param).numel()
        is_expert = ".experts." in name
        num = local_num * plan.shard * (1 if is_expert else plan.expert)
        own_num += local_num
        unit = of_layer[int(name.split(".")[1])] if name.startswith("layers.") else of_root
        unit.gathered += num * (expert_bytes if is_expert else compute.itemsize)
        unit.reduced += num * reduced_bytes
        if is_expert:
            of_experts = max(of_experts, num * expert_bytes)
    gathered, reduced = (sorted(sizes) for sizes in zip(*map(astuple, of_layer), strict=True))
    at_once = gathered if keep_gathered else gathered[-2:]
    num_bytes = of_root.gathered + sum(at_once) + of_root.reduced + reduced[-1]
    num_shards = plan.shard * plan.expert
    if num_shards > 1:
        num_bytes += gathered[-1]
    if exact:  # shards of gradients come out in float64 and become fp32 ones elsewhere, as experts' gradients are made
        # FSDP2 holds what replicas have added up until the backward pass has ended.
        of_layers = sum(reduced) if plan.replicate > 1 else reduced[-1]
        num_bytes += (of_root.reduced + of_layers) // num_shards
    else:
        num_bytes += 4 * own_num + _MATRICES_OF_EXPERT * of_experts
    return turns.pool.expect(num_bytes)


@dataclass
class _Bytes:
    """What a unit takes as it is gathered, and as its gradients are reduced."""

    gathered: int = 0
    reduced: int = 0
