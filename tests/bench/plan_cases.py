"""Configurations whose memory `make bench-plan` measures: those that the planner's terms were found on, and others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from elastic_moe.config import JobConfig
from launcher import MeshPlan


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration whose memory is measured."""

    name: str
    model: dict[str, Any]
    train: dict[str, Any]
    plan: MeshPlan

    def job(self, data: Path) -> JobConfig:
        """The job, on tokens of a file."""
        train = {**self.train, "steps": 10, "metrics": None, "device": "cpu"}
        return JobConfig.model_validate({"model": self.model, "train": train, "data": {"url": str(data)}})


def a_model(dim: int, layers: int, expert_dim: int, vocab_size: int = 256, **more: Any) -> dict[str, Any]:
    """Fields of `[model]`; eight experts, two of them for a token, unless told otherwise."""
    shape = {"dim": dim, "num_layers": layers, "expert_dim": expert_dim, "vocab_size": vocab_size}
    return {**shape, "num_heads": 8, "num_kv_heads": 4, **more}


def a_batch(sequences: int, positions: int, **more: Any) -> dict[str, Any]:
    """Fields of `[train]`."""
    return {"global_batch": sequences, "seq_len": positions, **more}


FITTED = (
    Case("parameters", a_model(512, 8, 1024), a_batch(2, 128), MeshPlan(1, 1, 1, 0, 2, 1)),
    Case("vocabulary", a_model(256, 2, 256, 32_768), a_batch(8, 128), MeshPlan(1, 1, 1, 0, 8, 1)),
    Case("activations", a_model(256, 8, 512), a_batch(8, 512), MeshPlan(1, 1, 1, 0, 8, 1)),
    Case("rounds", a_model(512, 4, 1024), a_batch(8, 128), MeshPlan(1, 1, 1, 0, 2, 4)),
    Case("shards", a_model(512, 8, 1024), a_batch(4, 128), MeshPlan(1, 2, 1, 0, 2, 1)),
    Case("shards, rounds", a_model(512, 8, 1024), a_batch(8, 128), MeshPlan(1, 2, 1, 0, 2, 2)),
    Case("expert parts", a_model(512, 8, 1024), a_batch(4, 128), MeshPlan(1, 1, 2, 0, 2, 1)),
    Case("replicas", a_model(512, 4, 1024), a_batch(8, 256), MeshPlan(2, 1, 1, 0, 4, 1)),
    Case("shards and parts", a_model(512, 12, 1024, 8192), a_batch(16, 256), MeshPlan(1, 2, 2, 0, 2, 2)),
    Case("recomputed", a_model(512, 8, 512), a_batch(16, 512, recompute=True), MeshPlan(1, 1, 1, 0, 16, 1)),
    Case("bf16", a_model(512, 6, 512, 4096), a_batch(4, 256, dtype="bfloat16"), MeshPlan(1, 1, 1, 0, 4, 1)),
    Case("kept gathered", a_model(512, 6, 1024), a_batch(8, 128, keep_gathered=True), MeshPlan(1, 2, 1, 0, 2, 2)),
)

_SIXTY_FOUR: dict[str, Any] = {
    "num_experts": 64,
    "top_k": 6,
    "shared_expert_dim": 512,
    "score": "sigmoid",
    "balance": "bias",
}
# Measured when the terms had been found.
HELD_OUT = (
    Case(
        "64 experts, 6 and a shared", a_model(512, 4, 256, **_SIXTY_FOUR), a_batch(4, 256), MeshPlan(1, 1, 1, 0, 4, 1)
    ),
    Case(
        "one expert of 16", a_model(768, 3, 1024, num_experts=16, top_k=1), a_batch(4, 256), MeshPlan(1, 1, 1, 0, 4, 1)
    ),
    Case("wide, rounds", a_model(1024, 2, 2048), a_batch(8, 128), MeshPlan(1, 1, 1, 0, 4, 2)),
    Case(
        "bf16, vocabulary", a_model(512, 2, 512, 50_000), a_batch(4, 256, dtype="bfloat16"), MeshPlan(1, 1, 1, 0, 4, 1)
    ),
    Case("bf16, shards, rounds", a_model(768, 4, 768), a_batch(16, 256, dtype="bfloat16"), MeshPlan(1, 2, 1, 0, 4, 2)),
    Case("replicas of shards", a_model(512, 8, 1024), a_batch(16, 128), MeshPlan(2, 2, 1, 0, 4, 1)),
    Case("four shards", a_model(768, 8, 1024), a_batch(4, 256), MeshPlan(1, 4, 1, 0, 1, 1)),
    Case("four expert parts", a_model(768, 8, 1024), a_batch(16, 256), MeshPlan(1, 1, 4, 0, 2, 2)),
    Case("5 experts on 2", a_model(768, 6, 1024, num_experts=5), a_batch(8, 256), MeshPlan(1, 1, 2, 0, 4, 1)),
    Case(
        "long, recomputed, rounds", a_model(512, 6, 1024), a_batch(4, 2048, recompute=True), MeshPlan(1, 1, 1, 0, 2, 2)
    ),
    Case("exact", a_model(512, 3, 1024), a_batch(4, 128, exact=True), MeshPlan(1, 2, 1, 0, 1, 2)),
    Case("narrow and deep", a_model(256, 24, 512, 1024), a_batch(8, 256), MeshPlan(1, 1, 1, 0, 4, 2)),
)
