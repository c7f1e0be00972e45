"""Two owners of one run: the older one is paused between any two calls to the store, and the newer one acts there."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from storage import Checkpointer, JobIdentity, inspection, register_scheme
from storage.errors import Fenced
from storage.saving import commit
from storage.stores.memory import MemoryStore
from tests.storage.pausing import ORDERS, PausingStore, abreast

STEP = 10


def state(number: int) -> dict[str, Any]:
    return {"w": torch.full((4,), float(number)), "n": number}


def restored(url: str, generation: int) -> tuple[int, int]:
    """The step and the content of what is restored."""
    found = state(0)
    with Checkpointer(url, job=JobIdentity(generation=generation, lineage="a")) as ckpt:
        step = ckpt.restore(found)
    assert (found["w"] == found["n"]).all()
    return step, found["n"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("newer_step", [STEP, STEP - 5])
def test_a_paused_owner_never_tears_what_a_newer_one_commits(
    memory_url: str, newer_step: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "run_concurrently", abreast(order))
    seen = set()
    for pause_at in itertools.count():
        url = f"{memory_url}-{newer_step}-{pause_at}"
        committed: list[bool] = []

        def newer(url: str = url, committed: list[bool] = committed) -> None:
            with Checkpointer(url, job=JobIdentity(generation=2, lineage="a")) as ckpt:
                if ckpt.restore(state(0)) < newer_step:  # else the older one was faster, and its state goes on
                    ckpt.save(newer_step, state(2), wait=True)
                    committed.append(ckpt.wait())

        store = PausingStore(MemoryStore.named(url.removeprefix("memory://")), pause_at, newer)
        register_scheme("pausing", lambda rest, store=store: store)
        with contextlib.suppress(Fenced), Checkpointer("pausing://", job=JobIdentity(generation=1, lineage="a")) as old:
            old.save(STEP, state(1), wait=True)
        print(f"paused before call {pause_at}: {store.paused_before}")
        if not store.paused_before:
            break
        seen.add(store.paused_before.replace(" ", "/").rpartition("/")[2])
        assert committed in ([], [True])
        location = inspection.locate(url)
        problems = [inspection.verify(location.store, prefix).problems for prefix in inspection.checkpoints(location)]
        assert not any(problems)
        # of another step the older one may have one more commit, if its claim came in last
        whole = {(newer_step, 2)} if newer_step == STEP else {(newer_step, 2), (STEP, 1)}
        assert restored(url, 3) in (whole if committed else {(STEP, 1)})
    assert {"owner.json", "manifest.json", ".metadata", "receipt-000000.json"} <= seen
