"""What the ranks of `test_exchange` do; functions by name, because they run in other processes."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from storage import Checkpointer, ShardReader, register_scheme
from storage.errors import StorageError, Transient
from storage.loading import exchange, host_memory, reading
from storage.loading.host_memory import read_memory
from storage.loading.shared_parts import item_segments, long_ranges
from storage.loading.shareplan import plan_shares
from storage.stores.local import LocalStore
from storage.stores.objects import Capability
from tests.cluster import is_running, until

# name -> (shape of the mesh, placements of a matrix)
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows of 1": ((1,), (Shard(0),)),
    "rows of 2": ((2,), (Shard(0),)),
    "rows of 3": ((3,), (Shard(0),)),
    "rows of 4": ((4,), (Shard(0),)),
    "columns of 2": ((2,), (Shard(1),)),
    "columns of 4": ((4,), (Shard(1),)),
    "hsdp 2x2": ((2, 2), (Replicate(), Shard(0))),
    "hsdp 2x2 by columns": ((2, 2), (Replicate(), Shard(1))),
    "tiles 2x2": ((2, 2), (Shard(0), Shard(1))),
    "replicated on 2": ((2,), (Replicate(),)),
    "replicated on 3": ((3,), (Replicate(),)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool, torch.complex64]


def matrix(number: int, rows: int = 60, columns: int = 48, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    whole = torch.randint(-100, 100, (rows, columns), generator=generator).float()
    return (whole > 0) if dtype is torch.bool else whole.to(dtype)


class Layout:
    """One of LAYOUTS over this job's ranks."""

    def __init__(self, name: str) -> None:
        shape, self._placements = LAYOUTS[name]
        self._mesh: DeviceMesh = init_device_mesh("cpu", shape)

    def spread(self, whole: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(whole, self._mesh, list(self._placements), src_data_rank=None)


def odd_state(layout: Layout, number: int) -> dict[str, Any]:
    """Every dtype, on the layout; and tensors of every other kind that a state may hold."""
    state: dict[str, Any] = {str(dtype): layout.spread(matrix(number, dtype=dtype)) for dtype in DTYPES}
    cube = matrix(number, 60, 48).reshape(12, 5, 48)
    return {
        **state,
        "cube": layout.spread(cube),
        "long rows": layout.spread(matrix(number, 5, 40000)),
        "plain": matrix(number, 30, 20),
        "turned": matrix(number, 30, 20).t(),
        "every second": matrix(number, 30, 20)[::2, 3:9],
        "scalar": torch.tensor(float(number)),
        "empty": torch.empty(0, 4),
        "nested": [{"value": number, "bytes": bytes([number])}, torch.arange(5) * number],
    }


def local(value: Any) -> Any:
    """What this rank holds of it."""
    if isinstance(value, dict):
        return {key: local(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [local(entry) for entry in value]
    return value.to_local() if isinstance(value, DTensor) else value


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    return bool(left == right)


@contextlib.contextmanager
def small_parts(part_size_bytes: int, round_size_bytes: int) -> Iterator[None]:
    """Pieces and rounds so small that a small state has many, and any block may be a run of its own."""
    exchange.plan_shares = functools.partial(  # type: ignore[attr-defined]
        plan_shares, part_size_bytes=part_size_bytes, round_size_bytes=round_size_bytes, small_size_bytes=0
    )
    reading.long_ranges = functools.partial(long_ranges, long_size_bytes=1)  # type: ignore[assignment,attr-defined]
    reading.item_segments = functools.partial(item_segments, long_size_bytes=1)  # type: ignore[assignment,attr-defined]
    try:
        yield
    finally:
        exchange.plan_shares = plan_shares  # type: ignore[attr-defined]
        reading.long_ranges, reading.item_segments = long_ranges, item_segments  # type: ignore[attr-defined]


def save(url: str, layout: str, stock: bool) -> None:
    if stock:
        dcp.save(odd_state(Layout(layout), 7), checkpoint_id=f"{url}/step-000000007")
        return
    with Checkpointer(url) as ckpt:
        ckpt.save(7, odd_state(Layout(layout), 7), wait=True)
        assert ckpt.wait()


def load(urls: Sequence[str], name: str) -> list[str]:
    """Load each of them, with the Checkpointer in small parts and with DCP in large ones; those that came wrong.

    From the folder itself, where each rank may read for itself, and as if it were far away.
    """
    layout, wrong = Layout(name), []
    expected = local(odd_state(layout, 7))
    register_scheme("far", Counting)
    for url in urls:
        state = odd_state(layout, 1)
        with small_parts(16 << 10, 64 << 10), Checkpointer(f"far://{url}") as ckpt:
            assert ckpt.restore(state) == 7
        other, near = odd_state(layout, 1), odd_state(layout, 1)
        dcp.load(other, storage_reader=ShardReader(f"far://{url}"))
        dcp.load(near, storage_reader=ShardReader(url))
        found = {"ours": state, "dcp": other, "near": near}
        wrong += [f"{url} {who}" for who, filled in found.items() if not same(local(filled), expected)]
    return wrong


class Counting(LocalStore):
    """Counts what is read, and fails from read number `fail_at` on. Stands for a store that is far away."""

    is_near = False

    def __init__(self, root: str, fail_at: int | None = None) -> None:
        super().__init__(root)
        self.read_bytes = 0
        self.num_reads = 0
        self._fail_at = fail_at
        self._lock = threading.Lock()

    def can(self, capability: Capability) -> bool:
        return super().can(capability) and (self.is_near or capability is not Capability.HOST_CACHE)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        with self._lock:
            if self.num_reads == self._fail_at:
                raise Transient("out of order")
            self.num_reads += 1
            self.read_bytes += sum(buffer.nbytes for buffer in buffers)
        return super().read_into(key, offset, buffers, if_match=if_match)

    def read(self, key: str) -> bytes:
        data = super().read(key)
        self.read_bytes += len(data)
        return data


NUM_TENSORS, ROWS, COLUMNS = 6, 1200, 960


def large_state(layout: Layout, number: int) -> dict[str, Any]:
    """27 MB; the rows of a column shard are 960 bytes and more."""
    return {f"layer.{i}": layout.spread(matrix(number + i, ROWS, COLUMNS)) for i in range(NUM_TENSORS)}


def save_large(url: str, layout: str) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.save(1, large_state(Layout(layout), 1), wait=True)
        assert ckpt.wait()


class Near(Counting):
    """The folder that it is."""

    is_near = True


def count(url: str, layout: str, with_dcp: bool, is_near: bool = False) -> tuple[int, int]:
    """Load it; bytes that this rank read from the store, index included, and how many reads of data they took."""
    store = Near(url) if is_near else Counting(url)
    register_scheme("counting", lambda rest: store)
    spread = Layout(layout)
    state = large_state(spread, 0)
    if with_dcp:
        dcp.load(state, storage_reader=ShardReader("counting://"))
    else:
        with Checkpointer("counting://") as ckpt:
            store.read_bytes = 0  # who owns the run is not part of a read
            assert ckpt.restore(state) == 1
    for name, tensor in large_state(spread, 1).items():
        assert torch.equal(local(state[name]), local(tensor))
    return store.read_bytes, store.num_reads


def neighbouring(url: str, layout: str, num_reads_max: int, damages: bool) -> tuple[int, list[str], str]:
    """Load where no more than so many reads of another rank's memory succeed, and rank 0 may damage what it sends.

    Bytes that were read of the memory of others, what was logged of it, and what the load raised.
    """
    found: list[int] = []

    def limited(pid: int, address: int, into: Any) -> None:
        if len(found) == num_reads_max:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        found.append(len(into))
        read_memory(pid, address, into)

    def damaged(memories: Any) -> Any:
        data = np.concatenate(memories)
        data[0] ^= 1
        return data

    register_scheme("neighbouring", lambda rest: Counting(url))
    spread = Layout(layout)
    state, error = large_state(spread, 0), ""
    with pytest.MonkeyPatch.context() as patch, captured("storage.loading.host_memory") as lines:
        patch.setattr(host_memory, "read_memory", limited)
        if damages and dist.get_rank() == 0:
            patch.setattr(exchange, "joined", damaged)
        try:
            dcp.load(state, storage_reader=ShardReader("neighbouring://"))
        except dcp.CheckpointException as raised:
            error = str({rank: str(failure[0]) for rank, failure in raised.failures.items()})
    if not error:
        for name, tensor in large_state(spread, 1).items():
            assert torch.equal(local(state[name]), local(tensor))
    return sum(found), lines, error


@contextlib.contextmanager
def captured(name: str) -> Iterator[list[str]]:
    """The lines that a logger writes from level INFO on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def lose(url: str, victim: int) -> str:
    """Load where rank `victim` is killed at the moment when another reads its memory; the class of what is raised."""

    def killing(pid: int, address: int, into: Any) -> None:
        if len(into) > 1000:
            os.kill(pid, signal.SIGKILL)
            until("it has no memory any more", lambda: not is_running(pid))
        read_memory(pid, address, into)

    register_scheme("losing", lambda rest: Counting(url))
    state = large_state(Layout("replicated on 2"), 0)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() != victim:
            patch.setattr(host_memory, "read_memory", killing)
        try:
            dcp.load(state, storage_reader=ShardReader("losing://"))
        except Exception as error:
            return type(error).__name__
    return "nothing"


def fail(url: str, layout: str, victim: int, fail_at: int) -> tuple[str, int]:
    """Load where rank `victim`'s store fails; what is raised, and after how many reads of this rank."""
    store = Counting(url, fail_at if dist.get_rank() == victim else None)
    register_scheme("failing-read", lambda rest: store)
    with Checkpointer("failing-read://") as ckpt, small_parts(16 << 10, 64 << 10):
        try:
            ckpt.restore(odd_state(Layout(layout), 0))
        except StorageError as error:
            return f"{type(error).__name__}: {error}", store.num_reads
    return "nothing", store.num_reads


def lack_memory(url: str, layout: str, victim: int, lacking: str) -> str:
    """Load where rank `victim` has no memory for what method `lacking` of the exchange makes; what is raised."""

    def lack(self: exchange.PartExchange, *args: object) -> None:
        raise MemoryError("none is left")

    register_scheme("far", Counting)
    with pytest.MonkeyPatch.context() as patch, Checkpointer(f"far://{url}") as ckpt, small_parts(16 << 10, 64 << 10):
        if dist.get_rank() == victim:
            patch.setattr(exchange.PartExchange, lacking, lack)
        try:
            ckpt.restore(odd_state(Layout(layout), 0))
        except (StorageError, MemoryError) as error:
            return str(error)
    return "nothing"


def fail_dcp(url: str, layout: str, victim: int) -> str:
    """The same through `dcp.load`."""
    store = Counting(url, 2 if dist.get_rank() == victim else None)
    register_scheme("failing-dcp", lambda rest: store)
    with small_parts(16 << 10, 64 << 10):
        try:
            dcp.load(odd_state(Layout(layout), 0), storage_reader=ShardReader("failing-dcp://"))
        except dcp.CheckpointException as error:
            return str({rank: str(failure[0]) for rank, failure in error.failures.items()})
    return "nothing"


def fsdp1_model(seed: int) -> FullyShardedDataParallel:
    """FSDP's first version, whose state dict holds ShardedTensors."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 5))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    FullyShardedDataParallel.set_state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT)
    return wrapped


def save_fsdp1(url: str) -> dict[str, torch.Tensor]:
    """Save such a model twice, ours and stock; the whole of its weights."""
    model = fsdp1_model(1)
    state = model.state_dict()
    assert any(isinstance(value, ShardedTensor) for value in state.values())
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"model": state}, wait=True)
        assert ckpt.wait()
    dcp.save({"model": state}, checkpoint_id=f"{url}-stock/step-000000001")
    with FullyShardedDataParallel.summon_full_params(model):
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def load_fsdp1(urls: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Load each of them into a model of another seed; the whole of its weights."""
    found = []
    for url in urls:
        model = fsdp1_model(2)
        state = {"model": model.state_dict()}
        with Checkpointer(url) as ckpt:
            assert ckpt.restore(state) == 1
        model.load_state_dict(state["model"])
        with FullyShardedDataParallel.summon_full_params(model):
            found.append({name: value.detach().clone() for name, value in model.named_parameters()})
    return found
