"""Which tensor of a Mixtral is which of ours. Pure.

Published files, and those that `transformers` writes, hold the experts one by one; `transformers` 5 holds them together
in memory, and some files are written so.

Shape suffixes: E experts, D model dim, F expert dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from elastic_moe.model.config import ModelConfig

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "moe_norm.weight": "post_attention_layernorm.weight",
    "moe.router.weight": "block_sparse_moe.gate.weight",
}
_EXPERTS = {"gate_EFD": "w1", "down_EDF": "w2", "up_EFD": "w3"}


class Source(NamedTuple):
    """Where a tensor of ours is: a whole tensor of theirs, or one for each index of our first dimension."""

    names: tuple[str, ...]
    is_stacked: bool
    first_row: int = 0
    """Of a stacked tensor in one: where ours begins in their second dimension."""
    is_copied: bool = False
    """Whether theirs is what each index of our first dimension has."""


def published(config: ModelConfig) -> dict[str, Source]:
    """The source of every parameter of ours, by its name, in published files."""
    sources = {ours: Source((theirs,), is_stacked=False) for ours, theirs in _TOP.items()}
    for layer in range(config.num_layers):
        for ours, theirs in _LAYER.items():
            sources[f"layers.{layer}.{ours}"] = Source((f"model.layers.{layer}.{theirs}",), is_stacked=False)
        for ours, theirs in _EXPERTS.items():
            names = (
                f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{theirs}.weight"
                for expert in range(config.num_experts)
            )
            sources[f"layers.{layer}.moe.experts.{ours}"] = Source(tuple(names), is_stacked=True)
    return sources


def fused(config: ModelConfig) -> dict[str, Source]:
    """The same where a layer's experts are held together."""
    sources = published(config)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.moe", f"model.layers.{layer}.mlp"
        sources[f"{ours}.router.weight"] = Source((f"{theirs}.gate.weight",), is_stacked=False)
        gate_up = (f"{theirs}.experts.gate_up_proj",)
        sources[f"{ours}.experts.gate_EFD"] = Source(gate_up, is_stacked=False)
        sources[f"{ours}.experts.up_EFD"] = Source(gate_up, is_stacked=False, first_row=config.expert_dim)
        sources[f"{ours}.experts.down_EDF"] = Source((f"{theirs}.experts.down_proj",), is_stacked=False)
    return sources


_DENSE_EXPERTS = {"gate_EFD": "gate_proj", "down_EDF": "down_proj", "up_EFD": "up_proj"}


def dense(config: ModelConfig, *, is_tied: bool) -> dict[str, Source]:
    """The same in files of a dense model, whose feed-forward networks are copied into experts. Routers are in none.

    Args:
        is_tied: whether its embedding is its head too.
    """
    sources = published(config)
    for layer in range(config.num_layers):
        del sources[f"layers.{layer}.moe.router.weight"]
        for ours, theirs in _DENSE_EXPERTS.items():
            name = f"model.layers.{layer}.mlp.{theirs}.weight"
            sources[f"layers.{layer}.moe.experts.{ours}"] = Source((name,), is_stacked=False, is_copied=True)
    if is_tied:
        sources["head.weight"] = sources["embed.weight"]
    return sources


def their_shape(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of theirs must have which holds (a part of) ours of `shape`."""
    if name.endswith("gate_up_proj"):
        return (shape[0], 2 * config.expert_dim, shape[2])
    return shape


def layers(config: ModelConfig, sources: dict[str, Source]) -> Iterator[dict[str, Source]]:
    """The sources in parts that are held in memory at once: a layer each, then what is in none."""
    for layer in range(config.num_layers):
        yield {name: source for name, source in sources.items() if name.startswith(f"layers.{layer}.")}
    yield {name: source for name, source in sources.items() if not name.startswith("layers.")}
