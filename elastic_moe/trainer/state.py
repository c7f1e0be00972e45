"""What a checkpoint of a training run holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW

from elastic_moe.errors import UserError
from elastic_moe.trainer.optimizer import moments


@dataclass(frozen=True)
class DataState:
    """Where a job is in its data: with these, the samples of every step are known.

    Attributes:
        fingerprint: of the corpus, see `elastic_moe.data.corpus.fingerprint`.
    """

    seed: int
    global_batch: int
    seq_len: int
    fingerprint: str

    def check(self, saved: DataState) -> None:
        """Compare with what a checkpoint was trained on.

        Raises:
            UserError: the job would go on with other samples than it began with.
        """
        if saved.fingerprint != self.fingerprint:
            raise UserError(
                f"the checkpoint was trained on other data (fingerprint {saved.fingerprint[:12]}, now "
                f"{self.fingerprint[:12]}): give the same data.url, or another checkpoint.url to start afresh"
            )
        for field in ("seed", "global_batch", "seq_len"):
            before, now = getattr(saved, field), getattr(self, field)
            if before != now:
                raise UserError(
                    f"train.{field} is {now} but the checkpoint was trained with {before}: set it back, or give "
                    "another checkpoint.url to start afresh"
                )


class DataProgress:
    """`DataState` and the step as a part of a checkpoint (DCP's Stateful protocol); a load keeps what was saved.

    Attributes:
        step: completed steps, skipped ones among them.
        skipped: how many of them have changed nothing.
        skipped_in_row: how many of those were the last ones.
    """

    def __init__(self, data: DataState) -> None:
        self.data = data
        self.step = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.loaded: DataState | None = None

    @property
    def updates(self) -> int:
        """Steps that have changed the model: as many as the moments have seen."""
        return self.step - self.skipped

    def count(self, *, skipped: bool) -> None:
        """One step more."""
        self.step += 1
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0

    def state_dict(self) -> dict[str, Any]:
        told = {"step": self.step, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        return {**told, **asdict(self.data)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        fields = dict(state_dict)
        self.step = fields.pop("step")
        self.skipped = fields.pop("skipped", 0)
        self.skipped_in_row = fields.pop("skipped_in_row", 0)
        self.loaded = DataState(**fields)


def training_state(model: nn.Module, optimizer: AdamW, progress: DataProgress) -> dict[str, Any]:
    """The state of a run for a Checkpointer: `model.*`, `optim.exp_avg.*`, `optim.exp_avg_sq.*`, `data.*`.

    Its tensors are the live ones, to be read at a save and written at a restore. It has no scheduler, no sampler
    and no random state: those are functions of the step and the seed.
    """
    return {"model": dict(model.state_dict()), "optim": moments(model, optimizer), "data": progress}
