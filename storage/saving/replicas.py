"""Whether the copies of one piece of the state are the same on all ranks that hold it, bit by bit.

Ranks that average their gradients step alike, so that replicas differ only where hardware has silently gone wrong, or
a script has. Sums are compared: one for each rank first, among those that hold the same pieces; one for each piece
where that shows a difference, or where a rank holds what no other does. A piece that most of its holders have alike is
given to the others, whose rank and host are told. Where no majority is, nobody knows who is right: the job has to go on
from its last checkpoint, in which all copies were the same, as each save is preceded by this check.

What ranks may have of their own is left out: a `PerRank`, and the buffers of modules, which DDP lets differ.
"""

from __future__ import annotations

import functools
import hashlib
import json
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from storage.errors import ReplicasDiffer
from storage.events import CheckpointEvent, Reporter
from storage.format.checksum import crc32c
from storage.format.tensors import bytes_of
from storage.ranks.agreement import AgreeingGroup
from storage.ranks.group import Expected, Message
from storage.state.modules import ModuleNames, is_fsdp1
from storage.state.objects import Objects, open_state
from storage.state.tree import Flat

_BLOCK_ELEMENTS = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR = 0x5851F42D4C957F2D  # odd, so that nothing of a sum is lost when the next block comes to it


@dataclass(frozen=True)
class Differing:
    """A piece that ranks hold differently: the `ranks` that are in the minority, or all its holders where none is.

    `source`: a rank of the majority, None where there is none; `others` are the ranks of that majority.
    """

    name: str
    ranks: tuple[int, ...]
    source: int | None
    others: tuple[int, ...] = ()


def find_differing(sums_of_rank: Sequence[Mapping[str, int]]) -> list[Differing]:
    """The pieces, by name, of which not all holders have the same sum. Pure."""
    holders: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, sums in enumerate(sums_of_rank):
        for name, total in sums.items():
            holders[name][rank] = total
    found = []
    for name, sum_of_rank in sorted(holders.items()):
        (most, num), *others = Counter(sum_of_rank.values()).most_common()
        if not others:
            continue
        if 2 * num <= len(sum_of_rank):
            found.append(Differing(name, tuple(sum_of_rank), None))
            continue
        agree = tuple(rank for rank, total in sum_of_rank.items() if total == most)
        found.append(Differing(name, tuple(sum_of_rank.keys() - set(agree)), agree[0], agree))
    return found


class ReplicaCheck:
    """Compares what ranks hold in common. Every method without underscore is a collective."""

    def __init__(self, group: AgreeingGroup, report: Reporter) -> None:
        self._group = group
        self._report = report

    def check(self, step: int, state: Mapping[str, Any]) -> None:
        """Compare, and give pieces of the state what most of their holders have.

        Raises:
            ReplicasDiffer: on all ranks, if there is no majority, or the state does not take what it is given.
        """
        if self._group.world_size == 1:
            return
        differing = self._compare(state)
        if not differing:
            return
        self._tell(step, differing)
        if any(piece.source is None for piece in differing):
            raise ReplicasDiffer(_no_majority(step, differing))
        self._heal(state, differing)
        if self._compare(state):
            raise ReplicasDiffer(f"{_names(differing)} still differs after step {step}, though it was set right")

    def _compare(self, state: Mapping[str, Any]) -> list[Differing]:
        """The pieces that differ, with hosts beside the ranks; the same on all ranks."""
        pieces = dict(_pieces(state, self._group.rank))
        sums = dict(zip(pieces, sums_of(list(pieces.values())), strict=True))
        told = [_digest(sums), _digest(sums.values())]
        of_all = [json.loads(data) for data in self._group.all_gather(json.dumps(told).encode())]
        by_names: dict[str, set[str]] = defaultdict(set)
        for names, totals in of_all:
            by_names[names].add(totals)
        alone = [names for names, num in Counter(names for names, _ in of_all).items() if num == 1]
        if not alone and all(len(totals) == 1 for totals in by_names.values()):
            return []
        gathered = self._group.gather(json.dumps(sums).encode())
        rows = self._group.on_coordinator(
            lambda: [asdict(piece) for piece in find_differing([json.loads(data) for data in gathered or []])]
        )
        return [Differing(row["name"], tuple(row["ranks"]), row["source"], tuple(row["others"])) for row in rows]

    def _tell(self, step: int, differing: Sequence[Differing]) -> None:
        hosts = [data.decode() for data in self._group.all_gather(socket.gethostname().encode())]
        if not self._group.is_coordinator:
            return
        by_rank: dict[int, list[Differing]] = defaultdict(list)
        for piece in differing:
            for rank in piece.ranks:
                by_rank[rank].append(piece)
        for rank, pieces in sorted(by_rank.items()):
            self._report(
                CheckpointEvent.REPLICA_DIFFERS,
                step=step,
                on_rank=rank,
                host=hosts[rank],
                num=len(pieces),
                name=pieces[0].name,
                others=list(pieces[0].others or [other for other in pieces[0].ranks if other != rank]),
                healed=all(piece.source is not None for piece in pieces),
            )

    def _heal(self, state: Mapping[str, Any], differing: Sequence[Differing]) -> None:
        pieces = dict(_pieces(state, self._group.rank))
        for piece in differing:
            mine = pieces.get(piece.name)
            sends, receives, into = [], [], None
            if mine is not None and piece.source == self._group.rank:
                data = np.frombuffer(bytes_of(mine.detach().cpu().contiguous()), np.uint8)
                sends = [Message(rank, data) for rank in piece.ranks]
            elif mine is not None and self._group.rank in piece.ranks:
                into = torch.empty(mine.shape, dtype=mine.dtype)
                assert piece.source is not None
                receives = [Expected(piece.source, np.frombuffer(bytes_of(into), np.uint8))]
            self._group.swap(sends, receives)
            if mine is not None and into is not None:
                with torch.no_grad():
                    mine.copy_(into)


def _no_majority(step: int, differing: Sequence[Differing]) -> str:
    ranks = sorted({rank for piece in differing if piece.source is None for rank in piece.ranks})
    told = " and ".join(f"rank {rank}" for rank in ranks[:4]) + (" and others" if len(ranks) > 4 else "")
    return (
        f"after step {step} {told} hold {_names(differing)} differently, and no majority says who is right; start again"
        " from the last checkpoint, in which they were the same (checkpoint_replica_differs names their hosts), or wrap"
        " in PerRank(...) what each rank has of its own"
    )


def _names(differing: Sequence[Differing]) -> str:
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{differing[0].name!r}{more}"


def _digest(values: Any) -> str:
    return hashlib.blake2b(json.dumps(list(values)).encode(), digest_size=8).hexdigest()


def _pieces(state: Mapping[str, Any], rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank holds of the tensors that are compared, by name and place; in no order of its own."""
    flat, objects = open_state(state, rank)
    compared = set(_compared(flat, objects))
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({name: flat.leaves[name] for name in compared}, is_coordinator=True)
    for item in sorted(planner.create_local_plan().items, key=lambda item: (item.index.fqn, str(item.index.offset))):
        tensor = planner.resolve_data(item)
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            place = "" if item.index.offset is None else list(item.index.offset)
            yield f"{item.index.fqn}{place}", tensor


def _compared(flat: Flat, objects: Objects) -> Iterator[str]:
    """The names of the leaves that each of their holders must hold alike."""
    apart = {container.path for container in flat.containers if container.kind == "per_rank"}
    buffers = set()
    for path, module in objects.given.items():
        if isinstance(module, nn.Module) and not is_fsdp1(module):
            names = ModuleNames(module)
            buffers |= {(*path, names.clean(name)) for name, _ in module.named_buffers()}
    for name, path in flat.paths.items():
        above = {path[:length] for length in range(len(path) + 1)}
        if not above & apart and path not in buffers:
            yield name


def sums_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """A sum of each tensor's bytes, equal for equal ones; on a device it is made there, and read back once for all."""
    sums: dict[int, int] = {}
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        plain = tensor.detach().resolve_conj().resolve_neg()
        if plain.device.type == "cpu":
            sums[number] = crc32c(bytes_of(plain.contiguous()))
        else:
            by_device[plain.device].append(number)
    for numbers in by_device.values():
        found = torch.stack([device_sum(tensors[number].detach()) for number in numbers]).cpu().tolist()
        sums.update(zip(numbers, found, strict=True))
    return [sums[number] for number in range(len(tensors))]


def device_sum(tensor: torch.Tensor) -> torch.Tensor:
    """A sum of the bytes as an int64 scalar on the tensor's device, made without waiting for it.

    Its elements, as whole numbers, times odd weights at random, modulo 2^64: any one element that changes, changes it.
    """
    plain = tensor.resolve_conj().resolve_neg()
    flat = (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous().flatten()
    whole = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=whole.device)
    for block in whole.split(_BLOCK_ELEMENTS):
        total = total * _FACTOR + (block.to(torch.int64) * _weights(whole.device)[: len(block)]).sum()
    return total


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(1 << 62), 1 << 62, (_BLOCK_ELEMENTS,), generator=generator)
    return (2 * drawn + 1).to(device)
