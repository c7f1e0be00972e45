"""The decoder.

Shape suffixes: B sequences, S positions, V vocabulary, D model dim, L layers, E experts, H bins of margins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_moe.model.attention import Attention, document_mask
from elastic_moe.model.compiled import Compiling
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.moe import MoE
from elastic_moe.model.router import RouterTerms


class DecoderOutput(NamedTuple):
    """Logits, and what the routers of all layers left, added up or one layer after another: see `RouterTerms`."""

    logits_BSV: Tensor
    load_LE: Tensor
    balance: Tensor
    z: Tensor
    probs_LE: Tensor
    entropy_L: Tensor
    margins_LEH: Tensor


class Block(nn.Module):
    """Attention and MoE, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.moe = MoE(config)
        self._attend = self._attend_eagerly

    def compile_attention(self, compiling: Compiling) -> None:
        """Let torch.compile make one graph of the block's first half.

        Its second half runs as it is: rows go where their tokens are routed, whose numbers a graph would have to know,
        and the experts' grouped product is one kernel already.
        """
        self._attend = compiling(self._attend_eagerly)

    def forward(self, x_BSD: Tensor, real_B: Tensor, mask_B1SS: Tensor | None = None) -> tuple[Tensor, RouterTerms]:
        x_BSD = self._attend(x_BSD, mask_B1SS)
        mixed_BSD, terms = self.moe(self.moe_norm(x_BSD), real_B)
        return x_BSD + mixed_BSD, terms

    def _attend_eagerly(self, x_BSD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        out: Tensor = x_BSD + self.attention(self.attention_norm(x_BSD), mask_B1SS)
        return out


class Decoder(nn.Module):
    """Token ids (B, S) int64 to next-token logits (B, S, V).

    With `recompute` a layer keeps only its input for the backward pass, which computes the layer again; what the
    routers leave is that of the first time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(
        self, tokens_BS: Tensor, real_B: Tensor | None = None, documents_BS: Tensor | None = None
    ) -> DecoderOutput:
        """Run the model.

        Args:
            tokens_BS: int64 token ids.
            real_B: bool, False for padding sequences, left out of every term; None means that all are real.
            documents_BS: int64, the document that each token is in, to whose tokens its attention keeps; None lets
                it see the whole sequence before it.
        """
        if real_B is None:
            real_B = torch.ones(tokens_BS.shape[0], dtype=torch.bool, device=tokens_BS.device)
        mask_B1SS = None if documents_BS is None else document_mask(documents_BS)  # one for all layers
        x_BSD = self.embed(tokens_BS)
        terms = []
        for block in self.layers:
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a layer is drawn at random.
                x_BSD, of_layer = checkpoint(
                    block, x_BSD, real_B, mask_B1SS, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BSD, of_layer = block(x_BSD, real_B, mask_B1SS)
            terms.append(of_layer)
        return DecoderOutput(
            logits_BSV=self.head(self.norm(x_BSD)),
            load_LE=torch.stack([t.load_E for t in terms]),
            balance=torch.stack([t.balance for t in terms]).sum(),
            z=torch.stack([t.z for t in terms]).sum(),
            probs_LE=torch.stack([t.probs_E for t in terms]),
            entropy_L=torch.stack([t.entropy for t in terms]),
            margins_LEH=torch.stack([t.margins_EH for t in terms]),
        )

    def compile_attention(
        self, backend: str | Callable[..., Any] = "inductor", on_failure: Callable[[str], None] | None = None
    ) -> None:
        """Let torch.compile make one graph of the first half of all blocks; see `Compiling`."""
        compiling = Compiling(backend, on_failure)
        for block in self.blocks:
            block.compile_attention(compiling)

    @property
    def blocks(self) -> list[Block]:
        """The layers from the first to the last, by their type."""
        return [cast(Block, block) for block in self.layers]


def token_loss(logits_BSV: Tensor, targets_BS: Tensor, real_B: Tensor, counted_BS: Tensor | None = None) -> Tensor:
    """Sum of the next-token cross entropies over the real sequences, nats, as a float64 scalar.

    With `counted_BS`, bool, those of other positions are left out. Each sequence is summed on its own in fp32, and
    sequences are added in float64, so that the sum does not depend on the batch that a sequence is in.
    """
    loss_BS = F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none")
    loss_BS = loss_BS.view_as(targets_BS)
    if counted_BS is not None:
        loss_BS = loss_BS.masked_fill(~counted_BS, 0.0)
    return (loss_BS.sum(dim=1) * real_B).double().sum()
