"""TensorBoard and Weights & Biases, for those who look at runs there. Neither is asked unless the job names it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from elastic_moe.errors import UserError
from elastic_moe.events import TrainerEvent
from launcher import worker

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes numbers by name, step for step. May fail, and is closed once."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes event files to a folder. What an earlier process wrote of the steps that are done again is hidden.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: str, completed: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(folder, purge_step=completed + 1)
        except OSError as error:
            raise UserError(f"train.tensorboard {folder!r} cannot be written: {error.strerror}") from error

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project, on this machine only unless `WANDB_MODE=online` says otherwise; `wandb sync` sends it.

    Its axis is our step: W&B's own cannot go back, as steps do that are done again.

    Raises:
        UserError: it will not begin.
    """

    def __init__(self, project: str, run_id: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would send its own errors to its makers
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                id=run_id or None,
                resume="allow" if run_id else None,
                config=dict(settings),
                mode=os.environ.get("WANDB_MODE", "offline"),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever it raises is for a person to read
            raise UserError(f"train.wandb {project!r}: {type(error).__name__}: {error}") from error

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


class Careful:
    """Passes numbers on until that fails: a training does not end because nobody can be told how it goes."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker: Tracker | None = tracker

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.log(step, numbers)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the training goes on
            why = f"{type(error).__name__}: {error}"
            log.warning("%s is told no more, from step %d on: %s", self._name, step, why)
            worker.event(TrainerEvent.TRACKER_FAILED, tracker=self._name, step=step, reason=why)
            self._tracker = None

    def close(self) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.close()
        except Exception as error:  # noqa: BLE001 - the same
            log.warning("%s could not be closed: %s: %s", self._name, type(error).__name__, error)


def check_installed(tensorboard: str | None, wandb: str | None) -> None:
    """Raises UserError where a tracker that the job names is not installed: the same on all ranks, before they meet."""
    if tensorboard is not None and find_spec("tensorboard") is None:
        raise UserError(
            "train.tensorboard needs tensorboard: pip install tensorboard, or install elastic-moe with its extra "
            "tensorboard"
        )
    if wandb is not None and find_spec("wandb") is None:
        raise UserError("train.wandb needs wandb: pip install wandb, or install elastic-moe with its extra wandb")


def open_trackers(
    tensorboard: str | None, wandb: str | None, *, completed: int, run_id: str, settings: Mapping[str, Any]
) -> list[Careful]:
    """Those that the job names.

    Args:
        completed: steps done before.
        run_id: of the job over all its restarts; "" without a launcher.
        settings: what W&B keeps beside the numbers.

    Raises:
        UserError: one of them will not begin.
    """
    found = []
    if tensorboard is not None:
        found.append(Careful("TensorBoard", TensorBoard(str(Path(tensorboard)), completed)))
    if wandb is not None:
        found.append(Careful("W&B", WeightsAndBiases(wandb, run_id, settings)))
    return found
