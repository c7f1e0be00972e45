"""What the loop over steps leaves where it is cut off, and what it takes up again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.trainer import loop
from elastic_moe.trainer.state import DataProgress
from launcher import worker
from storage import Checkpointer
from tests.moe.test_not_finite import DATA, Script


def test_a_step_that_is_applied_beside_a_loop_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peer is lost, so nobody else comes to tell of it: neither its loss nor that it was done would be known."""
    script = Script(monkeypatch, set())
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(worker, "heartbeat", lambda step, **_: told.append(("beat", step)))
    monkeypatch.setattr(loop.Loop, "_report", lambda self, *_: told.append(("line", self.progress.step)))
    monkeypatch.setattr(loop.Loop, "_validates", lambda self, step: step == 3)

    def hang(step: int, state: Any, apply: Callable[[], object]) -> None:
        if step < 3:
            apply()
            return
        beside = threading.Thread(target=apply)
        beside.start()
        beside.join()
        raise ConnectionError("the peer is lost")

    monkeypatch.setattr(script, "finish_step", hang)
    with pytest.raises(ConnectionError):
        script.run(9)
    assert told == [("beat", 1), ("line", 1), ("beat", 2), ("line", 2), ("beat", 3), ("line", 3)]
    assert script.progress.step == 3


def test_a_checkpoint_from_before_steps_were_skipped_is_gone_on_from(tmp_path: Path) -> None:
    class Before(DataProgress):
        def state_dict(self) -> dict[str, Any]:
            return {name: value for name, value in super().state_dict().items() if not name.startswith("skipped")}

    before, now = Before(DATA, horizon=20), DataProgress(DATA, horizon=20)
    before.step, now.skipped = 8, 3
    with Checkpointer(str(tmp_path)) as checkpointer:
        checkpointer.save(8, {"data": before, "model": {"w": torch.ones(2)}}, wait=True)
        assert checkpointer.restore({"data": now, "model": {"w": torch.zeros(2)}}) == 8
    assert (now.step, now.skipped, now.skipped_in_row, now.updates) == (8, 0, 0, 8)
    assert now.loaded == DATA
