"""What a rank of the storage benchmark does: makes its part of the state, saves or loads it, and measures that."""

from __future__ import annotations

import base64
import ctypes
import gc
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from storage import ShardReader, ShardWriter
from tests.bench import raw_reads
from tests.s3 import BUCKET

OURS, UNSIGNED, FSSPEC, CONNECTOR, RAW = "ours", "ours, unsigned", "fsspec", "s3torchconnector", "raw"
REGION = "us-east-1"
ROWS, COLUMNS = 2048, 2048  # 16 MiB of float32
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Layout:
    """A mesh, and how each tensor lies on it."""

    name: str
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        size = 1
        for length in self.mesh:
            size *= length
        return size


LAYOUTS = {
    layout.name: layout
    for layout in (
        *(Layout(f"{n}", (n,), (Shard(0),)) for n in (1, 2, 3, 4)),
        Layout("HSDP 2x2", (2, 2), (Replicate(), Shard(0))),
    )
}


@dataclass(frozen=True)
class Measured:
    """One save or load of one rank, begun by all ranks together."""

    seconds: float
    cpu_s: float
    peak_bytes: int  # of resident memory, above what it was with the state
    is_right: bool


@dataclass(frozen=True)
class Task:
    """One save or load.

    `client`: OURS, UNSIGNED, FSSPEC, CONNECTOR, or of `raw_reads.CLIENTS`. `prefix`: the checkpoint's, in the bucket.
    `objects`: for a raw client, what to read, by key and size. `check`: look at what was loaded, after the measurement.
    """

    client: str
    endpoint_url: str
    prefix: str
    layout: str
    num_tensors: int
    objects: Sequence[tuple[str, int]] = ()
    check: bool = False


def save(task: Task) -> Measured:
    """Save the state, whose values are known to `load`."""
    state = _state(task, filled=True)
    return _measured(_saver(task), state, lambda: True)


def load(task: Task) -> Measured:
    """Load into a state that is there already, as a trainer's is."""
    if task.objects:
        spans = raw_reads.spans_of(task.objects, dist.get_rank(), dist.get_world_size())
        memory = torch.ones(sum(span.size_bytes for span in spans), dtype=torch.uint8)
        view = memoryview(memory.numpy())  # type: ignore[arg-type]
        read = raw_reads.CLIENTS[task.client]
        return _measured(lambda _: read(task.endpoint_url, spans, view), {}, lambda: True)
    state = _state(task, filled=False)
    return _measured(_loader(task), state, lambda: not task.check or _is_right(state))


def prepare(environment: Mapping[str, str]) -> None:
    """Credentials for every client, from the environment; endpoints are given to each of them."""
    os.environ.update(environment)
    os.environ.pop("AWS_ENDPOINT_URL_S3", None)
    logging.getLogger("storage").setLevel(logging.ERROR)  # what it says of the server would stand in the table


# ----------------------------------------------------------------------------------------------------------------


def _state(task: Task, filled: bool) -> dict[str, Any]:
    layout = LAYOUTS[task.layout]
    mesh = init_device_mesh("cpu", layout.mesh)
    state: dict[str, Any] = {"step": 1 if filled else 0}
    for number in range(task.num_tensors):
        for name, shape in (("weight", (ROWS, COLUMNS)), ("norm", (COLUMNS,))):
            sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, layout.placements)
            local = _values(number, sizes, offsets) if filled else torch.full(sizes, -1.0)
            stride = (COLUMNS, 1) if len(shape) == 2 else (1,)
            state[f"layers.{number}.{name}"] = DTensor.from_local(
                local, mesh, layout.placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
    return state


def _values(number: int, sizes: Sequence[int], offsets: Sequence[int]) -> torch.Tensor:
    """Each element is its place in the whole tensor, which float32 tells exactly, plus the tensor's number."""
    row = COLUMNS if len(sizes) == 2 else 1
    start = offsets[0] * row
    return (torch.arange(start, start + sizes[0] * row, dtype=torch.float32) + number).reshape(tuple(sizes))


def _is_right(state: Mapping[str, Any]) -> bool:
    if state["step"] != 1:
        return False
    for key, value in state.items():
        if isinstance(value, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            if not torch.equal(value.to_local(), _values(int(key.split(".")[1]), sizes, offsets)):
                return False
    return True


def _measured(work: Callable[[dict[str, Any]], None], state: dict[str, Any], is_right: Callable[[], bool]) -> Measured:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what is taken
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, see proc(5)
    before_bytes, cpu_s, began_s = _memory_bytes("VmRSS"), time.process_time(), time.perf_counter()
    work(state)
    took_s, took_cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    return Measured(took_s, took_cpu_s, max(0, _memory_bytes("VmHWM") - before_bytes), is_right())


def _memory_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


# the clients ------------------------------------------------------------------------------------------------------


def _loader(task: Task) -> Callable[[dict[str, Any]], None]:
    path = f"s3://{BUCKET}/{task.prefix}"

    def run(state: dict[str, Any]) -> None:
        match task.client:
            case "ours":
                reader: Any = ShardReader(f"{path}?endpoint_url={task.endpoint_url}")
            case "fsspec":
                reader = FsspecReader(path, endpoint_url=task.endpoint_url)
            case "s3torchconnector":
                from s3torchconnector.dcp import S3StorageReader

                reader = S3StorageReader(REGION, path, s3client_config=_connector_config())
                _point_at(reader, task.endpoint_url, reader._reader_constructor)
            case _:
                raise AssertionError(task.client)
        dcp.load(state, storage_reader=reader)

    return run


def _saver(task: Task) -> Callable[[dict[str, Any]], None]:
    path = f"s3://{BUCKET}/{task.prefix}"

    def run(state: dict[str, Any]) -> None:
        match task.client:
            case "ours":
                writer: Any = ShardWriter(f"{path}?endpoint_url={task.endpoint_url}")
            case "ours, unsigned":
                writer = ShardWriter(f"{path}?endpoint_url={task.endpoint_url}&sign_payload=never")
            case "fsspec":
                writer = FsspecWriter(path, endpoint_url=task.endpoint_url)
                _send_md5(writer.fs.fs)
            case "s3torchconnector":
                from s3torchconnector.dcp import S3StorageWriter

                writer = S3StorageWriter(REGION, path, s3client_config=_connector_config())
                _point_at(writer, task.endpoint_url, None)
            case _:
                raise AssertionError(task.client)
        dcp.save(state, storage_writer=writer)

    return run


def _connector_config() -> Any:
    from s3torchconnector import S3ClientConfig

    return S3ClientConfig(force_path_style=True)


def _point_at(storage: Any, endpoint_url: str, reader_constructor: Any) -> None:
    """s3torchconnector's DCP classes take no endpoint, but their client does."""
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp.s3_file_system import S3FileSystem

    client = S3Client(REGION, endpoint=endpoint_url, s3client_config=_connector_config())
    storage.fs = S3FileSystem(REGION, s3_client=client, reader_constructor=reader_constructor)


def _send_md5(fs: Any) -> None:
    """Have s3fs send a Content-MD5 with DeleteObjects, for which the gateway asks and which botocore sends no more.

    FsspecWriter renames `.metadata` into place, and s3fs deletes the old name so. Nothing else changes.
    """
    if getattr(fs, "sends_md5", False):
        return
    fs.connect()
    fs.s3.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    fs.sends_md5 = True


def _add_md5(params: dict[str, Any], **_: object) -> None:
    body = params["body"]
    data = body.encode() if isinstance(body, str) else bytes(body)
    params["headers"]["Content-MD5"] = base64.b64encode(hashlib.md5(data).digest()).decode()
