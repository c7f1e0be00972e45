"""What a rank of `bench-stall` does: trains a model, saves it now and then by one of the ways, and measures that."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from storage import Checkpointer, CheckpointEvent
from storage.arena.pending import PendingCopy
from tests.bench.family import services
from tests.bench.stall_bars import DCP, MEMCPY, NOTHING, PROCESS, SHARED, THREAD
from tests.bench.storage_ranks import _send_md5
from tests.s3 import BUCKET

OURS: dict[str, dict[str, Any]] = {
    "ours, sync": {"staging": "sync", "service": False},
    "ours, overlapped": {"staging": "overlapped", "service": False},
    "service, sync": {"staging": "sync", "service": True},
    "service, overlapped": {"staging": "overlapped", "service": True},
}
PYPI = "torch_checkpointing"
WAYS = (NOTHING, MEMCPY, *OURS, DCP, THREAD, PROCESS, SHARED, PYPI)
WIDTH = 2048
LAYER_BYTES = WIDTH * WIDTH * 4


@dataclass(frozen=True)
class StallTask:
    """A run of one way. `target`: a folder, or a URL `s3://...` without options. `num_layers`: of 16 MiB, thrice."""

    way: str
    target: str
    endpoint_url: str
    environment: Mapping[str, str]
    num_layers: int
    num_tokens: int
    num_saves: int
    steps_between: int


@dataclass(frozen=True)
class StallRun:
    """What a rank saw. Times of saves in their order; the first one, which makes buffers, is not among them."""

    steps_s: float
    """From the end of the first save to the end of the last step."""
    call_s: list[float]
    held_s: list[float]
    """By waits within the optimizer's step."""
    commit_s: list[float]
    cpu_s: float
    """Of this process and its children over `steps_s` and the time until the last save was done."""
    state_bytes: int
    step_s: float
    """Median of the steps without a save."""
    passes_s: float
    """Of these, of what comes before the optimizer."""


class Way:
    """A way to save; this one does not."""

    def __init__(self, task: StallTask) -> None:
        self.task = task
        self.commits_s: list[float] = []
        self.held_s = 0.0

    def save(self, number: int, state: dict[str, Any]) -> None:
        """What the training calls."""

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """What the optimizer's step is wrapped into."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Wait for the last save."""

    def close(self) -> None:
        """End whatever it has started."""


class Memcpy(Way):
    """Copies the state into memory that is in use already, and that is all."""

    def __init__(self, task: StallTask) -> None:
        super().__init__(task)
        self._copies: list[np.ndarray] = []

    def save(self, number: int, state: dict[str, Any]) -> None:
        arrays = [tensor.to_local().numpy() for tensor in state.values()]
        if not self._copies:
            self._copies = [np.zeros_like(array) for array in arrays]
        for array, copy in zip(arrays, self._copies, strict=True):
            np.copyto(copy, array)


class Ours(Way):
    """A Checkpointer."""

    def __init__(self, task: StallTask, **options: Any) -> None:
        super().__init__(task)
        url = f"{task.target}?endpoint_url={task.endpoint_url}" if task.endpoint_url else task.target
        self._began_s: dict[int, float] = {}
        self._checkpointer = Checkpointer(url, keep=1, on_event=self._hear, **options).start()
        hold = PendingCopy.hold_step

        def timed(pending: PendingCopy) -> None:
            began_s = time.perf_counter()
            hold(pending)
            self.held_s += time.perf_counter() - began_s

        PendingCopy.hold_step = timed  # type: ignore[method-assign]

    def save(self, number: int, state: dict[str, Any]) -> None:
        self._began_s[number] = time.perf_counter()
        self._checkpointer.save(number, state)

    def _hear(self, event: CheckpointEvent, fields: Mapping[str, Any]) -> None:
        if event == CheckpointEvent.COMMITTED:
            self.commits_s.append(time.perf_counter() - self._began_s[fields["step"]])
        assert event != CheckpointEvent.FAILED, fields

    def finish(self) -> None:
        assert self._checkpointer.wait(), "the save has failed"

    def close(self) -> None:
        self._checkpointer.close()


class GatewayWriter(FsspecWriter):
    """Sends a Content-MD5 where the gateway wants one, in the process to which a writer is sent as well."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """See `_send_md5`."""
        files: Any = self.fs
        _send_md5(files.fs)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)


class Dcp(Way):
    """`dcp.save`, or `dcp.async_save` of a kind, with stock writers. A save waits for the one before."""

    def __init__(self, task: StallTask) -> None:
        super().__init__(task)
        self._future: Future[Any] | None = None
        self._staging: Future[Any] | None = None
        self._options: dict[str, Any] = {}
        self._end: Callable[[], object] = lambda: None
        if task.way != DCP:
            self._options["process_group"] = dist.new_group(backend="gloo")  # the default one is the training's
        if task.way == PROCESS:
            self._options["async_checkpointer_type"] = AsyncCheckpointerType.PROCESS
        if task.way == SHARED:
            stager = DefaultStager(StagingOptions(use_pinned_memory=False, use_non_blocking_copy=False))
            self._options["async_stager"] = stager
            self._end = stager.close

    def save(self, number: int, state: dict[str, Any]) -> None:
        self.finish()
        began_s = time.perf_counter()
        path = f"{self.task.target}/{number}"
        writer: Any = dcp.FileSystemWriter(path)
        if self.task.endpoint_url:
            writer = GatewayWriter(path, endpoint_url=self.task.endpoint_url)
        if self.task.way == DCP:
            dcp.save(state, storage_writer=writer)
            self.commits_s.append(time.perf_counter() - began_s)
            return
        told = dcp.async_save(state, storage_writer=writer, **self._options)
        if isinstance(told, Future):
            self._future = told
        else:  # its stager copies behind the training, which has to wait for that before the optimizer's step
            self._staging, self._future = told.staging_completion, told.upload_completion
        self._future.add_done_callback(lambda _: self.commits_s.append(time.perf_counter() - began_s))

    @contextlib.contextmanager
    def lock(self) -> Any:
        if self._staging is not None:
            began_s = time.perf_counter()
            self._staging.result()
            self._staging = None
            self.held_s += time.perf_counter() - began_s
        yield

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()

    def close(self) -> None:
        self._end()


class Pypi(Way):
    """torch_checkpointing from PyPI, by its own lock around the optimizer's step.

    Each rank's shards as they are: what it notes down to reshard them goes through CUDA tensors (0.1.1).
    """

    def __init__(self, task: StallTask) -> None:
        super().__init__(task)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig

        self._future: Future[Any] | None = None
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        self._manager = CheckpointManager(
            CheckpointManager.Config(save=AsyncCheckpointSaverConfig(staging_config=staging))
        )

    def save(self, number: int, state: dict[str, Any]) -> None:
        self.finish()
        began_s = time.perf_counter()
        shards = {name: tensor.to_local() for name, tensor in state.items()}
        self._future = self._manager.save(f"{self.task.target}/{number}", {"state": shards})
        assert self._future is not None
        self._future.add_done_callback(lambda _: self.commits_s.append(time.perf_counter() - began_s))

    @contextlib.contextmanager
    def lock(self) -> Any:
        began_s = time.perf_counter()
        with self._manager.lock():
            self.held_s += time.perf_counter() - began_s
            yield

    def finish(self) -> None:
        if self._future is not None:
            self._future.result()

    def close(self) -> None:
        self._manager.close()


def way_of(task: StallTask) -> Way:
    """The way that a task names."""
    match task.way:
        case "no save":
            return Way(task)
        case "one memcpy":
            return Memcpy(task)
        case way if way in OURS:
            return Ours(task, **OURS[way])
        case "torch_checkpointing":
            return Pypi(task)
        case _:
            return Dcp(task)


class Training:
    """A stack of square layers, a part of which every rank has as its own; AdamW, one thread."""

    def __init__(self, task: StallTask) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(dist.get_rank())
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(task.num_layers)]
        self._model = nn.Sequential(*layers)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, fused=True)
        self._tokens = torch.randn(task.num_tokens, WIDTH)
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def step(self, way: Way) -> float:
        """Forward, backward, a word with the other ranks, and the optimizer; seconds of all but the last."""
        began_s = time.perf_counter()
        loss = self._model(self._tokens).square().mean()
        loss.backward()
        dist.all_reduce(loss.detach())
        passes_s = time.perf_counter() - began_s
        with way.lock():
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        return passes_s

    def state(self) -> dict[str, Any]:
        """The very tensors that are trained, sharded over the ranks by rows."""
        found: dict[str, Any] = {}
        for name, parameter in self._model.named_parameters():
            found[name] = self._sharded(parameter.detach())
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{key}"] = self._sharded(self._optimizer.state[parameter][key])
        return found

    def _sharded(self, tensor: torch.Tensor) -> DTensor:
        return DTensor.from_local(tensor, self._mesh, [Shard(0)], run_check=False)


def run(task: StallTask) -> StallRun:
    """Two steps, a save, `steps_between` steps, a save, and so on; after the last save as many steps again."""
    os.environ.update(task.environment)
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    logging.getLogger("storage").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with open(Path(task.environment["XDG_RUNTIME_DIR"], "ranks.log"), "ab") as output:
        os.dup2(output.fileno(), 2)  # the process of async_save tells all that it does
    if "://" not in task.target:
        Path(task.target).mkdir(exist_ok=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # some start processes
    training = Training(task)
    way = way_of(task)
    try:
        return _measure(task, training, way)
    finally:
        way.close()
        for child in psutil.Process().children(recursive=True):
            child.kill()  # not all ways end what they have started


def _measure(task: StallTask, training: Training, way: Way) -> StallRun:
    for _ in range(2):
        training.step(way)
    way.save(1, training.state())  # makes its buffers, and learns what torch.save writes
    training.step(way)
    way.finish()
    way.commits_s.clear()
    calls_s, helds_s, quiet_s, passes_s = [], [], [], []
    dist.barrier()
    cpu_s, began_s = _cpu_s(), time.perf_counter()
    for number in range(2, task.num_saves + 2):
        dist.barrier()
        state, way.held_s, at_s = training.state(), 0.0, time.perf_counter()
        way.save(number, state)
        calls_s.append(time.perf_counter() - at_s)
        for later in range(task.steps_between):
            at_s = time.perf_counter()
            of_passes_s = training.step(way)
            if later:
                quiet_s.append(time.perf_counter() - at_s)
                passes_s.append(of_passes_s)
        helds_s.append(way.held_s)
    dist.barrier()
    steps_s = time.perf_counter() - began_s
    way.finish()
    dist.barrier()
    size_bytes = sum(tensor.to_local().nbytes for tensor in state.values())
    quiet, passes = float(np.median(quiet_s)), float(np.median(passes_s))
    return StallRun(steps_s, calls_s, helds_s, list(way.commits_s), _cpu_s() - cpu_s, size_bytes, quiet, passes)


def _cpu_s() -> float:
    """CPU time of this process and of its children, ended ones included; of rank 0 that of the service as well."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    if dist.get_rank() == 0:
        processes += services(Path(os.environ["XDG_RUNTIME_DIR"]))
    total = 0.0
    for process in {process.pid: process for process in processes}.values():
        with contextlib.suppress(psutil.Error):
            its = process.cpu_times()
            total += its.user + its.system + its.children_user + its.children_system
    return total


BUCKET_URL = f"s3://{BUCKET}"
