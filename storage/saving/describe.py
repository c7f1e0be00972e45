"""What a rank holds of a training state, by DCP's planner."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from storage.arena.pending import StagingListener
from storage.arena.stager import Staged, Stager
from storage.errors import UnsupportedValue
from storage.format.containers import Container, Path
from storage.format.framing import EncodedItem
from storage.format.manifest import TensorEntry, ValueEntry
from storage.format.tensors import oddity
from storage.format.values import encode_value
from storage.run.attempt import StateContents
from storage.saving.saveplan import Chunk, Share, dump_share
from storage.saving.writing import Payload
from storage.state.fingerprint import fingerprint
from storage.state.objects import Objects, open_state
from storage.state.tree import Flat, join_containers
from storage.torch_private import shards_of

_PARAMETER_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Holdings:
    """What this rank could write of the state: one chunk for each write item of the planner.

    `sums`: by name, fingerprints of what every rank must hold alike. `digest`: a sum of the chunks and containers.
    """

    planner: DefaultSavePlanner
    items: tuple[WriteItem, ...]
    chunks: tuple[Chunk, ...]
    containers: tuple[Container, ...]
    sums: Mapping[str, str]
    digest: str
    kinds: tuple[Any, ...] | None = None
    """All that the planner looks at of the state: where it is the same, so are `items`. None: it cannot be told."""
    leaves: Mapping[str, Any] = field(default_factory=dict)
    """The state's own, by name."""

    def without_state(self) -> Holdings:
        """What is known of the state, and nothing that keeps it alive."""
        return replace(self, planner=DefaultSavePlanner(), sums={}, leaves={})

    @property
    def share(self) -> Share:
        """The part of it that the coordinator has to know."""
        return Share(self.chunks, self.containers)

    def encode_values(self, positions: Collection[int]) -> dict[int, EncodedItem]:
        """Encode the values among the chunks at `positions`. Raises UnsupportedValue."""
        return {
            position: encode_value(self.chunks[position].key, self.planner.lookup_object(self.items[position].index))
            for position in positions
            if self.chunks[position].sizes is None
        }

    def stage(
        self, picks: Collection[int], values: dict[int, EncodedItem], stager: Stager, listener: StagingListener
    ) -> tuple[list[Payload], Staged]:
        """Copy the content of the picked chunks, so that the state may change as `Staging` says.

        `values`: the values that are encoded already, by position. Raises UnsupportedValue, MemoryError.
        """
        missing = [position for position in picks if position not in values]
        values = {**values, **self.encode_values(missing)}
        tensors = [position for position in missing if position not in values]
        with torch.no_grad():  # else each DTensor makes a node of a graph
            local = [(self.chunks[position].key, self.tensor(position)) for position in tensors]
        staged = stager.stage(local, listener)
        payloads = [
            *(Payload(self.chunks[position], item) for position, item in values.items() if position in picks),
            *(Payload(self.chunks[p], tensor) for p, tensor in zip(tensors, staged.tensors, strict=True)),
        ]
        return payloads, staged

    def tensor(self, position: int) -> torch.Tensor:
        """The tensor of a chunk, in the state's own memory."""
        tensor = self.leaves.get(self.chunks[position].key)
        if type(tensor) is DTensor:  # most are of these kinds, of which a rank has one chunk: DCP looks for longer
            tensor = tensor.to_local()
        elif type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
            tensor = self.planner.resolve_data(self.items[position])
        assert isinstance(tensor, torch.Tensor)
        return tensor


def describe(
    state: Mapping[Any, Any],
    rank: int,
    *,
    compares: bool = True,
    compares_parameters: bool = False,
    before: Holdings | None = None,
) -> Holdings:
    """Take `state` apart as DCP does, and list what this rank holds of it; most often as it was `before`.

    Without `compares` there are no `sums`; with `compares_parameters` the modules' parameters are among them.

    Raises:
        UnsupportedValue: a tensor that is more than its numbers (`oddity`); see also `storage.state.tree.flatten`.
    """
    flat, objects = open_state(state, rank)
    holdings = holdings_of(flat, rank, before)
    sums = {name: fingerprint(flat.leaves[name]) for name in _shared(flat, objects)} if compares else {}
    if compares:
        sums |= {name: fingerprint(length) for name, length in flat.lengths.items()}
    if compares_parameters:
        sums |= {name: fingerprint(p, _PARAMETER_SAMPLE_BYTES) for name, p in objects.unsynchronised()}
    return replace(holdings, sums=sums)


def holdings_of(flat: Flat, rank: int, before: Holdings | None = None) -> Holdings:
    """What `describe` finds in a state that was taken apart, without `sums`. Raises UnsupportedValue.

    Of one that has changed in its numbers only nothing is planned anew: that takes DCP 0.1 ms for each DTensor.
    """
    kinds: tuple[Any, ...] | None = None
    if before is not None and before.kinds is not None:
        with contextlib.suppress(RuntimeError):  # odd tensors have no shape, say
            kinds = _kinds_of(flat)
    is_as_before = before is not None and kinds is not None and kinds == before.kinds
    if not is_as_before:
        check_tensors(flat.leaves)
        kinds = _kinds_of(flat)
    # what can be told of has nothing in it to be flattened, and DCP would look through all of it
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=not is_as_before)
    planner.set_up_planner(flat.leaves, is_coordinator=rank == 0)
    if before is not None and is_as_before:
        return replace(before, planner=planner, sums={}, leaves=flat.leaves)
    items = tuple(planner.create_local_plan().items)
    chunks = tuple(chunk_of(item, flat.paths[item.index.fqn]) for item in items)
    share = Share(chunks, tuple(flat.containers))
    digest = hashlib.blake2b(dump_share(share), digest_size=16).hexdigest()
    return Holdings(planner, items, chunks, share.containers, {}, digest, kinds, flat.leaves)


def _kinds_of(flat: Flat) -> tuple[Any, ...] | None:
    found: list[Any] = [tuple(flat.paths.values()), tuple(flat.containers)]
    for name, leaf in flat.leaves.items():
        if shards_of(leaf) is not None:
            return None
        kind: tuple[Any, ...] = (name, type(leaf)) if isinstance(leaf, torch.Tensor) else (name,)
        if isinstance(leaf, torch.Tensor):
            kind += (leaf.dtype, leaf.shape, leaf.layout, leaf.device.type, leaf.is_nested, leaf.requires_grad)
        if isinstance(leaf, DTensor):
            kind += (leaf.placements, leaf.device_mesh)
        found.append(kind)
    return tuple(found)


def _shared(flat: Flat, objects: Objects) -> list[str]:
    """The names of leaves that must be the same on every rank that has them: those neither in a PerRank nor sharded.

    What a module holds is its own matter (DDP lets buffers differ, and has those of rank 0 win), and so are an
    optimizer's tensors, which follow from the parameters.
    """
    left_out = {container.path for container in flat.containers if container.kind == "per_rank"}
    left_out |= {path for path, value in objects.given.items() if isinstance(value, torch.nn.Module)}
    optimizers = {path for path, value in objects.given.items() if isinstance(value, torch.optim.Optimizer)}
    found = []
    for name, leaf in flat.leaves.items():
        is_tensor = isinstance(leaf, torch.Tensor)
        if is_tensor and type(leaf) is not torch.Tensor:
            continue
        path = flat.paths[name]
        above = {path[:length] for length in range(len(path) + 1)}
        if not above.isdisjoint(left_out) or (is_tensor and not above.isdisjoint(optimizers)):
            continue
        if is_tensor or shards_of(leaf) is None:
            found.append(name)
    return found


def check_tensors(flat: Mapping[str, Any]) -> None:
    """Raise UnsupportedValue if a tensor of a flattened state is more, or less, than its numbers."""
    for key, value in flat.items():
        for tensor in _local(value):
            if (why := oddity(tensor)) is not None:
                raise UnsupportedValue(f"state {key!r} is a tensor {why}")


def _local(value: Any) -> list[torch.Tensor]:
    """The tensors that this rank has of an entry of the state."""
    if (shards := shards_of(value)) is not None:
        return shards
    if isinstance(value, DTensor):
        with torch.no_grad():
            return [value.to_local()]
    return [value] if isinstance(value, torch.Tensor) else []


def chunk_of(item: WriteItem, path: Path = ()) -> Chunk:
    """What DCP's planner lists, as a chunk; DCP itself does not tell its writers the path in the state."""
    key, data = item.index.fqn, item.tensor_data
    if data is None or item.type is WriteItemType.BYTE_IO:
        return Chunk(key, path, offsets=None, sizes=None, shape=None, dtype="", size_bytes=0)
    sizes, dtype = tuple(data.chunk.sizes), data.properties.dtype
    return Chunk(
        key,
        path,
        offsets=tuple(data.chunk.offsets),
        sizes=sizes,
        shape=tuple(data.size),
        dtype=str(dtype).removeprefix("torch."),
        size_bytes=math.prod(sizes) * dtype.itemsize,
    )


def contents_of(shares: Collection[Share]) -> StateContents:
    """What the state holds as a whole, by what all ranks hold. Raises ValueError where these contradict each other."""
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, ValueEntry] = {}
    for share in shares:
        for chunk in share.chunks:
            if chunk.shape is None:
                values.setdefault(chunk.key, ValueEntry(path=chunk.path))
            else:
                tensors.setdefault(chunk.key, TensorEntry(dtype=chunk.dtype, shape=chunk.shape, path=chunk.path))
    return StateContents(tensors, values, join_containers([share.containers for share in shares]))
