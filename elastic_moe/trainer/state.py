"""What a checkpoint of a training run holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from torch.optim import AdamW

from elastic_moe.errors import UserError
from elastic_moe.trainer.changes import MAY_CHANGE, in_words, meant, whole_model
from elastic_moe.trainer.optimizer import moments

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataState:
    """What a run must go on with: with these, the samples of every step are known, and what is made of them.

    Attributes:
        fingerprint: of the corpus, see `elastic_moe.data.corpus.Corpus`.
        validation: part of the samples that is held out.
        model: every field of the job's `ModelConfig`; empty in checkpoints of before it was kept.
        tokenizer: digest of the tokenizer; "" for bytes, or ids that come without one.
        document_mask: whether attention ends with documents.
        tokenizer_files: the tokenizer itself, see `elastic_moe.data.tokenizer.TokenizerFiles.packed`, for samples and
            exports of the model; b"" without one.
        settings: what else decides about the numbers, see `elastic_moe.trainer.changes`; "" in checkpoints of before it
            was kept.
        tokens: what token ids stand for, see `elastic_moe.data.corpus.TokenKind`; "" in checkpoints of before it was
            kept.
    """

    seed: int
    global_batch: int
    seq_len: int
    fingerprint: str
    model: Mapping[str, Any] = field(default_factory=dict)
    validation: float = 0.0
    tokenizer: str = ""
    document_mask: bool = False
    tokenizer_files: bytes = b""
    settings: str = ""
    tokens: str = ""

    def check(self, saved: DataState, *, may_change: bool = False) -> str:
        """Compare with what a checkpoint was trained on.

        Args:
            saved: the checkpoint's.
            may_change: the job's `data.may_change`.

        Returns:
            What of the data has changed, as it may; "" if nothing has.

        Raises:
            UserError: the job would go on with other samples or another model than it began with.
        """
        if (changed := self._changed_data(saved)) and not may_change:
            raise UserError(
                f"the checkpoint was trained {changed}: set that back, set data.may_change to go on with the new, or "
                "give another checkpoint.url to start afresh"
            )
        for name in ("seed", "global_batch", "seq_len"):
            _refuse_change(f"train.{name}", getattr(saved, name), getattr(self, name))
        self.check_model(saved)
        return changed

    def _changed_data(self, saved: DataState) -> str:
        if saved.tokenizer != self.tokenizer:
            kinds = [
                f"data.tokenizer {digest[:12]}" if digest else "bytes" for digest in (saved.tokenizer, self.tokenizer)
            ]
            return f"on other tokens ({kinds[0]}, now {kinds[1]})"
        if saved.document_mask != self.document_mask:
            return f"with data.document_mask = {str(saved.document_mask).lower()}"
        if saved.fingerprint != self.fingerprint:
            return f"on other data (data.url's fingerprint was {saved.fingerprint[:12]}, now {self.fingerprint[:12]})"
        if saved.validation != self.validation:
            return f"with data.validation = {saved.validation}, now {self.validation}"
        return ""

    def check_model(self, saved: DataState) -> None:
        """Raises UserError where the checkpoint's model is another one, which may have tensors of the same shapes."""
        if not saved.model:
            log.info("the checkpoint does not say what its model is: its tensors' names and shapes were compared alone")
            return
        was = whole_model(saved)
        as_meant = meant(was), meant(self.model)
        for name in sorted(self.model.keys() - MAY_CHANGE):
            if was[name] != self.model[name]:  # whose name is the one to tell
                _refuse_change(f"model.{name}", *(model[name] for model in as_meant))


def _refuse_change(name: str, before: Any, now: Any) -> None:
    if before != now:
        raise UserError(
            f"{name} is {in_words(now)} but the checkpoint was trained with {in_words(before)}: set it back, or give "
            "another checkpoint.url to start afresh"
        )


class DataProgress:
    """`DataState` and the step as a part of a checkpoint (DCP's Stateful protocol); a load keeps what was saved.

    Attributes:
        step: completed steps, skipped ones among them.
        skipped: how many of them have changed nothing.
        skipped_in_row: how many of those were the last ones.
        horizon: the step at which the learning rate has decayed; a run that is made longer keeps it.
    """

    def __init__(self, data: DataState, horizon: int) -> None:
        self.data = data
        self.horizon = horizon
        self.step = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.loaded: DataState | None = None

    @property
    def updates(self) -> int:
        """The number of steps that have changed the model, which is how many the moments have seen."""
        return self.step - self.skipped

    def count(self, *, skipped: bool) -> None:
        """Count a step as done."""
        self.step += 1
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0

    def state_dict(self) -> dict[str, Any]:
        told = {"step": self.step, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        return {**told, "horizon": self.horizon, **asdict(self.data)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        fields = dict(state_dict)
        self.step = fields.pop("step")
        self.skipped = fields.pop("skipped", 0)
        self.skipped_in_row = fields.pop("skipped_in_row", 0)
        self.horizon = fields.pop("horizon", self.horizon)
        self.loaded = DataState(**fields)


def training_state(model: nn.Module, optimizer: AdamW, progress: DataProgress) -> dict[str, Any]:
    """The state of a run for a Checkpointer: `model.*`, `optim.exp_avg.*`, `optim.exp_avg_sq.*`, `data.*`.

    Its tensors are the live ones, to be read at a save and written at a restore. It has no scheduler, no sampler
    and no random state: those are functions of the step and the seed.
    """
    return {"model": dict(model.state_dict()), "optim": moments(model, optimizer), "data": progress}
