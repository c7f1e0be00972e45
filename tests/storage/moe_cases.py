"""What the ranks of `test_moe_reshard` do: a Mixture-of-Experts model and its AdamW state, saved and loaded."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from elastic_moe.model import ModelConfig
from elastic_moe.parallel.weights import gather_full, write_part
from elastic_moe.trainer.config import OptimConfig
from elastic_moe.trainer.optimizer import build_optimizer
from elastic_moe.trainer.state import DataProgress, DataState, training_state
from launcher.rounds.mesh import MeshPlan
from storage import Checkpointer, ShardReader
from tests.moe.cases import SMALL, build

EVEN = SMALL
# 3 experts a rank over 2 shards, whose widths 2 does not divide either: cut unevenly, as are the embeddings
UNEVEN = SMALL.model_copy(update={"expert_dim": 63, "vocab_size": 65, "shared_expert_dim": 33})


def set_up(config: ModelConfig, plan: MeshPlan) -> dict[str, Any]:
    """The state of a training run, its model from seed 0 and its moments zero."""
    model, _ = build(config, plan)
    return training_state(model, build_optimizer(model, OptimConfig()), progress())


def progress() -> DataProgress:
    return DataProgress(DataState(seed=1, global_batch=8, seq_len=16, fingerprint="f" * 64), horizon=10)


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    moments = {f"{kind}.{name}": value for kind, entry in state["optim"].items() for name, value in entry.items()}
    return {**state["model"], **moments}


def wanted(name: str, like: Tensor) -> Tensor:
    """What every layout saves under that name: a function of the name and the global shape alone."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill(state: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, tensor in tensors_of(state).items():
            write_part(tensor, wanted(name, tensor))
    state["data"].step = 7


def forget(state: dict[str, Any]) -> None:
    """Nothing of what was loaded is left."""
    with torch.no_grad():
        for tensor in tensors_of(state).values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1.0)
    state["data"] = progress()


def wrong_tensors(state: dict[str, Any]) -> list[str]:
    """Names of tensors that do not hold, gathered from all ranks, bit for bit what was saved."""
    whole = gather_full(tensors_of(state))
    assert any(".experts." in name and name.startswith("exp_avg_sq.") for name in whole)
    assert any("expert_bias" in name for name in whole)
    assert state["data"].loaded is None or state["data"].step == 7
    return [name for name, tensor in whole.items() if not torch.equal(tensor, wanted(name, tensor))]


def save(url: str, config: ModelConfig, plan: MeshPlan) -> list[str]:
    state = set_up(config, plan)
    fill(state)
    with Checkpointer(url) as ckpt:
        ckpt.save(7, state, wait=True)
        assert ckpt.wait()
    dcp.save(state, checkpoint_id=f"{url}-stock/step-000000007")
    return wrong_tensors(state)


READERS = ("ours", "ours from stock", "stock from ours", "ShardReader")


def load(
    urls: dict[str, tuple[str, ModelConfig]], plan: MeshPlan, readers: tuple[str, ...] = READERS
) -> dict[str, list[str]]:
    """By source and reader, the tensors that did not arrive."""
    found = {}
    configs = [config for config in (EVEN, UNEVEN) if config in [of_source for _, of_source in urls.values()]]
    states = [(config, set_up(config, plan)) for config in configs]
    for source, (url, config) in urls.items():
        (state,) = [each for made_of, each in states if made_of == config]
        for reader in readers:
            forget(state)
            if reader.startswith("ours"):
                with Checkpointer(url if reader == "ours" else f"{url}-stock") as ckpt:
                    assert ckpt.restore(state) == 7
            elif reader == "ShardReader":
                dcp.load(state, storage_reader=ShardReader(url))
            else:
                dcp.load(state, checkpoint_id=f"{url}/step-000000007")
            found[f"{source}, {reader}"] = wrong_tensors(state)
            assert state["data"].step == 7
    return found
