"""The model against `transformers`' Mixtral with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elastic_moe.model import ModelConfig
from elastic_moe.model.decoder import Decoder, token_loss
from elastic_moe.model.mixtral import from_mixtral
from elastic_moe.parallel import load_full

transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(
    vocab_size=97, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, expert_dim=96, rope_theta=1e6, init_std=0.05
)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = transformers.MixtralConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.expert_dim,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        num_local_experts=CONFIG.num_experts,
        num_experts_per_tok=CONFIG.top_k,
        rms_norm_eps=CONFIG.norm_eps,
        rope_theta=CONFIG.rope_theta,
        initializer_range=CONFIG.init_std,
        attn_implementation="eager",
    )
    model: torch.nn.Module = transformers.MixtralForCausalLM(shape).eval()
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(param, 0.5, 1.5)
    return model


def split_experts(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published layout: one tensor an expert and matrix."""
    single: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        head, found, tail = name.partition(".mlp.")
        if not found:
            single[name] = tensor
        elif tail == "gate.weight":
            single[f"{head}.block_sparse_moe.gate.weight"] = tensor
        else:
            for e, matrix in enumerate(tensor):
                base = f"{head}.block_sparse_moe.experts.{e}"
                if tail == "experts.down_proj":
                    single[f"{base}.w2.weight"] = matrix
                else:
                    single[f"{base}.w1.weight"], single[f"{base}.w3.weight"] = matrix.chunk(2)
    return single


@pytest.mark.parametrize("published", [False, True], ids=["fused", "published"])
def test_logits_and_loss_equal(reference: torch.nn.Module, published: bool) -> None:
    weights = dict(reference.state_dict())
    model = Decoder(CONFIG)
    load_full(model, from_mixtral(split_experts(weights) if published else weights, CONFIG))
    tokens = torch.randint(CONFIG.vocab_size, (3, 41), generator=torch.Generator().manual_seed(2))
    inputs = tokens[:, :-1]
    with torch.no_grad():
        expected = reference(inputs).logits
        loss = reference(tokens, labels=tokens).loss
        got = model(inputs).logits_BSV
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    mean = token_loss(got, tokens[:, 1:], torch.ones(3, dtype=torch.bool)) / inputs.numel()
    assert float(mean) == pytest.approx(float(loss), rel=1e-5)
