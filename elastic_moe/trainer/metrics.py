"""`metrics.jsonl`: one object a line, for each step."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elastic_moe.errors import UserError
from elastic_moe.events import TrainerEvent
from launcher import worker
from storage import CheckpointEvent

log = logging.getLogger(__name__)

_LOOKED_AT_BYTES = 1 << 20
_WAITING_BYTES = 4 << 20  # of lines, while the disk takes none: thousands of steps
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what a disk may get over; all else is a mistake in the job
_STEP = re.compile(rb'^\{"step": (\d+),', re.MULTILINE)


@dataclass(frozen=True)
class StepMetrics:
    """One line.

    After a restart a step may appear again, done anew from the last checkpoint: such lines have `redone`, and readers
    take the last line of a step.

    Attributes:
        step: completed steps, this one included.
        loss: mean cross entropy over the tokens of the global batch, nats; None where it is not finite.
        grad_norm: global L2 norm before clipping; None where it is not finite.
        lr: learning rate of the step.
        tokens: tokens trained on since the start of the job.
        load_max: rows of the busiest expert of any layer over the mean; 1 is level.
        step_s: seconds, this rank's clock.
        generation: of the launcher; 0 without one.
        world_size: ranks that trained the step.
        mesh: its replicate, shard and expert degrees.
        ts: when the step was complete, epoch seconds.
        skipped: why the step has changed nothing; "" for one that has.
        val_loss: mean cross entropy over the sequences held out, nats; None where the step had no validation.
        save_s: seconds for which a checkpoint held the training up after the step before, this rank's clock.
        saves_left_out: checkpoints that were due since this process began and were not saved, since earlier ones took
            all the memory for copies.
        tokens_per_s: of all ranks, in this step.
        mfu: model FLOPs utilisation, 0 to 1; None where the devices' peak is unknown.
        load_min: rows of the least busy expert of any layer over the mean.
        load_entropy: by layer, the entropy of the experts' loads over that of level ones.
        router_entropy: by layer, the mean entropy of a token's probabilities over that of equal ones; None where one
            is not finite.
        dropped: rows that went to no expert: 0.
        rank_load: with `train.expert_replicas`, rows of the busiest rank of an expert-parallel group over the mean.
        rank_load_owned: the same if each rank had computed its own experts' rows alone.
        expert_copies: weights of experts that were sent to be computed elsewhere in this step, over all layers.
        load: rows of each expert, by layer; None but in every `train.log_every`th step and those with a validation.
        redone: whether the file had a line of this step, or of a later one, when this process began.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    tokens: int
    load_max: float
    step_s: float
    generation: int
    world_size: int
    mesh: dict[str, int]
    ts: float
    skipped: str = ""
    val_loss: float | None = None
    save_s: float = 0.0
    saves_left_out: int = 0
    tokens_per_s: float | None = None
    mfu: float | None = None
    load_min: float | None = None
    load_entropy: list[float] | None = None
    router_entropy: list[float] | None = None
    dropped: int = 0
    rank_load: float | None = None
    rank_load_owned: float | None = None
    expert_copies: int | None = None
    load: list[list[int]] | None = None
    redone: bool = False

    def numbers(self) -> dict[str, float]:
        """What a tracker draws, by name; what does not exist in this step is left out."""
        told: dict[str, float | None] = {
            "loss/train": self.loss,
            "loss/validation": self.val_loss,
            "optim/grad_norm": self.grad_norm,
            "optim/lr": self.lr,
            "speed/tokens_per_s": self.tokens_per_s,
            "speed/step_s": self.step_s,
            "speed/mfu": self.mfu,
            "speed/save_s": self.save_s,
            "experts/load_max": self.load_max,
            "experts/load_min": self.load_min,
            "experts/load_entropy": _mean(self.load_entropy),
            "experts/router_entropy": _mean(self.router_entropy),
            "experts/dropped": self.dropped,
            "experts/rank_load": self.rank_load,
            "experts/rank_load_owned": self.rank_load_owned,
            "experts/copies": self.expert_copies,
            "job/world_size": self.world_size,
            "job/generation": self.generation,
        }
        return {name: float(number) for name, number in told.items() if number is not None}


def _mean(numbers: Sequence[float] | None) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


@dataclass
class SaveCounts:
    """What the checkpoints of this process have cost so far, as its metrics tell it.

    `trusted_after`: where it has gone on from a state that was in memory only, the step up to which that is blamed for
    what is not finite.
    """

    blocked_s: float = 0.0
    left_out: int = 0
    trusted_after: int | None = None

    def hear(self, event: CheckpointEvent, fields: Mapping[str, Any]) -> None:
        """Take note of what a Checkpointer tells."""
        self.left_out += event in (CheckpointEvent.SKIPPED, CheckpointEvent.REPLACED)
        if event == CheckpointEvent.RESTORED:
            self.trusted_after = fields.get("trusted_after")


class MetricsFile:
    """Appends lines, each with one write call: a reader, or a crash, never sees a part of one behind another.

    A disk that is full, or fails, ends no training. It is told once, lines wait for a while, and each further one tries
    again.

    Attributes:
        last_step: the greatest step of which the file has had a line when it was opened, as far as its end tells; 0 if
            there is none.

    Raises:
        UserError: the file cannot be made or opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._fd: int | None = None
        self._waiting = bytearray()  # begins with what is left of a line that was written in part
        self._num_lost = 0
        self._fails = False
        self.last_step = 0
        try:
            self._write()
        except OSError as error:
            if error.errno not in _PASSING:
                raise UserError(f"train.metrics {str(path)!r} cannot be written: {error.strerror}") from error
            self._tell(error, 0)

    def append(self, metrics: StepMetrics) -> None:
        """Write a line, or keep it for the next call."""
        line = json.dumps(asdict(metrics), allow_nan=False) + "\n"
        if len(self._waiting) < _WAITING_BYTES:
            self._waiting += line.encode()
        else:
            self._num_lost += 1
        try:
            self._write()
        except OSError as error:
            self._tell(error, metrics.step)

    def _write(self) -> None:
        if self._fd is None:
            self._open()
        assert self._fd is not None
        while self._waiting:
            written = os.write(self._fd, self._waiting)
            del self._waiting[:written]
        if self._fails:
            log.info("train.metrics %s is written again; %d of its lines were lost", self._path, self._num_lost)
            self._fails, self._num_lost = False, 0

    def _tell(self, error: OSError, step: int) -> None:
        """Say that it cannot be written, once until it can."""
        if not self._fails:
            why = error.strerror or str(error)
            log.warning("train.metrics %s cannot be written: %s; it is tried again with each step", self._path, why)
            worker.event(TrainerEvent.METRICS_FAILED, path=str(self._path), step=step, reason=why)
            self._fails = True

    def _open(self) -> None:
        """Find the last step in the lines at the file's end; one that a crash has cut is ended, so that ours are
        whole.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            end = os.pread(fd, _LOOKED_AT_BYTES, max(0, size - _LOOKED_AT_BYTES))
        except OSError:
            os.close(fd)  # and all of this anew with the next line: none may be written behind half of one
            raise
        self._fd = fd
        if end and not end.endswith(b"\n"):
            self._waiting[:0] = b"\n"
        self.last_step = max(map(int, _STEP.findall(end)), default=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting:
            with contextlib.suppress(OSError):
                self._write()
        if num_lines := self._waiting.count(b"\n") + self._num_lost:
            log.warning("train.metrics %s lacks %d lines, which could not be written", self._path, num_lines)
        if self._fd is not None:
            os.close(self._fd)
