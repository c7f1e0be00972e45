"""What a rank works on in a step: micro-batches of the global batch's windows.

Shape suffixes: B sequences of a micro-batch, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_moe.data.corpus import Corpus
from elastic_moe.data.order import Int64s, Share, Split
from elastic_moe.data.packing import documents_of, predicted
from elastic_moe.errors import UserError
from elastic_moe.model.decoder import Decoder, DecoderOutput, token_loss


class MicroBatch(NamedTuple):
    """Windows, int64 (B, S + 1), and which of them are real, bool (B,): the others are padding.

    Where attention ends with documents, also int64 (B, S), the document of each position, and bool (B, S), whether the
    token after it is predicted from it.
    """

    windows_BS: Tensor
    real_B: Tensor
    documents_BS: Tensor | None = None
    predicted_BS: Tensor | None = None

    def forward(self, model: Decoder) -> DecoderOutput:
        """What the model makes of it; of padding as well, which counts nowhere."""
        out: DecoderOutput = model(self.windows_BS[:, :-1], self.real_B, self.documents_BS)
        return out

    def loss(self, out: DecoderOutput) -> Tensor:
        """The sum of the losses of its targets, a float64 scalar."""
        return token_loss(out.logits_BSV, self.windows_BS[:, 1:], self.real_B, self.predicted_BS)

    def num_targets(self) -> Tensor:
        """How many tokens are predicted, a float64 scalar."""
        if self.predicted_BS is None:
            return self.real_B.sum().double() * (self.windows_BS.shape[1] - 1)
        return (self.predicted_BS.sum(dim=1) * self.real_B).sum().double()


def count_targets(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """How many tokens several micro-batches predict, a float64 scalar."""
    return torch.stack([micro_batch.num_targets() for micro_batch in micro_batches]).sum()


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
        """A micro-batch for each round of the share, each full: padded with sequences that are not real.

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
        columns = [padded, real]
        if (end := self.corpus.end_of_document) is not None:
            columns += [torch.from_numpy(of(padded.numpy(), end)) for of in (documents_of, predicted)]
        parts = zip(*(column.split(self.share.micro_batch) for column in columns), strict=True)
        return [MicroBatch(*(tensor.to(self.device) for tensor in part)) for part in parts]
