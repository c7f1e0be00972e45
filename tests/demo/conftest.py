"""A demo's records as a made-up but consistent machine would leave them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

Record = dict[str, Any]

STEPS = 60


def mesh(replicate: int, shard: int, expert: int, micro_batch: int, rounds: int = 1) -> dict[str, int]:
    return {
        "replicate": replicate,
        "shard": shard,
        "expert": expert,
        "idle": 0,
        "micro_batch": micro_batch,
        "rounds": rounds,
    }


FOUR, TWO = mesh(1, 2, 2, 4), mesh(1, 1, 2, 8)


@dataclasses.dataclass
class Play:
    """The records of one demo; tests change what they are about."""

    events: list[Record]
    metrics: list[Record]
    unbroken: list[Record]


def loss(step: int) -> float:
    return 2 + 3.5 * math.exp(-step / 20)


@pytest.fixture
def play() -> Play:
    """Killed in step 22 with a checkpoint of step 20, taken back after step 40; begins at 1000 s, 0.5 s a step."""
    metrics: list[Record] = []

    def train(first: int, last: int, generation: int, start_s: float, world_size: int) -> None:
        for nth, step in enumerate(range(first, last + 1), start=1):
            metrics.append(
                {
                    "step": step,
                    "loss": loss(step),
                    "ts": 1000 + start_s + nth * 0.5,
                    "generation": generation,
                    "world_size": world_size,
                    "step_s": 0.5,
                }
            )

    train(1, 21, 1, 10.0, 4)  # the last one is complete at 20.5 s
    train(21, 40, 2, 23.0, 2)  # the first one at 23.5 s, the last one at 33.0 s
    train(41, STEPS, 3, 34.0, 4)  # the first one at 34.5 s

    def event(at_s: float, name: str, node: str, generation: int, **fields: Any) -> Record:
        return {
            "ts": 1000 + at_s,
            "run_id": "demo",
            "node": node,
            "generation": generation,
            "event": name,
            **fields,
        }

    def formed(at_s: float, generation: int, reason: str, plan: dict[str, int], *nodes: str) -> Record:
        participants = [{"node_id": node, "slots": 2} for node in nodes]
        fields = {"reason": reason, "participants": participants, "spares": [], "mesh": plan, "restarts": 0}
        return event(at_s, "round_formed", "node-1-aaaaaaaa", generation, world_size=2 * len(nodes), **fields)

    lost = "lost: its agent at 127.0.0.1:5 is gone (connection refused)"
    events = [
        event(0.0, "demo_node_started", "node-1", 0),
        event(1.0, "node_joined", "node-1-aaaaaaaa", 0, slots=2),
        event(1.1, "demo_node_started", "node-2", 0),
        event(3.0, "node_joined", "node-2-bbbbbbbb", 0, slots=2),
        formed(3.1, 1, "first round", FOUR, "node-1-aaaaaaaa", "node-2-bbbbbbbb"),
        event(3.2, "workers_started", "node-2-bbbbbbbb", 1, pids=[11, 12], ranks=[2, 3]),
        event(20.7, "demo_node_killed", "node-2", 1, step=21, num_workers=2, fault="killed"),
        event(21.0, "worker_failed", "node-1-aaaaaaaa", 1, rank=1, exit_code=1),
        event(21.1, "node_lost", "node-1-aaaaaaaa", 1, node_lost="node-2-bbbbbbbb", reason=lost),
        formed(21.2, 2, f"node node-2-bbbbbbbb {lost}", TWO, "node-1-aaaaaaaa"),
        event(22.9, "restored", "node-1-aaaaaaaa", 2, rank=0, step=20),
        event(22.9, "restored", "node-1-aaaaaaaa", 2, rank=1, step=20),
        event(25.0, "demo_node_started", "node-2", 2),
        event(28.0, "node_joined", "node-2-cccccccc", 0, slots=2),
        event(32.6, "stop_requested", "node-1-aaaaaaaa", 2, reason="join: node-2-cccccccc"),
        formed(33.1, 3, "join: node-2-cccccccc", FOUR, "node-1-aaaaaaaa", "node-2-cccccccc"),
        event(44.5, "finished", "node-1-aaaaaaaa", 3, outcome="succeeded"),
    ]
    unbroken = [{"step": step, "loss": loss(step) * (1 + 1e-7), "ts": 0.0} for step in range(1, STEPS + 1)]
    return Play(events, metrics, unbroken)


@pytest.fixture
def in_order() -> Callable[[Play], list[Record]]:
    """Events and metrics as they happened."""
    return lambda play: sorted(play.events + play.metrics, key=lambda record: record["ts"])
