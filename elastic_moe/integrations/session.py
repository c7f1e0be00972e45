"""What the frameworks' pieces share: a run's checkpoints, and what happens at the boundary after a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal

from elastic_moe import worker
from elastic_moe.events import TrainerEvent
from launcher import Stop

if TYPE_CHECKING:
    from storage import Checkpointer

log = logging.getLogger(__name__)

State = MutableMapping[str, Any]


class Session:
    """One run of a training script, from its restore to its end or to a stop.

    `stopped`: why it stopped to be run again ("membership" or "drain"), None while it trains and when it is done.

    Args:
        url: where the checkpoints go; see `storage.Checkpointer`, which gets the other arguments.
    """

    def __init__(self, url: str, *, keep: int = 3, **options: Any) -> None:
        worker.context()  # early: the agent learns that this script reports its progress
        self.stopped: str | None = None
        self._url = url
        self._options: dict[str, Any] = {"keep": keep, **options}
        self._checkpointer: Checkpointer | None = None

    @property
    def checkpointer(self) -> Checkpointer:
        """Opened at its first use, which is a collective: torch.distributed must be initialised before."""
        if self._checkpointer is None:
            from storage import Checkpointer

            self._checkpointer = Checkpointer(self._url, **self._options).start()
        return self._checkpointer

    def restore(self, state: State, **options: Any) -> int:
        """Fill `state` from the newest healthy checkpoint; its step, or 0. A collective."""
        with worker.untimed():
            return self.checkpointer.restore(state, **options)

    def end_step(
        self,
        step: int,
        state: Callable[[], Mapping[str, Any]],
        *,
        save: bool = False,
        last: bool = False,
        healthy: bool = True,
    ) -> bool:
        """To be called after each step, on all ranks; whether to stop.

        Tells the agent of the step, saves `state()` if `save` says so, if `every` does where the Session has got it, if
        it is the `last` step, or if the agent asks for a stop, and then stops once that save is safe.
        """
        reason = self.boundary(step)
        if reason or save or last or self.is_due(step):
            return self.save(step, state(), reason, last=last, healthy=healthy, now=save)
        if self._options.get("every") is not None and self.checkpointer.wants(step):
            self.checkpointer.save(step, state(), healthy=healthy)  # which saves nothing, but looks at it
        return False

    def is_due(self, step: int) -> bool:
        """Whether `every`, an option of the Checkpointer, says that `step` is to be saved. May be a collective."""
        return self._options.get("every") is not None and self.checkpointer.due(step)

    def boundary(self, step: int) -> str | None:
        """Tell the agent that `step` steps are complete; why it asks for a stop, if it does. A collective."""
        worker.heartbeat(step)
        return worker.should_stop()

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        reason: str | None,
        *,
        last: bool = False,
        healthy: bool = True,
        now: bool = True,
    ) -> bool:
        """Save at a step boundary; whether to stop there, for `reason`. A collective.

        Args:
            now: save whatever `every` says.
        """
        if reason == Stop.DRAIN or last:
            self.checkpointer.announce_end()  # whoever is to go on elsewhere waits for the save
        with worker.untimed():
            held = reason == Stop.MEMBERSHIP and not last  # who goes on on these nodes finds it in their memory
            wait: bool | Literal["held"] = "held" if held else bool(reason) or last
            self.checkpointer.save(step, state, wait=wait, now=now, healthy=healthy)
            if not reason or last:
                return False
            if not worker.on_all_ranks(self.checkpointer.wait(held=held)):
                log.warning("step %d could not be saved: the stop (%s) waits for the next step", step, reason)
                worker.event(TrainerEvent.STOP_POSTPONED, step=step, reason=reason)
                return False
            if reason == Stop.DRAIN:
                self.close()  # the job's next launch need not ask whether this one lives
        worker.yielded(step)
        self.stopped = reason
        return True

    def close(self, *, failed: bool = False) -> None:
        """Wait for the last save, except where an error ends the script. Closing twice is harmless."""
        if self._checkpointer is not None and not failed:
            self._checkpointer.close()
