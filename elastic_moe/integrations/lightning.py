"""For Lightning, installed as `lightning` or as `pytorch_lightning`.

::

    elastic = ElasticCallback("s3://bucket/run", every=100)
    trainer = Trainer(num_nodes=int(os.environ["GROUP_WORLD_SIZE"]), devices=int(os.environ["LOCAL_WORLD_SIZE"]),
                      callbacks=[elastic], enable_checkpointing=False, ...)
    trainer.fit(model, loader)
    if elastic.stopped:
        sys.exit()                               # a node joins or leaves: saved, and to be run again
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic_moe import worker
from elastic_moe.integrations.session import Session
from storage import Every, PerRank, parse_every

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # the two packages have the same classes twice, and a Trainer takes its own only
    _PACKAGES = ("lightning.pytorch", "pytorch_lightning")
    _known = [name for name in _PACKAGES if name in sys.modules]
    try:
        Callback = importlib.import_module(_known[0] if _known else _PACKAGES[0]).Callback
    except ModuleNotFoundError:
        Callback = importlib.import_module(_PACKAGES[1]).Callback


class ElasticCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Heartbeats, stops and sharded checkpoints for a Lightning `Trainer`.

    A checkpoint holds the module, optimizers, schedulers, the precision plugin, the loops' progress, the other
    callbacks' states and each rank's random state, and goes to any other number of ranks. `fit` begins from the newest
    healthy one by itself; give it no `ckpt_path`.

    Args:
        url: where the checkpoints go.
        every: optimizer steps between two of them, a time such as "5min", or "auto", see `storage.Checkpointer`; there
            is one at the end and before a stop in any case.
        keep: how many healthy ones stay.
        options: further ones of `storage.Checkpointer`.
    """

    def __init__(self, url: str, *, every: Every = 100, keep: int = 3, **options: Any) -> None:
        parse_every(every)  # a mistake is told before anything is set up
        self._session = Session(url, keep=keep, every=every, **options)
        self._told_step = 0
        self._is_healthy = True

    @property
    def stopped(self) -> str | None:
        """Why it stopped to be run again ("membership" or "drain"); None while it trains and when it is done."""
        return self._session.stopped

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore: the strategy has set up model and optimizers, and no loop has begun."""
        state = self._state(trainer)
        step = self._session.restore(state)
        if not step:
            return
        torch.set_rng_state(state["rng"].value)
        trainer.fit_loop.load_state_dict(state["loops"])
        for callback in self._others(trainer):
            if told := state["callbacks"].value.get(callback.state_key):
                callback.load_state_dict(told)
        self._told_step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of the step, save, and stop where that is asked for. Between two micro-batches of a step: nothing."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._is_healthy = self._is_healthy and math.isfinite(float(loss.detach()))
        step = trainer.global_step
        if step == self._told_step or self.stopped:
            return
        self._told_step = step
        if self._session.end_step(step, lambda: self._state(trainer), healthy=self._is_healthy):
            trainer.should_stop = True
        self._is_healthy = True

    def on_validation_batch_end(self, *_: Any) -> None:
        """Send a heartbeat: an evaluation makes progress too."""
        worker.heartbeat(self._told_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, whichever it is."""
        if not self.stopped and trainer.global_step:
            state = self._state(trainer)
            self._session.checkpointer.announce_end()
            with worker.untimed():
                self._session.checkpointer.save(trainer.global_step, state, wait=True, healthy=self._is_healthy)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the checkpoints, so that another job may take the run."""
        self._session.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the checkpoints without waiting for other ranks, which may have failed as well."""
        self._session.close(failed=True)

    def _others(self, trainer: Any) -> list[Any]:
        return [callback for callback in trainer.callbacks if callback is not self]

    def _state(self, trainer: Any) -> dict[str, Any]:
        model = trainer.strategy.model
        plugin = trainer.precision_plugin
        return {
            "model": model if isinstance(model, nn.Module) else trainer.lightning_module,
            "optimizer": {str(number): optimizer for number, optimizer in enumerate(trainer.optimizers)},
            "scheduler": {str(number): c.scheduler for number, c in enumerate(trainer.lr_scheduler_configs)},
            "precision": plugin if plugin.state_dict() else {},
            "loops": trainer.fit_loop.state_dict(),
            "callbacks": PerRank({cb.state_key: told for cb in self._others(trainer) if (told := cb.state_dict())}),
            "rng": PerRank(torch.get_rng_state()),
        }
