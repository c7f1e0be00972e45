"""The loop over steps: what is told of each, when the state is saved, and when the training stops."""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from elastic_moe.config import JobConfig
from elastic_moe.errors import NotFinite, NotSaved
from elastic_moe.events import TrainerEvent
from elastic_moe.trainer.health import first_not_finite, go_back_to
from elastic_moe.trainer.metrics import SaveCounts
from elastic_moe.trainer.signals import StopSignals
from elastic_moe.trainer.state import DataProgress
from elastic_moe.trainer.step import Stepper, StepResult
from elastic_moe.trainer.telling import Teller
from elastic_moe.trainer.world import from_rank_0
from launcher import Stop, WorkerContext, worker
from storage import Checkpointer, CheckpointState, NoCheckpoint, StorageError, locate, summaries

log = logging.getLogger(__name__)


@dataclass
class Loop:
    """A run on this rank, from `progress.step` on. `run` is a collective.

    At the boundary after a skipped step nothing is saved, and nobody stops: whether its state is any good shows in the
    next one. The last step has no next one, so its state counts as unhealthy then.
    """

    job: JobConfig
    here: WorkerContext
    stepper: Stepper
    progress: DataProgress
    state: dict[str, Any]
    checkpointer: Checkpointer | None
    teller: Teller | None
    signals: StopSignals
    saves: SaveCounts

    def run(self) -> None:
        """Step to the last, or to a stop.

        Raises:
            NotSaved: the last step could not be saved.
            NotFinite: too many steps in a row were skipped, or the last one, or the model holds what is not finite.
        """
        job, progress = self.job, self.progress
        if progress.step >= job.train.steps:
            log.info(
                "the checkpoint is of step %d and train.steps is %d: nothing is left", progress.step, job.train.steps
            )
        while progress.step < job.train.steps:
            result = self._step()
            reason = worker.should_stop() or (Stop.DRAIN if self.signals.asked() else None)
            last = progress.step == job.train.steps
            if result.skipped:
                self._mind_skipped(result)
                if not last:
                    if reason:
                        worker.event(TrainerEvent.STOP_POSTPONED, step=progress.step, reason=reason)
                    continue
            if self.checkpointer is not None:
                self._tend(self.checkpointer, result, reason, last=last)
            if result.skipped:
                raise self._give_up(f"step {progress.step}, the last, was skipped, since {result.skipped}", saved=True)
            if reason and not last and self._may_stop(reason):
                if self.checkpointer is not None and reason == Stop.DRAIN:
                    self.checkpointer.close()  # if all nodes drain, the next launch need not ask whether this one lives
                worker.yielded(progress.step)
                return

    def _step(self) -> StepResult:
        began_s = time.perf_counter()
        result = self.stepper.step(self.progress.step, functools.partial(self._finish, began_s))
        if result.skipped:
            self.progress.count(skipped=True)
            self._tell(result, began_s)
        if self._validates(self.progress.step):
            step_s = time.perf_counter() - began_s
            self._report(result, step_s, self._validate())
        return result

    def _finish(self, began_s: float, result: StepResult, apply: Callable[[], None]) -> None:
        """Apply a step, count and tell it: before ranks meet again, which may be in vain, and it can be gone on from.

        Where a peer is lost another thread may do so in place of this one, which waits for the peer and will be ended.
        """
        training = threading.current_thread()

        def finish() -> None:
            apply()
            self.progress.count(skipped=False)
            self._tell(result, began_s, is_last_word=threading.current_thread() is not training)

        if self.checkpointer is None:
            finish()
        else:
            self.checkpointer.finish_step(self.progress.step + 1, self.state, finish)

    def _tell(self, result: StepResult, began_s: float, *, is_last_word: bool = False) -> None:
        """Tell of a step that was done; one that is validated is told after that, if there is an after."""
        step, step_s = self.progress.step, time.perf_counter() - began_s
        worker.heartbeat(step, step_s=step_s)
        if is_last_word or not self._validates(step):
            self._report(result, step_s, None)

    def _validates(self, step: int) -> bool:
        """Whether the loss on what is held out is computed after that step."""
        every = self.job.train.validate_every
        return every is not None and (step % every == 0 or step == self.job.train.steps)

    def _validate(self) -> float | None:
        """The loss on what is held out. A collective."""
        with worker.untimed():
            loss = self.stepper.validate()
        return loss if math.isfinite(loss) else None

    def _tend(self, checkpointer: Checkpointer, result: StepResult, reason: str | None, *, last: bool) -> None:
        """Save the state if it is time to; let the Checkpointer know of it in any case."""
        began_s = time.perf_counter()
        if reason or last or checkpointer.due(self.progress.step):
            self._save(checkpointer, result, reason, last=last)
        else:
            checkpointer.save(self.progress.step, self.state)
        self.saves.blocked_s = time.perf_counter() - began_s

    def _save(self, checkpointer: Checkpointer, result: StepResult, reason: str | None, *, last: bool) -> None:
        step = self.progress.step
        if reason == Stop.DRAIN or last:
            checkpointer.announce_end()  # whoever is to go on elsewhere waits for the save
        with worker.untimed():
            bad = first_not_finite(self.state)
            healthy = worker.on_all_ranks(not bad and not result.skipped)
            # other nodes come or go, and these workers' are there for the next: who goes on finds it in their memory
            held = reason == Stop.MEMBERSHIP and not last
            wait: bool | Literal["held"] = "held" if held else bool(reason) or last
            checkpointer.save(step, self.state, wait=wait, healthy=healthy)
            if last and not worker.on_all_ranks(checkpointer.wait()):
                raise NotSaved(f"step {step} is the last and could not be saved to {self.job.checkpoint.url}")
            if not healthy and not result.skipped:
                raise self._give_up(_tell_bad(step, bad), saved=True)

    def _may_stop(self, reason: str) -> bool:
        """Whether the state of this step is safe, the same on all ranks; else training goes on to the next boundary.

        The agent bounds how often that can happen: it asks for so long only.
        """
        step = self.progress.step
        if self.checkpointer is None:
            log.warning("asked to stop (%s) without a checkpoint.url: the next run begins at step 0", reason)
            return True
        with worker.untimed():
            if worker.on_all_ranks(self.checkpointer.wait(held=reason == Stop.MEMBERSHIP)):
                return True
        log.warning("step %d could not be saved: the stop (%s) waits for the next step boundary", step, reason)
        worker.event(TrainerEvent.STOP_POSTPONED, step=step, reason=reason)
        return False

    def _mind_skipped(self, result: StepResult) -> None:
        """Tell of a step that has changed nothing: an event from rank 0, and one from each rank in whose own sequences
        it began, because of its data or its hardware.

        Raises:
            NotFinite: it is one too many.
        """
        step, in_row, limit = self.progress.step, self.progress.skipped_in_row, self.job.train.max_skipped
        if not math.isfinite(result.own_loss):
            log.warning("step %d: the loss of this rank's sequences is %s", step, result.own_loss)
            worker.event(TrainerEvent.LOSS_NOT_FINITE, step=step, loss=str(result.own_loss))
        if self.here.rank == 0:
            log.warning("step %d is skipped (%d in a row; %d end the job): %s", step, in_row, limit, result.skipped)
            worker.event(TrainerEvent.STEP_SKIPPED, step=step, reason=result.skipped, in_row=in_row, limit=limit)
        if in_row >= limit:
            raise self._give_up(f"{in_row} steps in a row were skipped up to step {step}, since {result.skipped}")

    def _give_up(self, why: str, *, saved: bool = False) -> NotFinite:
        """The error that ends the job, and names the checkpoint to go back to. A collective.

        Where the state that has led to it came out of memory alone, the job ends the next time: it is started again,
        from the store's checkpoint. `saved`: this state was saved as what is not to be gone on from.
        """
        step, in_row, trusted_after = self.progress.step, self.progress.skipped_in_row, self.saves.trusted_after
        url, is_suspect = self.job.checkpoint.url, trusted_after is not None and step <= trusted_after
        if not is_suspect:
            worker.gave_up()
        if self.checkpointer is None or url is None:
            return NotFinite(f"{why}; there is no checkpoint, since checkpoint.url is not set")
        self.checkpointer.wait()
        newest, good = from_rank_0(lambda: go_back_to(_healthy_steps(url), step, in_row))
        if is_suspect and newest >= 0:
            if not saved:  # whoever holds states in memory drops all of them then
                self.checkpointer.save(step, self.state, wait="held", healthy=False)
            return NotFinite(
                f"{why}; the state that led to it was in the memory of nodes alone, where it is dropped:"
                f" the job goes back to the checkpoint of step {newest}"
            )
        if is_suspect:
            worker.gave_up()
        if newest < 0:
            return NotFinite(f"{why}; there is no healthy checkpoint in {url}")
        told = f"{why}; the newest healthy checkpoint in {url} is of step {newest}"
        if good != newest:
            told += f", the very state that fails: to go on from that of step {good}, remove it"
        return NotFinite(told)

    def _report(self, result: StepResult, step_s: float, val_loss: float | None) -> None:
        if self.teller is not None:
            self.teller.tell(self.progress.step, result, step_s, val_loss, self.saves)


def _tell_bad(step: int, bad: str) -> str:
    """Say that a state is not finite.

    Args:
        bad: this rank's first tensor with what is not finite, "" where it has none but another rank does.
    """
    if bad:
        log.warning("step %d: %s is not finite on this rank", step, bad)
        worker.event(TrainerEvent.STATE_NOT_FINITE, step=step, tensor=bad)
    return f"the state after step {step} is not finite" + (f" ({bad})" if bad else "")


def _healthy_steps(url: str) -> list[int]:
    try:
        with locate(url) as location:
            rows = summaries(location)
    except NoCheckpoint:
        return []
    except StorageError as error:
        log.warning("the checkpoints in %s cannot be listed: %s", url, error)
        return []
    good = (CheckpointState.COMMITTED, CheckpointState.STOCK)
    return [row.step for row in rows if row.step is not None and row.state in good]
