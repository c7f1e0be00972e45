"""One MoE layer forward and backward, each way in turn, in one process of two threads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elastic_moe.model import ModelConfig
from tests.bench.train_models import GROUPED, OURS, WAYS, PeakMemory, layer, same_weights

NUM_SEQUENCES = 8
NUM_INPUTS = 6
_AT_LEAST_S = 0.05


@dataclass(frozen=True)
class LayerShape:
    """What a layer is measured with."""

    name: str
    dim: int
    expert_dim: int
    num_experts: int
    top_k: int
    num_tokens: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(dim=self.dim, expert_dim=self.expert_dim, num_experts=self.num_experts, top_k=self.top_k)

    def __str__(self) -> str:
        return f"{self.num_experts} x {self.dim} x {self.expert_dim}, top {self.top_k}, {self.num_tokens} tokens"


SHAPES = (
    LayerShape("tiny", 128, 256, 8, 2, 4096),
    LayerShape("64 experts", 512, 256, 64, 6, 2048),
    LayerShape("wide", 1024, 1024, 8, 2, 1024),
    LayerShape("Mixtral's ratio", 512, 1792, 8, 2, 1024),
    LayerShape("top 1", 256, 1024, 16, 1, 2048),
)


@dataclass(frozen=True)
class LayerTask:
    shape: LayerShape
    dtype: str
    repeats: int
    num_threads: int


@dataclass
class LayerCell:
    """By way: seconds of one pass forward and backward, of each repeat; and bytes at most beyond weights and inputs."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    difference: float = 0.0
    """Between our result and transformers', relative to the greatest number in it."""


def measure_layer(task: LayerTask) -> LayerCell:
    """Run the ways in turn. Tokens, and so the numbers of an expert's rows, are others from one pass to the next, as in
    training."""
    torch.set_num_threads(task.num_threads)
    dtype = getattr(torch, task.dtype)
    shape = task.shape
    layers = {way: layer(shape.config, way, dtype) for way in WAYS}
    same_weights(layers[OURS], layers[GROUPED])
    draw = torch.Generator().manual_seed(1)
    size = (NUM_SEQUENCES, shape.num_tokens // NUM_SEQUENCES, shape.dim)
    inputs = [torch.randn(size, generator=draw).to(dtype) for _ in range(NUM_INPUTS)]
    cell = LayerCell({way: [] for way in WAYS})
    with torch.no_grad():
        ours, theirs = layers[OURS](inputs[0]).float(), layers[GROUPED](inputs[0]).float()
        cell.difference = float((ours - theirs).abs().max() / theirs.abs().max())
    memory, passes = PeakMemory(), {}
    for way, module in layers.items():
        memory.begin()
        once(module, inputs[0])
        cell.peak_bytes[way] = memory.taken()
        took_s = min(once(module, x) for x in inputs[:2])
        passes[way] = max(1, min(NUM_INPUTS, round(_AT_LEAST_S / took_s)))
    for repeat in range(task.repeats):
        for way, module in layers.items():
            took_s = sum(once(module, fresh(inputs[(repeat + i) % NUM_INPUTS], repeat)) for i in range(passes[way]))
            cell.seconds[way].append(took_s / passes[way])
    return cell


def fresh(x_BSD: Tensor, number: int) -> Tensor:
    """Other tokens of the same distribution, whatever was drawn before."""
    return x_BSD.roll(number + 1, dims=2)


def once(module: nn.Module, x_BSD: Tensor) -> float:
    """Seconds of a pass."""
    x_BSD = x_BSD.detach().requires_grad_()
    began_s = time.perf_counter()
    y_BSD = module(x_BSD)
    y_BSD.backward(torch.ones_like(y_BSD))
    took_s = time.perf_counter() - began_s
    for param in module.parameters():
        param.grad = None
    return took_s
