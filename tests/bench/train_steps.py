"""Whole training steps, each way in turn, in processes of one thread; and starts by the size of the model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from elastic_moe import heap
from elastic_moe.config import JobConfig
from elastic_moe.model import ModelConfig
from elastic_moe.parallel import build_mesh, init_weights
from elastic_moe.trainer.setup import set_up
from launcher import MeshPlan
from tests.bench.train_models import DENSE, EAGER, GROUPED, LOOP, PeakMemory, layer, mixtral_config

FSDP, EP, BOTH = "ours, FSDP", "ours, EP", "ours, FSDP x EP"
STEP_MODEL = ModelConfig(dim=256, expert_dim=512, num_layers=4, num_heads=8, num_kv_heads=4, num_experts=8, top_k=2)
GLOBAL_BATCH, SEQ_LEN = 16, 256


@dataclass(frozen=True)
class StepTask:
    """Steps of one world."""

    world_size: int
    repeats: int
    steps: int
    text: str
    dtype: str = "float32"
    with_others: bool = True
    balance: str = "sequence"

    @property
    def ways(self) -> tuple[str, ...]:
        if self.world_size == 1:
            return (FSDP, *((GROUPED, EAGER, LOOP, DENSE) if self.with_others else ()))
        both = (BOTH,) if self.world_size > 2 else ()
        return (FSDP, EP, *both, *((GROUPED,) if self.with_others else ()))


@dataclass
class StepCell:
    """By way: seconds of a step of each repeat; bytes at most, parameters and AdamW's moments included; the loss."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)


def measure_steps(task: StepTask) -> StepCell:
    """On every rank: build all ways, then let each do some steps in turn."""
    torch.set_num_threads(1)
    heap.keep_freed()  # as `train` does; it serves all ways
    cell, memory, steps = StepCell(), PeakMemory(), {}
    for way in task.ways:
        memory.begin()
        step = ours(way, task) if way in (FSDP, EP, BOTH) else theirs(way, task)
        for number in range(2):
            cell.loss[way] = step(number)
        cell.peak_bytes[way] = memory.taken()
        steps[way] = step
        cell.seconds[way] = []
    for repeat in range(task.repeats):
        for way, step in steps.items():
            dist.barrier()
            began_s = time.perf_counter()
            for number in range(task.steps):
                step(2 + repeat * task.steps + number)
            dist.barrier()
            cell.seconds[way].append((time.perf_counter() - began_s) / task.steps)
    return cell


def step_job(task: StepTask) -> JobConfig:
    train = {"steps": 1000, "global_batch": GLOBAL_BATCH, "seq_len": SEQ_LEN, "dtype": task.dtype}
    return JobConfig.model_validate(
        {
            "model": STEP_MODEL.model_dump() | {"balance": task.balance},
            "train": train,
            "data": {"url": task.text, "format": "text"},
        }
    )


def ours(way: str, task: StepTask) -> Callable[[int], float]:
    """The trainer's own step."""
    job, size = step_job(task), task.world_size
    shard, expert = {FSDP: (size, 1), EP: (1, size), BOTH: (size // 2, 2)}[way]
    plan = MeshPlan(1, shard, expert, idle=0, micro_batch=-(-GLOBAL_BATCH // size), rounds=1)
    stepper, _ = set_up(job, build_mesh(plan, "cpu"), dist.get_rank(), torch.device("cpu"))
    init_weights(stepper.model, 0)
    return lambda number: stepper.step(number).loss


class InPlace(nn.Module):
    """Another network in the place of Mixtral's layer of experts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.network(hidden_states)


def theirs(way: str, task: StepTask) -> Callable[[int], float]:
    """transformers' Mixtral under FSDP2 and stock AdamW, its experts in their own way or another network's."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers import MixtralForCausalLM

    dtype = getattr(torch, task.dtype)
    torch.manual_seed(0)
    model = MixtralForCausalLM(mixtral_config(STEP_MODEL, way if way == GROUPED else EAGER))
    model.config.output_router_logits = way in (GROUPED, EAGER)
    if way in (LOOP, DENSE):
        for block in model.model.layers:
            block.mlp = InPlace(layer(STEP_MODEL, way, torch.float32))
    model.to(dtype)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    size, rank = task.world_size, dist.get_rank()
    text = torch.frombuffer(bytearray(Path(task.text).read_bytes()), dtype=torch.uint8)

    def step(number: int) -> float:
        per_rank = GLOBAL_BATCH // size
        first = (number * GLOBAL_BATCH + rank * per_rank) * SEQ_LEN % (len(text) - per_rank * SEQ_LEN)
        tokens = text[first : first + per_rank * SEQ_LEN].view(per_rank, SEQ_LEN).long()
        loss = model(input_ids=tokens, labels=tokens).loss / size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total)

    return step


STARTS = {"5 M": (256, 4, 512), "40 M": (512, 6, 1024), "240 M": (1024, 8, 1216)}
"""By the number of parameters: width, layers and expert width."""


def start_s(name: str, launcher: str) -> float:
    """Seconds from the command to the end of a job of one step: imports, weights, the step."""
    dim, num_layers, expert_dim = STARTS[name]
    settings = {
        "model.dim": dim,
        "model.num_layers": num_layers,
        "model.expert_dim": expert_dim,
        "train.steps": 1,
        "train.global_batch": 2,
        "train.seq_len": 32,
    }
    with tempfile.TemporaryDirectory() as folder:
        job, text = Path(folder, "job.toml"), Path(folder, "text.txt")
        job.touch()
        text.write_bytes(bytes(range(32, 127)) * 100)
        sets = [f"--set={key}={value}" for key, value in {**settings, "data.url": text}.items()]
        own = ["-m", "elastic_moe", "train", str(job), *sets, f"--set=train.metrics={folder}/metrics.jsonl"]
        command = [sys.executable, *own]
        if launcher == "run":
            run = ["run", "--standalone", "--nproc-per-node", "2", f"--log-dir={folder}/log"]
            command = [sys.executable, "-m", "elastic_moe", *run, *own]
        began_s = time.perf_counter()
        ended_with(command, Path(folder))
        return time.perf_counter() - began_s


def ended_with(command: list[str], folder: Path) -> None:
    """Run a command to its end; it ends with this process's block, too, if that is interrupted."""
    with open(folder / "output", "w+b") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=_environment())
        try:
            code = process.wait(timeout=300)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if code:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{output.read().decode()[-3000:]}")


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def text_file(folder: Path) -> Path:
    """A megabyte of text: sources of torch, the same for all ways."""
    path = folder / "text.txt"
    parts: list[bytes] = []
    for source in _sources():
        parts.append(source.read_bytes())
        if sum(map(len, parts)) > 1 << 20:
            break
    path.write_bytes(b"".join(parts)[: 1 << 20].replace(b"\0", b" "))
    return path


def _sources() -> Iterator[Path]:
    yield from sorted(Path(torch.__file__).parent.joinpath("nn", "modules").glob("*.py"))
