"""A state out of the memory of nodes that leads to what is not finite: the trainer goes back once, then gives up."""

from __future__ import annotations

import pytest

from elastic_moe.errors import NotFinite
from storage import CheckpointEvent
from tests.moe.test_not_finite import Saved, Script


@pytest.mark.parametrize(
    ("last_bad", "trusted_after", "has_stored", "gives_up"),
    [(11, 11, True, False), (12, 11, True, True), (11, None, True, True), (11, 30, False, True)],
    ids=["suspect", "later", "from the store", "nothing else"],
)
@pytest.mark.parametrize("poisoned", [False, True])
def test_what_a_state_out_of_memory_leads_to_is_no_reason_to_give_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
    last_bad: int,
    trusted_after: int | None,
    has_stored: bool,
    gives_up: bool,
    poisoned: bool,
) -> None:
    script = Script(monkeypatch, set() if poisoned else set(range(last_bad - 2, 21)))
    script.progress.step = 8
    script.poisoned_at = 9 if poisoned else 0
    script.saved = [Saved(4, has_stored)]
    told = {} if trusted_after is None else {"trusted_after": trusted_after}
    script.saves.hear(CheckpointEvent.RESTORED, {"step": 8, **told})
    monkeypatch.setattr(script, "due", lambda step: step == last_bad)
    with pytest.raises(NotFinite) as caught:
        script.run(20)
    assert script.gave_up == gives_up
    assert ("the job goes back to the checkpoint of step 4" in str(caught.value)) != gives_up
    if not gives_up or poisoned:
        assert script.saved[1:] == [(last_bad, False)], "which has the memory of nodes dropped"
