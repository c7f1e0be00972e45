"""The checks. Each takes a device and an empty folder, and returns a figure worth telling; it raises what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "numpy", "pydantic", "tenacity", "fsspec", "awscrt", "isal", "rich", "shtab")
Check = Callable[[Any, Path], str]
CHECKS: dict[str, Check] = {}
"""By name, in the order in which they run."""
LIMITS_S: dict[str, float] = {}


def check(name: str, limit_s: float = 60.0) -> Callable[[Check], Check]:
    """Register a check, and for how long it may run."""

    def register(function: Check) -> Check:
        CHECKS[name], LIMITS_S[name] = function, limit_s
        return function

    return register


def some_state(device: Any, size_mib: int) -> dict[str, Any]:
    """Tensors of several kinds, `size_mib` in all, of which one is most."""
    import torch

    made = torch.Generator(device).manual_seed(7)
    big = torch.randn(size_mib << 18, generator=made, device=device)
    half = torch.randn(300, 70, generator=made, device=device).bfloat16()
    return {"model": {"big": big, "half": half, "turned": torch.randn(64, 48, device=device).t()}, "step": 3}


def expect_same(found: dict[str, Any], expected: dict[str, Any], device: Any) -> None:
    import torch

    assert found["step"] == expected["step"]
    for name, tensor in expected["model"].items():
        assert found["model"][name].device.type == device.type, name
        assert torch.equal(found["model"][name], tensor), f"{name} is not what was saved"


@check("pinned staging")
def pinned_staging(device: Any, folder: Path) -> str:
    """A save blocks for one copy, into pinned memory, and what the state becomes afterwards is not in it."""
    import torch

    from storage import Checkpointer

    size_mib = 1024 if device.type == "cuda" else 8
    state = some_state(device, size_mib)
    expected = {"model": {name: tensor.clone() for name, tensor in state["model"].items()}, "step": 3}
    with Checkpointer(str(folder / "run")) as checkpointer:
        checkpointer.save(1, state, wait=True)  # the buffer is made
        began_s = time.monotonic()
        checkpointer.save(2, state)
        blocked_s = time.monotonic() - began_s
        for tensor in state["model"].values():
            tensor.zero_()
        assert checkpointer.wait(), "the save has failed"
        slots = checkpointer._started.saver._arena._free  # one of them made ahead, perhaps, and not used yet
        assert any(slot.is_pinned for slot in slots) == (device.type == "cuda"), "staging goes through pageable memory"
        checkpointer.restore(state)
    expect_same(state, expected, device)
    assert torch.isfinite(state["model"]["big"]).all()
    return f"{size_mib / 1024 / blocked_s:.1f} GiB/s, blocked {blocked_s * 1000:.0f} ms"


@check("restore into the device's tensors")
def restore(device: Any, folder: Path) -> str:
    """Of a model with an optimizer, in place, into others that differ; and across dtypes."""
    import torch

    from storage import Checkpointer

    def make(seed: int) -> tuple[torch.nn.Module, torch.optim.AdamW]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 512)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed, fused=device.type == "cuda")
        for _ in range(seed):
            model(torch.ones(4, 512, device=device)).square().mean().backward()
            optimizer.step()
        return model, optimizer

    (model, optimizer), (other, fresh) = make(2), make(1)
    plain = torch.arange(1 << 16, dtype=torch.float32, device=device)
    where = [parameter.data_ptr() for parameter in other.parameters()]
    with Checkpointer(str(folder / "run")) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": optimizer, "plain": plain}, wait=True)
        narrow = torch.zeros(1 << 16, dtype=torch.bfloat16, device=device)
        began_s = time.monotonic()
        assert checkpointer.restore({"model": other, "optimizer": fresh, "plain": narrow}) == 1
        took_s = time.monotonic() - began_s
    assert where == [parameter.data_ptr() for parameter in other.parameters()], "not in place"
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert theirs.device.type == device.type
        assert torch.equal(mine, theirs)
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[mine][moment].cpu(), fresh.state[theirs][moment].cpu()), moment
    assert torch.equal(narrow, plain.bfloat16())
    return f"{took_s * 1000:.0f} ms"


@check("bf16 grouped experts")
def experts(device: Any, folder: Path) -> str:
    """One grouped matmul against one expert after the other in float32, forward and backward; one gets no rows."""
    import torch

    from elastic_moe.model.config import ModelConfig
    from elastic_moe.model.experts import Experts, grouped_obstacle

    large = device.type == "cuda"
    config = ModelConfig(dim=1024 if large else 64, expert_dim=2048 if large else 64, num_experts=8, top_k=2)
    obstacle = grouped_obstacle(device.type, torch.bfloat16, (config.dim, config.expert_dim))
    assert obstacle is None, obstacle
    torch.manual_seed(0)
    grouped = Experts(config).to(device, torch.bfloat16)
    for parameter in grouped.parameters():
        torch.nn.init.normal_(parameter, std=config.dim**-0.5)
    counts = torch.tensor([[5, 0, 130, 64, 1, 17, 900 if large else 9, 33]])
    rows = torch.randn(int(counts.sum()), config.dim, device=device, dtype=torch.bfloat16)

    def one_by_one(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        gate, up, down = weights
        parts = x.split(counts[0].tolist())
        return torch.cat(
            [(torch.nn.functional.silu(p @ gate[e].T) * (p @ up[e].T)) @ down[e].T for e, p in enumerate(parts)]
        )

    out = grouped(rows, counts)
    out.float().square().mean().backward()
    weights = [w.detach().float().requires_grad_() for w in (grouped.gate_EFD, grouped.up_EFD, grouped.down_EDF)]
    expected = one_by_one(rows.float(), weights)
    expected.square().mean().backward()
    errors = [relative(out, expected)]
    for mine, theirs in zip((grouped.gate_EFD, grouped.up_EFD, grouped.down_EDF), weights, strict=True):
        errors.append(relative(mine.grad, theirs.grad))
    assert max(errors) < 0.03, f"relative errors {errors}"
    began_s = time.monotonic()
    for _ in range(10):
        grouped(rows, counts)
    if large:
        torch.cuda.synchronize()
    return f"error {max(errors):.1e}, {(time.monotonic() - began_s) * 100:.2f} ms a forward pass"


def relative(found: Any, expected: Any) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@contextlib.contextmanager
def process_group(device: Any, folder: Path) -> Iterator[None]:
    """Of this process alone, as the trainer makes it."""
    import torch.distributed as dist

    from elastic_moe.trainer import world

    if device.type == "cuda":
        with world.process_group(device):
            yield
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@check("process group for both kinds of tensors", limit_s=90.0)
def both_kinds(device: Any, folder: Path) -> str:
    """`cpu:gloo,cuda:nccl`: collectives of either kind, a checkpoint of sharded tensors, and asking for a stop."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from elastic_moe import worker
    from storage import Checkpointer
    from storage.ranks.devices import collective_device

    with process_group(device, folder):
        for kind in ("cpu", device.type):
            tensor = torch.ones(4, device=kind)
            dist.all_reduce(tensor)
            assert tensor.sum() == 4 * dist.get_world_size()
        assert collective_device().type == "cpu"
        assert worker.should_stop() is None
        mesh = init_device_mesh(device.type, (1,))
        whole = torch.randn(64, 32, device=device)
        state = {"w": distribute_tensor(whole.clone(), mesh, [Shard(0)])}
        with Checkpointer(str(folder / "run")) as checkpointer:
            checkpointer.save(1, state, wait=True)
            state["w"].to_local().zero_()
            assert checkpointer.restore(state) == 1
        assert torch.equal(state["w"].to_local(), whole)
        return dist.get_backend_config()


@check("the trainer in bf16, stopped and resumed", limit_s=120.0)
def trainer(device: Any, folder: Path) -> str:
    """The whole loop on the device: mixed precision, a checkpoint, and the same curve after it."""
    from elastic_moe.config import JobConfig
    from elastic_moe.trainer.run import train

    def job(name: str, steps: int, url: Path | None) -> JobConfig:
        return JobConfig.model_validate(
            {
                "model": {
                    "vocab_size": 256,
                    "dim": 64,
                    "num_layers": 2,
                    "num_heads": 4,
                    "num_kv_heads": 2,
                    "num_experts": 4,
                    "expert_dim": 64,
                },
                "data": {"url": str(folder / "text.txt")},
                "train": {
                    "steps": steps,
                    "global_batch": 4,
                    "seq_len": 32,
                    "dtype": "bfloat16",
                    "device": device.type,
                    "metrics": str(folder / f"{name}.jsonl"),
                },
                "optim": {"warmup_steps": 2, "lr_min_ratio": 1.0},
                "checkpoint": {"url": None if url is None else str(url), "every": 4},
            }
        )

    (folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}. " for n in range(400)))
    train(job("broken", 4, folder / "run"))
    train(job("broken", 8, folder / "run"))
    train(job("whole", 8, None))
    losses = [[json.loads(line)["loss"] for line in (folder / f"{name}.jsonl").open()] for name in ("broken", "whole")]
    assert len(losses[0]) == 8
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert worst < 1e-2, f"losses differ by {worst}"
    return f"loss {losses[0][0]:.3f} to {losses[0][-1]:.3f}, {worst:.0e} from unbroken"


@check("a killed worker comes back to free memory", limit_s=120.0)
def killed_worker(device: Any, folder: Path) -> str:
    """Half of the device's memory is in use when it is killed, and the next generation gets it again."""
    with job(folder, "run", "--nproc-per-node", "1", str(ROOT / "tests/gpu/holds_memory.py"), str(folder)) as running:
        first = wait_for(lambda: lines(folder / "held.jsonl"), running)[0]
        began_s = time.monotonic()
        os.kill(first["pid"], 9)
        second = wait_for(lambda: lines(folder / "held.jsonl")[1:], running)[0]
        took_s = time.monotonic() - began_s
        (folder / "finish").touch()
        assert running.wait(60) == 0, log_tail(folder)
    assert second["pid"] != first["pid"]
    assert second["free_mib"] >= 0.9 * first["free_mib"], f"{second} after {first}"
    return f"{took_s:.1f} s, {second['held_mib']} MiB held, {second['free_mib']} of {first['free_mib']} MiB free before"


@check("README's script", limit_s=120.0)
def readme(device: Any, folder: Path) -> str:
    """As it stands, on each accelerator of this machine, or on two CPU workers; and once more when it is done."""
    import torch

    (script,) = re.findall(r"```python\n(# train\.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (folder / "train.py").write_text(script)
    workers = str(torch.cuda.device_count() if device.type == "cuda" else 2)
    for _ in range(2):
        with job(folder, "run", "--nproc-per-node", workers, "train.py") as running:
            assert running.wait(110) == 0, log_tail(folder)
    told = re.findall(r"^step \d+: .+$", (folder / "log").read_text(), re.MULTILINE)
    assert told, "it printed nothing"
    return f"{told[0]}, {workers} workers"


@contextlib.contextmanager
def job(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`elastic-moe ARGUMENTS` in the folder; ended with all that it started."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "elastic_moe", *arguments]
        running = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def log_tail(folder: Path) -> str:
    """How the job ended, in its own words, and all of them on stderr."""
    log = (folder / "log").read_text(errors="replace")
    print(log, file=sys.stderr)
    ends = [line for line in log.splitlines() if "Error" in line or "the job failed" in line]
    return (ends or log.splitlines() or ["it said nothing"])[-1].strip()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(look: Callable[[], list[Any]], running: subprocess.Popen[bytes], within_s: float = 90.0) -> list[Any]:
    ends_s = time.monotonic() + within_s
    while not (found := look()):
        assert running.poll() is None, f"the job ended with {running.returncode}"
        assert time.monotonic() < ends_s, "nothing came in time"
        time.sleep(0.05)
    return found
