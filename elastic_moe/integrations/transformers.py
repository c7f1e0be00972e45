"""For `transformers.Trainer` and what is made of it.

::

    elastic = ElasticTrainerCallback("s3://bucket/run")
    trainer = Trainer(model, args, train_dataset=..., callbacks=[elastic])
    elastic.train(trainer)                       # in place of trainer.train()
    if elastic.stopped:
        sys.exit()                               # a node joins or leaves: saved, and to be run again
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from elastic_moe import worker
from elastic_moe.integrations.session import Session
from storage import AgreeingGroup, PerRank

_OTHERS = ("model", "optimizer", "scheduler", "scaler", "rng")
"""What a checkpoint holds beside the Trainer's own state."""


class ElasticTrainerCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Heartbeats, stops and sharded checkpoints for a `Trainer`.

    It saves when the Trainer would (`save_strategy`, `save_steps`; also at the end, and before a stop), in its place,
    and when `every` says so, if it is given: a checkpoint holds model, optimizer, scheduler, the Trainer's own state
    and each rank's random state, and goes to any other number of ranks. What is saved after a loss or a gradient norm
    that was logged as not finite counts as unhealthy.

    Args:
        url: where the checkpoints go.
        keep: how many healthy ones stay; by default `save_total_limit`, or 3.
        options: further ones of `storage.Checkpointer`.
    """

    def __init__(self, url: str, *, keep: int | None = None, **options: Any) -> None:
        self._url, self._keep, self._options = url, keep, options
        self._session: Session | None = None
        self._reason: str | None = None
        self._is_healthy = True

    @property
    def stopped(self) -> str | None:
        """Why it stopped to be run again ("membership" or "drain"); None while it trains and when it is done."""
        return self._session.stopped if self._session is not None else None

    def train(self, trainer: Trainer, **arguments: Any) -> Any:
        """`trainer.train(**arguments)`, from the newest healthy checkpoint on if there is one. A collective."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if trainer.args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end needs the Trainer's own checkpoints: set it to False")
        keep = self._keep or trainer.args.save_total_limit or 3
        self._session = Session(self._url, keep=keep, **self._options)
        told: dict[str, Any] = {"trainer": ""}
        # the Trainer wants to know where it is before it has made its optimizer, so this is read first and alone
        step = self._session.restore(told, ignore=_OTHERS)
        try:
            self._replace_saving(trainer)
            if not step:
                return trainer.train(**arguments)
            with tempfile.TemporaryDirectory(prefix="elastic-moe-") as folder:
                Path(folder, TRAINER_STATE_NAME).write_text(told["trainer"])
                self._replace_loading(trainer, step)
                return trainer.train(resume_from_checkpoint=folder, **arguments)
        except BaseException:
            self._session.close(failed=True)
            raise
        finally:
            self._session.close()

    def _replace_saving(self, trainer: Any) -> None:
        trainer._save_checkpoint = lambda *_, **__: self._save(trainer)

    def _replace_loading(self, trainer: Any, step: int) -> None:
        """Let the Trainer load from the checkpointer where it would load from files."""

        random_state = torch.get_rng_state()

        def load(*_: Any, **__: Any) -> None:
            nonlocal random_state
            state = self._state(trainer)
            assert self._session is not None
            if (found := self._session.restore(state)) != step:
                raise RuntimeError(f"the checkpoint of step {step} is damaged: start again, from that of step {found}")
            random_state = state["rng"].value

        trainer._load_from_checkpoint = lambda *_, **__: None
        trainer._load_optimizer_and_scheduler = load
        trainer._load_rng_state = lambda *_: torch.set_rng_state(random_state)  # once the loader is where it was

    def _state(self, trainer: Any) -> dict[str, Any]:
        optimizer = trainer.optimizer
        state = {
            "model": trainer.model,
            "optimizer": getattr(optimizer, "optimizer", optimizer),
            "scheduler": trainer.lr_scheduler,
            "scaler": getattr(trainer.accelerator, "scaler", None),
            # ranks tell it apart in whether they are the first, and in what they have logged
            "trainer": AgreeingGroup(None).on_coordinator(lambda: _told(trainer)),
            "rng": PerRank(torch.get_rng_state()),
        }
        return {name: value for name, value in state.items() if value is not None}

    # --- what the Trainer calls

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Remember whether the last numbers were finite."""
        numbers = [value for name in ("loss", "grad_norm") if isinstance(value := (logs or {}).get(name), float)]
        if numbers:
            self._is_healthy = all(map(math.isfinite, numbers))

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """An evaluation makes progress too."""
        worker.heartbeat(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Tell of the step, and have the Trainer save and stop where that is asked for."""
        if self._session is not None:
            self._reason = self._session.boundary(state.global_step)
            if self._reason is not None or state.global_step >= state.max_steps:
                control.should_save = control.should_training_stop = True
            elif self._session.is_due(state.global_step):
                control.should_save = True
        return control

    def _save(self, trainer: Any) -> None:
        """In place of `Trainer._save_checkpoint`, which comes after what is logged and evaluated at the same step."""
        assert self._session is not None
        if self._session.stopped:
            return
        step, last = trainer.state.global_step, trainer.state.global_step >= trainer.state.max_steps
        now = not self._session.is_due(step)
        stops = self._session.save(
            step, self._state(trainer), self._reason, last=last, healthy=self._is_healthy, now=now
        )
        if self._reason is not None and not last:
            trainer.control.should_training_stop = stops  # not if it could not be saved


def _told(trainer: Any) -> str:
    """What the Trainer writes to `trainer_state.json`."""
    state = copy.copy(trainer.state)
    state.stateful_callbacks = dict(state.stateful_callbacks)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            known = state.stateful_callbacks.get(name)
            state.stateful_callbacks[name] = [callback.state()] if isinstance(known, list) else callback.state()
    return json.dumps(asdict(state), sort_keys=True)


def __getattr__(name: str) -> Any:
    """The name that this class had when Lightning's was called so too; it works for one release."""
    if name != "ElasticCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("ElasticCallback is called ElasticTrainerCallback here", DeprecationWarning, stacklevel=2)
    return ElasticTrainerCallback
