"""One optimizer step on the global batch, shared by the ranks and accumulated over rounds.

Shape suffixes: B sequences of a micro-batch, S positions, L layers, E experts, H bins of margins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.decoder import Decoder, DecoderOutput
from elastic_moe.model.quantile import set_bias
from elastic_moe.model.router import global_balance, move_bias
from elastic_moe.parallel import Meshes, Shared, begin_round, clip_gradients, take_shared
from elastic_moe.trainer.batches import Batches, MicroBatch, count_targets
from elastic_moe.trainer.config import OptimConfig, TrainConfig
from elastic_moe.trainer.health import why_to_skip
from elastic_moe.trainer.optimizer import set_learning_rate
from elastic_moe.trainer.routing import RoutingStats, SharingStats, routing_stats, sharing_stats
from elastic_moe.trainer.schedule import learning_rate


class StepResult(NamedTuple):
    """A step as all ranks together saw it."""

    loss: float
    """Mean cross entropy over the global batch, nats."""
    grad_norm: float
    lr: float
    load_LE: Tensor
    """float64 (L, E), on the CPU: rows that each expert got."""
    skipped: str = ""
    """Why the step has changed nothing; "" for one that has."""
    own_loss: float = 0.0
    """Of a skipped step, what this rank's sequences added to the sum of losses."""
    routing: RoutingStats | None = None
    """How level the loads are."""
    sharing: SharingStats | None = None
    """How level ranks' shares of them are; None where no rank may take guests."""


class StepSums(NamedTuple):
    """What micro-batches of a step leave beside their gradients, float64; they add up over micro-batches and ranks."""

    loss: Tensor
    load_LE: Tensor
    entropy_L: Tensor
    margins_LEH: Tensor
    shared_4: Tensor
    """What ranks have shared of hot experts, a `Shared`."""

    @classmethod
    def of(cls, out: DecoderOutput, loss: Tensor, shared: Shared) -> StepSums:
        shared_4 = out.load_LE.new_tensor(shared) if shared.level_rows else out.load_LE.new_zeros(len(shared))
        return cls(loss.detach(), out.load_LE, out.entropy_L, out.margins_LEH, shared_4)

    def plus(self, other: StepSums) -> StepSums:
        return StepSums(*(mine + its for mine, its in zip(self, other, strict=True)))

    def over_ranks(self, meshes: Meshes) -> StepSums:
        """The sums of all ranks. A collective: one all-reduce for everything."""
        packed = torch.cat([tensor.flatten() for tensor in self])
        meshes.sum_over_ranks(packed)
        parts = packed.split([tensor.numel() for tensor in self])
        return StepSums(*(part.view_as(tensor) for part, tensor in zip(parts, self, strict=True)))


Finish = Callable[[StepResult, Callable[[], None]], None]
"""Hears of a step's result, and has it applied: by a call that changes the state of this rank alone."""


def objective(
    out: DecoderOutput,
    loss: Tensor,
    num_targets: Tensor,
    config: ModelConfig,
    train: TrainConfig,
    load_LE: Tensor | None = None,
) -> Tensor:
    """What a micro-batch adds to the objective of the global batch, a float64 scalar.

    Every term is a sum over sequences, divided by a count of the *global* batch: any split adds up to the same.

    Args:
        out: of the model.
        loss: its sum of token losses.
        num_targets: tokens that the whole global batch predicts.
        config: says which terms there are.
        train: says how large the global batch is.
        load_LE: with `balance` "global", the loads of the whole global batch.
    """
    num_tokens = train.global_batch * train.seq_len
    total = loss / num_targets
    if config.balance == "sequence":
        total = total + config.balance_coeff * out.balance.double() / train.global_batch
    if load_LE is not None:
        total = total + config.balance_coeff * global_balance(out.probs_LE, load_LE) / train.global_batch
    if config.z_loss_coeff:
        total = total + config.z_loss_coeff * out.z.double() / num_tokens
    return total


class Stepper:
    """Does steps: holds the model, its optimizer and where its batches come from.

    Attributes:
        horizon: the step at which the learning rate has decayed.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: AdamW,
        meshes: Meshes,
        batches: Batches,
        *,
        train: TrainConfig,
        optim: OptimConfig,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.meshes = meshes
        self.batches = batches
        self.train = train
        self.optim = optim
        self.horizon = optim.decay_steps or train.steps

    def step(self, step: int, finish: Finish | None = None) -> StepResult:
        """Do the step that follows `step` completed ones. A collective.

        One whose loss or gradient is not finite leaves parameters, moments and biases as they are, on all ranks, and
        has nothing to `finish`, which otherwise decides when its update is applied; without it that is at once.
        """
        micro_batches = self.batches.of_step(step)
        num_targets = self._num_targets(micro_batches)
        own = self._accumulate(micro_batches, num_targets)
        sums = own.over_ranks(self.meshes)
        num_tokens = self.train.global_batch * self.train.seq_len
        result = StepResult(
            loss=float(sums.loss.item()) / float(num_targets.item()),
            grad_norm=clip_gradients(self.model.parameters(), self.meshes, self.optim.clip_norm),
            lr=learning_rate(step, self.horizon, self.optim),
            load_LE=sums.load_LE.cpu(),
            routing=routing_stats(sums.load_LE, sums.entropy_L, num_tokens, self.model.config.top_k),
            sharing=sharing_stats(Shared(*sums.shared_4.tolist())),
        )
        if skipped := why_to_skip(result.loss, result.grad_norm):
            self.optimizer.zero_grad()
            return result._replace(skipped=skipped, own_loss=float(own.loss.item()))

        def apply() -> None:
            set_learning_rate(self.optimizer, result.lr)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._move_biases(sums)

        if finish is None:
            apply()
        else:
            finish(result, apply)
        return result

    def _move_biases(self, sums: StepSums) -> None:
        """Let the experts' selection biases follow the whole batch's loads, on all ranks alike."""
        config = self.model.config
        if not config.moves_bias:
            return
        for block, load_E, margins_EH in zip(self.model.blocks, sums.load_LE, sums.margins_LEH, strict=True):
            bias = block.moe.router.expert_bias
            if config.balance == "bias":
                move_bias(bias, load_E, config.balance_rate)
            else:
                set_bias(bias, margins_EH, config.top_k)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross entropy over the sequences held out, nats, the same on all ranks. A collective, and no step."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.batches.device)
        for micro_batches in self.batches.held_out(self.train.validation_sequences):
            for micro_batch in micro_batches:
                begin_round(self.model, last=False, backward=False)
                loss = micro_batch.loss(micro_batch.forward(self.model))
                sums += torch.stack((loss, micro_batch.num_targets()))
        self.meshes.sum_over_ranks(sums)
        loss_sum, num_targets = sums.tolist()
        return float(loss_sum / max(1.0, num_targets))

    def _num_targets(self, micro_batches: list[MicroBatch]) -> Tensor:
        """How many tokens the global batch predicts, a float64 scalar. A collective, where that is not known."""
        if self.batches.corpus.end_of_document is None:
            all_of_them = float(self.train.global_batch * self.train.seq_len)
            return torch.tensor(all_of_them, dtype=torch.float64, device=self.batches.device)
        count = count_targets(micro_batches)
        self.meshes.sum_over_ranks(count)
        return count.clamp(min=1)  # a batch may hold the ends of documents and nothing else

    def _accumulate(self, micro_batches: list[MicroBatch], num_targets: Tensor) -> StepSums:
        """Gradients of all micro-batches, reduced over ranks with the last; and this rank's sums."""
        sums: StepSums | None = None
        is_global = self.model.config.balance == "global"
        load_LE = self._count_loads(micro_batches) if is_global and len(micro_batches) > 1 else None
        for i, micro_batch in enumerate(micro_batches):
            begin_round(self.model, last=i + 1 == len(micro_batches), keep_gathered=self.train.keep_gathered)
            take_shared(self.model)  # of the backward pass before, or of none that is a part of the step
            out = micro_batch.forward(self.model)
            shared = take_shared(self.model)
            if is_global and len(micro_batches) == 1:
                load_LE = out.load_LE.clone()
                self.meshes.sum_over_ranks(load_LE)
            loss = micro_batch.loss(out)
            objective(out, loss, num_targets, self.model.config, self.train, load_LE).backward()
            of_this = StepSums.of(out, loss, shared)
            sums = of_this if sums is None else sums.plus(of_this)
        assert sums is not None, "every rank has at least one round"
        return sums

    @torch.no_grad()
    def _count_loads(self, micro_batches: list[MicroBatch]) -> Tensor:
        """The loads of the whole batch before any of it is learned from, (L, E) on all ranks. A collective.

        The loss's gradient needs them from the first micro-batch on, so with several each goes forward twice.
        """
        loads = []
        for micro_batch in micro_batches:
            begin_round(self.model, last=False, keep_gathered=self.train.keep_gathered, backward=False)
            loads.append(micro_batch.forward(self.model).load_LE)
        load_LE = torch.stack(loads).sum(dim=0)
        self.meshes.sum_over_ranks(load_LE)
        return load_LE
