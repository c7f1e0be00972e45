"""What a rank holds of a training state, by DCP's planner."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
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
from storage.state.tree import PLAIN_TYPES, Flat, join_containers
from storage.torch_private import MAKES_WRITE_ITEMS, shards_of

_PARAMETER_SAMPLE_BYTES = 4096
_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


@dataclass(frozen=True)
class Holdings:
    """What this rank could write of the state: one chunk for each write item that DCP's planner would have.

    `items` are those of what the planner was asked about, None for what has one way to be written (`_is_plain`).
    `sums`: by name, fingerprints of what every rank must hold alike. `digest`: a sum of the chunks and containers.
    """

    planner: DefaultSavePlanner
    items: tuple[WriteItem | None, ...]
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
        chunks = self.chunks
        return {
            position: encode_value(chunks[position].key, self._value(position))
            for position in positions
            if chunks[position].sizes is None
        }

    def _value(self, position: int) -> Any:
        item = self.items[position]
        return self.leaves[self.chunks[position].key] if item is None else self.planner.lookup_object(item.index)

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
        elif type(tensor) not in _PLAIN_TENSORS:
            item = self.items[position]
            assert item is not None, "the planner was asked about it"
            tensor = self.planner.resolve_data(item)
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
    apart = {name: leaf for name, leaf in flat.leaves.items() if not _is_plain(leaf)}
    planner.set_up_planner(apart, is_coordinator=rank == 0)
    if before is not None and is_as_before:
        return replace(before, planner=planner, sums={}, leaves=flat.leaves)
    rows = list(_rows(flat, apart, planner))
    share = Share(tuple(chunk for chunk, _ in rows), tuple(flat.containers))
    digest = hashlib.blake2b(dump_share(share), digest_size=16).hexdigest()
    items = tuple(item for _, item in rows)
    return Holdings(planner, items, share.chunks, share.containers, {}, digest, kinds, flat.leaves)


def _is_plain(leaf: Any) -> bool:
    """Whether DCP has one way to write a leaf: as a value, or as a tensor that is all here. It need not be asked."""
    if type(leaf) in _PLAIN_TENSORS or type(leaf) in PLAIN_TYPES:
        return True
    return not isinstance(leaf, torch.Tensor) and not hasattr(leaf, MAKES_WRITE_ITEMS)


def _rows(flat: Flat, apart: Collection[str], planner: DefaultSavePlanner) -> Iterator[tuple[Chunk, WriteItem | None]]:
    """The chunks in the order of the state, with the items of those that the planner was asked about."""
    planned: dict[str, list[WriteItem]] = defaultdict(list)
    for item in planner.create_local_plan().items:
        planned[item.index.fqn].append(item)
    for name, leaf in flat.leaves.items():
        path = flat.paths[name]
        if name in apart:
            yield from ((chunk_of(item, path), item) for item in planned[name])
        elif isinstance(leaf, torch.Tensor):
            shape = tuple(leaf.shape)
            yield _tensor_chunk(name, path, leaf.dtype, shape, (0,) * len(shape), shape), None
        else:
            yield _value_chunk(name, path), None


def _kinds_of(flat: Flat) -> tuple[Any, ...] | None:
    found: list[Any] = [tuple(flat.paths.values()), tuple(flat.containers)]
    for name, leaf in flat.leaves.items():
        if not isinstance(leaf, torch.Tensor):
            found.append((name,))
            continue
        if type(leaf) not in _PLAIN_TENSORS and shards_of(leaf) is not None:
            return None
        of_all = (leaf.dtype, leaf.shape, leaf.layout, leaf.device.type, leaf.is_nested, leaf.requires_grad)
        of_mesh = (leaf.placements, leaf.device_mesh) if isinstance(leaf, DTensor) else ()
        found.append((name, type(leaf), *of_all, *of_mesh))
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
        return _value_chunk(key, path)
    chunk, shape = data.chunk, tuple(data.size)
    return _tensor_chunk(key, path, data.properties.dtype, shape, tuple(chunk.offsets), tuple(chunk.sizes))


def _value_chunk(key: str, path: Path) -> Chunk:
    return Chunk(key, path, offsets=None, sizes=None, shape=None, dtype="", size_bytes=0)


def _tensor_chunk(
    key: str,
    path: Path,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> Chunk:
    size_bytes = math.prod(sizes) * dtype.itemsize
    return Chunk(key, path, offsets, sizes, shape, str(dtype).removeprefix("torch."), size_bytes)


def contents_of(shares: Collection[Share]) -> StateContents:
    """What the state holds as a whole, by what all ranks hold. Raises ValueError where these contradict each other."""
    tensors: dict[str, TensorEntry] = {}
    values: dict[str, ValueEntry] = {}
    tensor, value = TensorEntry.model_construct, ValueEntry.model_construct  # chunks are of the right types
    for share in shares:
        for chunk in share.chunks:
            if chunk.shape is None:
                if chunk.key not in values:
                    values[chunk.key] = value(path=chunk.path)
            elif chunk.key not in tensors:
                tensors[chunk.key] = tensor(dtype=chunk.dtype, shape=chunk.shape, path=chunk.path)
    return StateContents(tensors, values, join_containers([share.containers for share in shares]))
