"""What the ranks of `test_peak_memory` do; functions by name, because they run in other processes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from storage import Checkpointer

MIB = 1024 * 1024
SIZE_BYTES = 320 * MIB
"""Of the state's one tensor, which has one item in a checkpoint saved by one rank."""
ROWS = 8 * 1024
PLACEMENTS: dict[str, Placement] = {"replicated": Replicate(), "columns": Shard(1), "rows": Shard(0)}


def make_state(number: int, layout: str) -> dict[str, Any]:
    """The tensor counts its elements from `number`; only a rank's own part of it is ever there."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = SIZE_BYTES // 4 // ROWS
    whole = torch.arange(number, number + ROWS * columns, dtype=torch.int32).reshape(ROWS, columns)
    return {"w": distribute_tensor(whole, mesh, [PLACEMENTS[layout]], src_data_rank=None), "n": number}


def save(url: str, environment: Mapping[str, str], stock: bool) -> None:
    """Save step 7."""
    os.environ.update(environment)
    if stock:
        dcp.save(make_state(7, "rows"), checkpoint_id=f"{url}/step-000000007")
        return
    with Checkpointer(url) as ckpt:
        ckpt.save(7, make_state(7, "rows"), wait=True)
        assert ckpt.wait()


def peak_above_state(url: str, environment: Mapping[str, str], layout: str) -> int:
    """Restore it; bytes by which this process was larger meanwhile than with its state alone."""
    os.environ.update(environment)
    expected = make_state(7, layout)["w"].to_local().sum().item()
    state = make_state(0, layout)
    with Checkpointer(url) as ckpt:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        before_bytes = _status("VmRSS")
        assert ckpt.restore(state) == 7
        peak_bytes = _status("VmHWM")
    assert isinstance(state["w"], DTensor)
    assert (state["n"], state["w"].to_local().sum().item()) == (7, expected)
    return peak_bytes - before_bytes


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024
