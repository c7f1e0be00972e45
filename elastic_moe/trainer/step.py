"""One optimizer step on the global batch, shared by the ranks and accumulated over rounds.

Shape suffixes: B sequences of a micro-batch, S positions, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW

from elastic_moe.data.corpus import Corpus
from elastic_moe.data.order import Int64s, Share, Split
from elastic_moe.errors import UserError
from elastic_moe.model.config import ModelConfig
from elastic_moe.model.decoder import Decoder, DecoderOutput, token_loss
from elastic_moe.model.router import move_bias
from elastic_moe.parallel import Meshes, begin_round, clip_gradients
from elastic_moe.trainer.config import OptimConfig, TrainConfig
from elastic_moe.trainer.health import why_to_skip
from elastic_moe.trainer.optimizer import set_learning_rate
from elastic_moe.trainer.schedule import learning_rate


class MicroBatch(NamedTuple):
    """Windows, int64 (B, S + 1), and which of them are real, bool (B,): the others are padding."""

    windows_BS: Tensor
    real_B: Tensor


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


@dataclass(frozen=True)
class Batches:
    """This rank's micro-batches of any step."""

    corpus: Corpus
    split: Split
    seed: int
    global_batch: int
    vocab_size: int
    share: Share
    device: torch.device

    def of_step(self, step: int) -> list[MicroBatch]:
        """Yield a micro-batch for each round of the share, each full: padded with sequences that are not real.

        Raises:
            UserError: a token is outside the model's vocabulary.
        """
        return self._of_samples(self.split.trained(self.seed, step, self.global_batch))

    def held_out(self, at_most: int) -> Iterator[list[MicroBatch]]:
        """Yield batches of samples that are never trained on, the same in every run, `at_most` sequences in all.

        Raises:
            UserError: a token is outside the model's vocabulary.
        """
        stop = min(at_most, self.split.num_held_out)
        for start in range(0, stop, self.global_batch):
            yield self._of_samples(self.split.held_out(start, min(start + self.global_batch, stop)))

    def _of_samples(self, samples: Int64s) -> list[MicroBatch]:
        chosen = samples[self.share.start : self.share.stop]
        windows = torch.from_numpy(self.corpus.windows(chosen))
        if len(windows) and (highest := int(windows.max())) >= self.vocab_size:
            raise UserError(
                f"the data holds token {highest} but model.vocab_size is {self.vocab_size}: raise it above the token"
            )
        slots = self.share.rounds * self.share.micro_batch
        padded = windows.new_zeros((slots, self.corpus.seq_len + 1))
        padded[: len(windows)] = windows
        real = torch.arange(slots) < len(windows)
        return [
            MicroBatch(windows_BS.to(self.device), real_B.to(self.device))
            for windows_BS, real_B in zip(
                padded.split(self.share.micro_batch), real.split(self.share.micro_batch), strict=True
            )
        ]


def objective(out: DecoderOutput, loss: Tensor, config: ModelConfig, train: TrainConfig) -> Tensor:
    """What a micro-batch adds to the objective of the global batch, a float64 scalar.

    Every term is a sum over sequences, divided by a count of the *global* batch: any split adds up to the same.
    """
    num_tokens = train.global_batch * train.seq_len
    total = loss / num_tokens
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
        own_loss, load_LE = self._accumulate(self.batches.of_step(step))
        loss_sum, load_LE = self._add_over_ranks(own_loss, load_LE)
        grad_norm = clip_gradients(self.model.parameters(), self.meshes, self.optim.clip_norm)
        lr = learning_rate(step, self.horizon, self.optim)
        loss = float(loss_sum.item()) / (self.train.global_batch * self.train.seq_len)
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
        train, total = self.train, torch.zeros((), dtype=torch.float64, device=self.batches.device)
        for micro_batches in self.batches.held_out(train.validation_sequences):
            for windows_BS, real_B in micro_batches:
                begin_round(self.model, last=False)  # gathered parameters go again: the next step has others
                out: DecoderOutput = self.model(windows_BS[:, :-1], real_B)
                total += token_loss(out.logits_BSV, windows_BS[:, 1:], real_B)
        dist.all_reduce(total)
        num_sequences = min(train.validation_sequences, self.batches.split.num_held_out)
        return float(total.item()) / (num_sequences * train.seq_len)

    def _accumulate(self, micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Gradients of all micro-batches, reduced over ranks with the last; this rank's loss sum and loads."""
        losses, loads = [], []
        for i, (windows_BS, real_B) in enumerate(micro_batches):
            begin_round(self.model, last=i + 1 == len(micro_batches), keep_gathered=self.train.keep_gathered)
            out: DecoderOutput = self.model(windows_BS[:, :-1], real_B)
            loss = token_loss(out.logits_BSV, windows_BS[:, 1:], real_B)
            objective(out, loss, self.model.config, self.train).backward()
            losses.append(loss.detach())
            loads.append(out.load_LE)
        return torch.stack(losses).sum(), torch.stack(loads).sum(dim=0)

    def _add_over_ranks(self, loss: Tensor, load_LE: Tensor) -> tuple[Tensor, Tensor]:
        """One all-reduce for everything that a step reports."""
        packed = torch.cat((loss[None], load_LE.flatten()))
        dist.all_reduce(packed)
        return packed[0], packed[1:].view_as(load_LE)
