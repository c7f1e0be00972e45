"""What the ranks of `test_stock` do; functions by name, because they run in other processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from storage import Checkpointer, register_scheme
from storage.events import Listener
from storage.stores.local import LocalStore
from storage.stores.objects import Capability
from tests.storage.peak_cases import MIB, PLACEMENTS


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


class FlipsOnce(LocalStore):
    """Flips a bit of the first long read of every data object. Stands for a store that is far away."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._flipped: set[str] = set()
        self._lock = threading.Lock()

    def can(self, capability: Capability) -> bool:
        return super().can(capability) and capability is not Capability.HOST_CACHE

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview], *, if_match: str | None = None) -> str:
        etag = super().read_into(key, offset, buffers, if_match=if_match)
        with self._lock:
            long = max(buffers, key=lambda buffer: buffer.nbytes)
            if long.nbytes > MIB and key not in self._flipped:
                self._flipped.add(key)
                long[long.nbytes // 2] ^= 1
        return etag


def load_with_a_flip(url: str, layout: str) -> tuple[list[str], int]:
    """As `load`, where every rank's first long read is damaged on the way; how much this rank had to read again."""
    register_scheme("flips", FlipsOnce)
    retried: list[int] = []

    def note(name: str, fields: dict[str, Any]) -> None:
        if name == "checkpoint_retried":
            retried.append(fields["retries"]["damaged"])

    return load(f"flips://{url}", layout, note), sum(retried)


def load(url: str, layout: str, on_event: Listener | None = None) -> list[str]:
    """The names of those that came wrong; one of them goes into a tensor of another type."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            name: distribute_tensor(t, mesh, [PLACEMENTS[layout]], src_data_rank=None) for name, t in tensors.items()
        }

    state = placed({**whole_state(-1), "rows": whole_state(-1)["rows"].double()})
    with Checkpointer(url, on_event=on_event) as ckpt:
        assert ckpt.restore(state, strict=False) == 7  # a part of what was saved
    wanted = placed(whole_state(1))
    assert all(isinstance(value, DTensor) for value in state.values())
    return [name for name, t in wanted.items() if not torch.equal(state[name].to_local().to(t.dtype), t.to_local())]
