"""What the ranks of `test_stock` do; functions by name, because they run in other processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from storage import Checkpointer
from tests.storage.peak_cases import PLACEMENTS


def whole_state(sign: int) -> dict[str, torch.Tensor]:
    """Tensors whose items are long (17 to 24 MB), and a short one; other bytes for each sign."""
    rows = torch.arange(4_500_000, dtype=torch.int32).reshape(3000, 1500) * sign
    return {
        "rows": rows,
        "turned": rows.reshape(500, 9000).t(),
        "cube": rows.reshape(30, 100, 1500).permute(1, 2, 0),
        "half": torch.cat([rows, rows], 1).bfloat16(),
        "short": rows[:3].clone(),
    }


def save(url: str) -> None:
    """With stock DCP, by one rank: each tensor is one item."""
    dcp.save({**whole_state(1), "n": 7}, checkpoint_id=f"{url}/step-000000007")


def load(url: str, layout: str) -> list[str]:
    """The names of those that came wrong; one of them goes into a tensor of another type."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            name: distribute_tensor(t, mesh, [PLACEMENTS[layout]], src_data_rank=None) for name, t in tensors.items()
        }

    state = placed({**whole_state(-1), "rows": whole_state(-1)["rows"].double()})
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state) == 7
    wanted = placed(whole_state(1))
    assert all(isinstance(value, DTensor) for value in state.values())
    return [name for name, t in wanted.items() if not torch.equal(state[name].to_local().to(t.dtype), t.to_local())]
