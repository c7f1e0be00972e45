"""One optimizer step on the global batch, shared by the ranks and accumulated over rounds.

Shape suffixes: B sequences of a micro-batch, S positions, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.decoder import Decoder, DecoderOutput
from elastic_moe.model.router import move_bias
from elastic_moe.parallel import Meshes, begin_round, clip_gradients
from elastic_moe.trainer.batches import Batches, MicroBatch, count_targets
from elastic_moe.trainer.config import OptimConfig, TrainConfig
from elastic_moe.trainer.health import why_to_skip
from elastic_moe.trainer.optimizer import set_learning_rate
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


Finish = Callable[[StepResult, Callable[[], None]], None]
"""Hears of a step's result, and has it applied: by a call that changes the state of this rank alone."""


def objective(out: DecoderOutput, loss: Tensor, num_targets: Tensor, config: ModelConfig, train: TrainConfig) -> Tensor:
    """What a micro-batch adds to the objective of the global batch, a float64 scalar.

    Every term is a sum over sequences, divided by a count of the *global* batch: any split adds up to the same.

    Args:
        out: of the model.
        loss: its sum of token losses.
        num_targets: tokens that the whole global batch predicts.
        config: says which terms there are.
        train: says how large the global batch is.
    """
    num_tokens = train.global_batch * train.seq_len
    total = loss / num_targets
    if config.balance == "sequence":
        total = total + config.balance_coeff * out.balance.double() / train.global_batch
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
        own_loss, load_LE = self._accumulate(micro_batches, num_targets)
        loss_sum, load_LE = self._add_over_ranks(own_loss, load_LE)
        grad_norm = clip_gradients(self.model.parameters(), self.meshes, self.optim.clip_norm)
        lr = learning_rate(step, self.horizon, self.optim)
        loss = float(loss_sum.item()) / float(num_targets.item())
        if skipped := why_to_skip(loss, grad_norm):
            self.optimizer.zero_grad()
            return StepResult(loss, grad_norm, lr, load_LE.cpu(), skipped, float(own_loss.item()))

        def apply() -> None:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.model.config.balance == "bias":
                for block, load_E in zip(self.model.blocks, load_LE, strict=True):
                    move_bias(block.moe.router.expert_bias, load_E, self.model.config.balance_rate)

        result = StepResult(loss, grad_norm, lr, load_LE.cpu())
        if finish is None:
            apply()
        else:
            finish(result, apply)
        return result

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross entropy over the sequences held out, nats, the same on all ranks. A collective, and no step."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.batches.device)
        for micro_batches in self.batches.held_out(self.train.validation_sequences):
            for micro_batch in micro_batches:
                begin_round(self.model, last=False)  # gathered parameters go again: the next step has others
                loss = micro_batch.loss(micro_batch.forward(self.model))
                sums += torch.stack((loss, micro_batch.num_targets()))
        dist.all_reduce(sums)
        loss_sum, num_targets = sums.tolist()
        return float(loss_sum / max(1.0, num_targets))

    def _num_targets(self, micro_batches: list[MicroBatch]) -> Tensor:
        """How many tokens the global batch predicts, a float64 scalar. A collective, where that is not known."""
        if self.batches.corpus.end_of_document is None:
            all_of_them = float(self.train.global_batch * self.train.seq_len)
            return torch.tensor(all_of_them, dtype=torch.float64, device=self.batches.device)
        count = count_targets(micro_batches)
        dist.all_reduce(count)
        return count.clamp(min=1)  # a batch may hold the ends of documents and nothing else

    def _accumulate(self, micro_batches: list[MicroBatch], num_targets: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of all micro-batches, reduced over ranks with the last; this rank's loss sum and loads."""
        losses, loads = [], []
        for i, micro_batch in enumerate(micro_batches):
            begin_round(self.model, last=i + 1 == len(micro_batches), keep_gathered=self.train.keep_gathered)
            out = micro_batch.forward(self.model)
            loss = micro_batch.loss(out)
            objective(out, loss, num_targets, self.model.config, self.train).backward()
            losses.append(loss.detach())
            loads.append(out.load_LE)
        return torch.stack(losses).sum(), torch.stack(loads).sum(dim=0)

    def _add_over_ranks(self, loss: Tensor, load_LE: Tensor) -> tuple[Tensor, Tensor]:
        """One all-reduce for everything that a step reports."""
        packed = torch.cat((loss[None], load_LE.flatten()))
        dist.all_reduce(packed)
        return packed[0], packed[1:].view_as(load_LE)
