"""What a stop waits for: where nodes come, for the memory of those that are there; where one goes, for the store."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_moe.integrations.session import Session
from elastic_moe.trainer.loop import Loop
from launcher import Stop


class Recorder:
    """Stands for a Checkpointer: how each save and each wait was asked for."""

    def __init__(self) -> None:
        self.saved: list[Any] = []
        self.waited: list[bool] = []

    def save(self, step: int, state: Any, *, wait: Any, **options: Any) -> None:
        self.saved.append(wait)

    def wait(self, *, held: bool = False) -> bool:
        self.waited.append(held)
        return True

    def announce_end(self) -> None:
        pass

    close = announce_end


STOPS = [(Stop.MEMBERSHIP, "held", True), (Stop.DRAIN, True, False)]


@pytest.mark.parametrize(("reason", "saved", "held"), STOPS)
def test_of_a_frameworks_script(reason: Stop, saved: Any, held: bool) -> None:
    session, checkpointer = Session("memory://x"), Recorder()
    session._checkpointer = checkpointer  # type: ignore[assignment]
    assert session.save(3, {}, reason)
    assert (checkpointer.saved, checkpointer.waited) == ([saved], [held])


@pytest.mark.parametrize(("reason", "saved", "held"), STOPS)
def test_of_the_trainer(reason: Stop, saved: Any, held: bool) -> None:
    checkpointer = Recorder()
    none: Any = None
    loop = Loop(none, none, none, SimpleNamespace(step=3), {}, checkpointer, none, none, none)  # type: ignore[arg-type]
    loop._save(checkpointer, SimpleNamespace(skipped=None), reason, last=False)  # type: ignore[arg-type]
    assert loop._may_stop(reason)
    assert (checkpointer.saved, checkpointer.waited) == ([saved], [held])


def test_the_last_step_is_in_the_store_whoever_comes() -> None:
    session, checkpointer = Session("memory://x"), Recorder()
    session._checkpointer = checkpointer  # type: ignore[assignment]
    assert not session.save(3, {}, Stop.MEMBERSHIP, last=True)
    assert checkpointer.saved == [True]
