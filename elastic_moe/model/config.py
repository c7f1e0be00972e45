"""The shape of the model. No torch: the command line and the mesh planner read it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from elastic_moe.model.presets import PresetName, with_preset
from elastic_moe.section import Section


class ModelConfig(Section):
    """A decoder of attention and Mixture-of-Experts layers, Mixtral's mathematics (arXiv:2401.04088)."""

    preset: PresetName | None = None
    """A known shape, over which the other fields are laid: one that is set, in the file or elsewhere, wins."""
    vocab_size: int = Field(256, ge=2)
    """Number of token ids; 256 for text read as bytes."""
    dim: int = Field(128, ge=2)
    """Width of the residual stream. Multiples of 32 use the fast expert kernels."""
    num_layers: int = Field(4, ge=1)
    """Decoder layers, each one attention and one MoE layer."""
    num_heads: int = Field(4, ge=1)
    """Query heads."""
    num_kv_heads: int = Field(2, ge=1)
    """Key and value heads; fewer than `num_heads` is grouped-query attention (arXiv:2305.13245)."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head; none means `dim / num_heads`."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary position embedding (arXiv:2104.09864)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of every initial weight matrix."""

    num_experts: int = Field(8, ge=1)
    """Experts in each MoE layer. Expert-parallel ranks need not divide it: the last ones then hold fewer."""
    top_k: int = Field(2, ge=1)
    """Experts that process each token."""
    expert_dim: int = Field(256, ge=1)
    """Hidden width of one SwiGLU expert. Multiples of 32 use the fast expert kernels."""
    shared_expert_dim: int = Field(0, ge=0)
    """Hidden width of an expert that processes every token besides the chosen ones; 0 for none."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """What the router makes of its logits: one `softmax` over all experts (Mixtral), or a `sigmoid` for each expert
    (DeepSeek-V3, arXiv:2412.19437 eq. 15)."""
    norm_topk: bool | None = None
    """Divide the weights of a token's experts by their sum; none does so where `top_k` is more than 1. Of one expert
    the weight would always be 1, and the router would learn nothing from it."""
    route_scale: float = Field(1.0, gt=0)
    """Factor of the routed experts' weights, after they were divided (DeepSeek-V3's 2.5)."""
    num_groups: int = Field(1, ge=1)
    """Groups of equally many consecutive experts, of which `top_groups` are chosen for a token before its experts are:
    so it goes to few nodes (DeepSeek-V3's node-limited routing, arXiv:2412.19437 section 2.1.2)."""
    top_groups: int | None = Field(None, ge=1)
    """Groups that a token's experts may come from: those whose two best experts have the largest sum of scores, biases
    included; none means all."""
    balance: Literal["sequence", "global", "bias", "quantile", "forced", "none"] = "sequence"
    """How the experts' loads are kept level, by something that does not depend on how a batch is split over ranks and
    micro-batches. `sequence`: an auxiliary loss for each sequence (DeepSeek-V3, arXiv:2412.19437 eq. 17). `global`: the
    same over the whole batch of a step (arXiv:2501.11873). `bias`: no loss, but a selection bias that is moved a little
    once a step (arXiv:2408.15664). `quantile`: a selection bias that is set once a step to what would have made the
    loads equal (Quantile Balancing, kexue.fm/archives/11619). `forced`: experts in turn, whatever the router says, for
    benchmarks alone. `none`: nothing."""
    balance_coeff: float = Field(1e-2, ge=0)
    """Weight of the `sequence` or `global` loss."""
    balance_rate: float = Field(1e-3, ge=0)
    """Step of the `bias` update."""
    z_loss_coeff: float = Field(0.0, ge=0)
    """Weight of the squared log-partition of the router's logits (ST-MoE, arXiv:2202.08906); 0 for none."""

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, given: Any) -> Any:
        # The name goes: models are the same whose fields are, however they were written down.
        return with_preset(given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}: change one, "
                "query heads share key heads in equal groups"
            )
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim = {self.dim} is not a multiple of num_heads = {self.num_heads}: set head_dim")
        if self.head_width % 2:
            raise ValueError(
                f"head_dim = {self.head_width} is odd, and rotary embeddings turn pairs: set an even head_dim"
            )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k = {self.top_k} is more than num_experts = {self.num_experts}: lower top_k, or raise num_experts"
            )
        if self.norm_topk and self.top_k == 1:
            raise ValueError(
                "norm_topk = true with top_k = 1 makes every weight 1, from which a router learns nothing: leave "
                "norm_topk out, or raise top_k"
            )
        self._check_groups()
        return self

    def _check_groups(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts = {self.num_experts} is not a multiple of num_groups = {self.num_groups}: change one, "
                "groups hold equally many experts"
            )
        allowed = self.num_groups if self.top_groups is None else self.top_groups
        if allowed > self.num_groups:
            raise ValueError(
                f"top_groups = {allowed} is more than num_groups = {self.num_groups}: lower top_groups, or leave it out"
            )
        if self.top_k > (reach := allowed * (self.num_experts // self.num_groups)):
            raise ValueError(
                f"top_k = {self.top_k} is more than the {reach} experts of top_groups = {allowed} groups: raise "
                "top_groups, or lower top_k"
            )
        if self.balance == "quantile" and self.limits_groups:
            raise ValueError(
                'balance = "quantile" cannot be had with top_groups, which keep tokens from experts: set '
                'balance = "bias"'
            )

    @property
    def limits_groups(self) -> bool:
        """Whether a token's experts come from some groups only."""
        return self.top_groups is not None and self.top_groups < self.num_groups

    @property
    def moves_bias(self) -> bool:
        """Whether a selection bias is a part of what the model computes."""
        return self.balance in ("bias", "quantile")

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token's experts are divided by their sum."""
        return self.top_k > 1 if self.norm_topk is None else self.norm_topk

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def num_expert_params(self) -> int:
        """Parameters of all routed experts of all layers."""
        return self.num_layers * self.num_experts * 3 * self.dim * self.expert_dim

    @property
    def num_dense_params(self) -> int:
        """Parameters outside the routed experts: embedding, attention, norms, routers, shared experts, head."""
        attention = 2 * self.dim * self.head_width * (self.num_heads + self.num_kv_heads)
        layer = attention + 2 * self.dim + self.num_experts * self.dim + 3 * self.dim * self.shared_expert_dim
        return self.num_layers * layer + 2 * self.vocab_size * self.dim + self.dim


TRAINING_FIELDS = frozenset({"balance", "balance_coeff", "balance_rate", "z_loss_coeff", "init_std"})
"""Fields of `ModelConfig` that say how a model is trained; the others say what it computes."""
