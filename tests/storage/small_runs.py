"""Small runs, and stores of the tests' own to keep them in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from storage import Checkpointer, ObjectStore, inspection, register_scheme
from storage.stores.memory import MemoryStore

Events = tuple[list[tuple[str, dict[str, Any]]], Callable[[str, dict[str, Any]], None]]
"""What was told, and who hears it: the fixture `events`."""

_names = itertools.count()


def state(number: int) -> dict[str, Any]:
    """A tensor and a value."""
    return {"w": torch.full((300,), float(number)), "n": number}


def save(url: str, *steps: int) -> None:
    """Commit those steps."""
    with Checkpointer(url) as ckpt:
        for step in steps:
            ckpt.save(step, state(step), wait=True)
            assert ckpt.wait()


def states(url: str) -> list[tuple[int | None, str]]:
    """The steps of a run, newest first, and what has become of each."""
    return [(row.step, row.state) for row in inspection.summaries(inspection.locate(url))]


def fresh_memory_url() -> str:
    """The URL of an in-memory store that nobody has used."""
    return f"memory://test-{next(_names)}"


def opened(store: MemoryStore) -> str:
    """The URL of that very store."""
    scheme = f"test-{next(_names)}"
    register_scheme(scheme, lambda rest: store)
    return f"{scheme}://run"


def damage_data(store: ObjectStore, step: int) -> None:
    """Flip a bit in the middle of a data object of a step."""
    (key, *_) = [info.key for info in store.list(f"step-{step:09d}/") if info.key.endswith(".distcp")]
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, [bytes(data)])
