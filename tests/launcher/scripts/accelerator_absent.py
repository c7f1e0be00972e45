"""A script as README's, on a torch that is built for CUDA on a machine without one (PyPI's torch on a laptop)."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def absent(*_args: object, **_kwargs: object) -> None:
    raise RuntimeError("Found no NVIDIA driver on your system.")


torch.accelerator.current_accelerator = lambda check_available=False: None if check_available else torch.device("cuda")
torch.accelerator.is_available = lambda: False
torch.accelerator.device_count = lambda: 0
torch.accelerator.current_device_index = torch.accelerator.set_device_index = absent
torch.cuda._lazy_init = absent

from elastic_moe import worker  # noqa: E402
from storage import Checkpointer  # noqa: E402

worker.context()
dist.init_process_group()
torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
replica = DistributedDataParallel(model)
with Checkpointer(sys.argv[1]) as checkpointer:
    step = checkpointer.restore({"model": model})
    while step < 3:
        replica(torch.randn(16, 8)).square().mean().backward()
        step += 1
        worker.heartbeat(step)
        assert not worker.should_stop()
    checkpointer.save(step, {"model": model}, wait=True)
print(f"rank {dist.get_rank()}: step {step}", flush=True)
dist.destroy_process_group()
