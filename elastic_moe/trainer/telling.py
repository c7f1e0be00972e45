"""What rank 0 tells of each step: a line of the metrics, the progress, and the trackers that the job names."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from elastic_moe.config import JobConfig
from elastic_moe.trainer.metrics import MetricsFile, SaveCounts, StepMetrics
from elastic_moe.trainer.progress import LiveLine, Pace, Progress, wants_line
from elastic_moe.trainer.step import StepResult
from elastic_moe.trainer.throughput import flops_per_token, peak_flops
from elastic_moe.trainer.trackers import Careful, open_trackers
from launcher import MeshPlan, WorkerContext, hide_secrets

log = logging.getLogger(__name__)


@dataclass
class Teller:
    """Tells of steps, on rank 0.

    Attributes:
        peak: operations per second of all ranks at best; None where nobody knows.
    """

    job: JobConfig
    here: WorkerContext
    plan: MeshPlan
    peak: float | None
    metrics: MetricsFile | None = None
    line: LiveLine | None = None
    trackers: list[Careful] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)

    def tell(self, step: int, result: StepResult, step_s: float, val_loss: float | None, saves: SaveCounts) -> None:
        """Tell of the step that was just completed.

        Args:
            step: its number.
            step_s: seconds that it took, without validation and saves.
        """
        train = self.job.train
        shown = step % train.log_every == 0 or step == train.steps or val_loss is not None
        told = self._metrics(step, result, step_s, val_loss, saves, with_loads=shown)
        if self.metrics is not None:
            self.metrics.append(told)
        if self.trackers:
            numbers = told.numbers()
            for tracker in self.trackers:
                tracker.log(step, numbers)
        now_s = time.monotonic()
        self.pace.saw(step, now_s)
        progress = self._progress(step, result, val_loss)
        if self.line is not None:
            self.line.show(str(progress), now_s)
        if (shown and self.line is None) or val_loss is not None:
            log.info("%s", progress)

    def _metrics(
        self,
        step: int,
        result: StepResult,
        step_s: float,
        val_loss: float | None,
        saves: SaveCounts,
        *,
        with_loads: bool,
    ) -> StepMetrics:
        train, routing, sharing, plan = self.job.train, result.routing, result.sharing, self.plan
        tokens_per_s = train.global_batch * train.seq_len / step_s
        utilisation = self._utilisation(tokens_per_s)
        return StepMetrics(
            step=step,
            loss=result.loss if math.isfinite(result.loss) else None,
            grad_norm=result.grad_norm if math.isfinite(result.grad_norm) else None,
            lr=result.lr,
            tokens=step * train.global_batch * train.seq_len,
            load_max=float((result.load_LE.amax(dim=1) / result.load_LE.mean(dim=1)).max()),
            step_s=step_s,
            generation=self.here.generation,
            world_size=self.here.world_size,
            mesh={"replicate": plan.replicate, "shard": plan.shard, "expert": plan.expert},
            ts=time.time(),
            skipped=result.skipped,
            val_loss=val_loss,
            save_s=round(saves.blocked_s, 4),
            saves_left_out=saves.left_out,
            tokens_per_s=round(tokens_per_s, 1),
            mfu=None if utilisation is None else round(utilisation, 5),
            load_min=routing.load_min if routing else None,
            load_entropy=_rounded(routing.load_entropy_L) if routing else None,
            router_entropy=_rounded(routing.router_entropy_L) if routing else None,
            dropped=routing.dropped if routing else 0,
            rank_load=round(sharing.rank_load, 5) if sharing else None,
            rank_load_owned=round(sharing.rank_load_owned, 5) if sharing else None,
            expert_copies=sharing.copies if sharing else None,
            load=routing.load_LE if routing and with_loads else None,
            redone=self.metrics is not None and step <= self.metrics.last_step,
        )

    def _progress(self, step: int, result: StepResult, val_loss: float | None) -> Progress:
        train, steps_per_s = self.job.train, self.pace.steps_per_s
        tokens_per_s = None if steps_per_s is None else steps_per_s * train.global_batch * train.seq_len
        return Progress(
            step=step,
            steps=train.steps,
            loss=result.loss,
            val_loss=val_loss,
            grad_norm=result.grad_norm,
            tokens_per_s=tokens_per_s,
            utilisation=None if tokens_per_s is None else self._utilisation(tokens_per_s),
            mesh=(self.plan.replicate, self.plan.shard, self.plan.expert),
            generation=self.here.generation,
            left_s=None if steps_per_s is None else (train.steps - step) / steps_per_s,
        )

    def _utilisation(self, tokens_per_s: float) -> float | None:
        if self.peak is None:
            return None
        return tokens_per_s * flops_per_token(self.job.model, self.job.train.seq_len) / self.peak


def _rounded(numbers: Sequence[float]) -> list[float] | None:
    """None where one of them is not finite, as in a step that was skipped: JSON has no such numbers."""
    return [round(number, 5) for number in numbers] if all(map(math.isfinite, numbers)) else None


@contextlib.contextmanager
def open_teller(
    job: JobConfig, here: WorkerContext, plan: MeshPlan, device: torch.device, completed: int
) -> Iterator[Teller | None]:
    """What tells of this process's steps, until the block ends; None on all ranks but the first.

    Args:
        completed: steps done before.

    Raises:
        UserError: the metrics cannot be written, or a tracker that the job names will not begin.
    """
    if here.rank != 0:
        yield None
        return
    train = job.train
    of_one = train.peak_flops or peak_flops(device, torch.bfloat16 if train.dtype == "bfloat16" else torch.float32)
    teller = Teller(job, here, plan, None if of_one is None else of_one * here.world_size)
    with contextlib.ExitStack() as stack:
        if train.metrics is not None:
            teller.metrics = stack.enter_context(MetricsFile(train.metrics))
        settings: dict[str, Any] = json.loads(hide_secrets(job.model_dump_json()))
        named = {"tensorboard": train.tensorboard, "wandb": train.wandb}
        for tracker in open_trackers(**named, completed=completed, run_id=here.run_id, settings=settings):
            stack.callback(tracker.close)
            teller.trackers.append(tracker)
        if train.progress == "line" or (train.progress == "auto" and wants_line(sys.stderr)):
            teller.line = stack.enter_context(LiveLine())
        yield teller
