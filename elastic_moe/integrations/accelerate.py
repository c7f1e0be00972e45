"""For scripts that `accelerate` prepares.

::

    accelerator = Accelerator()
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    with Elastic(accelerator, "s3://bucket/run", keep=3) as elastic:
        step = elastic.restore()
        while step < steps:
            ...                                  # as before
            step += 1
            if elastic.end_step(step, save=step % 100 == 0, last=step == steps):
                break                            # a node joins or leaves: saved, and to be run again
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator

from elastic_moe.integrations.session import Session
from storage import PerRank


class Elastic:
    """Heartbeats, stops and sharded checkpoints for what an `Accelerator` has prepared.

    A checkpoint holds the models, optimizers and schedulers that went through `accelerator.prepare`, what was given to
    `accelerator.register_for_checkpointing`, the gradient scaler, each rank's random state, and `extra`. It goes to any
    other number of ranks. `accelerator.save_state` is not called.

    Args:
        accelerator: everything is prepared and registered before `restore`.
        url: where the checkpoints go.
        keep: how many healthy ones stay.
        extra: more to save: objects with a `state_dict`, tensors, plain values; restored in place.
        options: further ones of `storage.Checkpointer`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        url: str,
        *,
        keep: int = 3,
        extra: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._accelerator = accelerator
        self._session = Session(url, keep=keep, **options)
        self._extra = dict(extra or {})

    @property
    def stopped(self) -> str | None:
        """Why it stopped to be run again ("membership" or "drain"); None while it trains and when it is done."""
        return self._session.stopped

    def restore(self) -> int:
        """The step of the newest healthy checkpoint, whose state everything then has; 0 if there is none.

        A collective.
        """
        state = self._state()
        step = self._session.restore(state)
        if step:
            torch.set_rng_state(state["rng"].value)
            self._extra.update(state.get("extra", {}))
        return step

    def end_step(self, step: int, *, save: bool = False, last: bool = False, healthy: bool = True) -> bool:
        """To be called after each optimizer step, on all ranks: `step` are complete. True says to stop here.

        Saves if `save` says so, or the option `every` where it is given, at the `last` step, and before a stop.
        `healthy=False` marks a state not to go on from,
        as after a loss that is not finite.
        """
        return self._session.end_step(step, self._state, save=save, last=last, healthy=healthy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close(failed=error is not None)

    def _state(self) -> dict[str, Any]:
        prepared = self._accelerator
        state: dict[str, Any] = {
            "model": _by_number(prepared._models),
            "optimizer": _by_number([optimizer.optimizer for optimizer in prepared._optimizers]),
            "scheduler": _by_number([scheduler.scheduler for scheduler in prepared._schedulers]),
            "registered": _by_number(prepared._custom_objects),
            "scaler": _by_number([prepared.scaler] if prepared.scaler is not None else []),
            "rng": PerRank(torch.get_rng_state()),
            "extra": self._extra,
        }
        return {name: value for name, value in state.items() if value != {}}


def _by_number(objects: list[Any]) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(objects)}
