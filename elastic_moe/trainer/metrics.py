"""`metrics.jsonl`: one object a line, for each step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from elastic_moe.errors import UserError
from storage import CheckpointEvent


@dataclass(frozen=True)
class StepMetrics:
    """One line.

    After a restart a step may appear again, done anew from the last checkpoint: readers take the last of its lines.

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


@dataclass
class SaveCounts:
    """What the checkpoints of this process have cost so far, as its metrics tell it."""

    blocked_s: float = 0.0
    left_out: int = 0

    def hear(self, event: CheckpointEvent, fields: Mapping[str, Any]) -> None:
        """Count what a Checkpointer tells."""
        self.left_out += event in (CheckpointEvent.SKIPPED, CheckpointEvent.REPLACED)


class MetricsFile:
    """Appends lines, each with one write call: a reader, or a crash, never sees a part of one behind another.

    Raises:
        UserError: the file cannot be made or opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"train.metrics {str(path)!r} cannot be written: {error.strerror}") from error

    def append(self, metrics: StepMetrics) -> None:
        os.write(self._fd, (json.dumps(asdict(metrics), allow_nan=False) + "\n").encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
