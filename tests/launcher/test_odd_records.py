"""What others have written, read: a record of another shape is a ValueError, and never the end of an agent."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.drain.draining import DrainOrder
from launcher.health.postmortem import _error_file
from launcher.reports import files
from launcher.rounds.failures import FailureClass
from launcher.rounds.history import Exclusion, History, Mark, MarkKind
from launcher.rounds.mesh import MeshPlan
from launcher.rounds.records import Breakage, FailedWorker, Failure, Node, Participant, Round
from launcher.workers.channel import Channel, StopReason, WorkerPhase

FAILURE = Failure(1, -9, "killed", 12.5, kind=FailureClass.PROGRAM, victims=(Failure(2, 1, "then", 13.0),))
NODE = Node("n-1", "host", "10.0.0.1", 4000, 8, failure=FAILURE, cannot_reach=("n-2",))
ROUND = Round(
    3,
    "lineage",
    (Participant("n-1", 8, "10.0.0.1", 4000), Participant("n-2", 8)),
    MeshPlan(replicate=2, shard=4, expert=2, idle=0, micro_batch=1, rounds=1),
    ("n-3",),
    "first",
    broken=Breakage("gone", False, ("n-2",)),
    causes=(FailedWorker("n-1", "host", FAILURE),),
    history=History(3, True, marks=(Mark("n-1", MarkKind.STRIKE, "why"),), exclusions=(Exclusion("n-2", "why", 60.0),)),
)
ORDER = DrainOrder(("n-1",), "me", 30.0)
ODD: list[Any] = [
    None,
    True,
    -1,
    1 << 70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [[]],
    {"a": 1},
    [None],
    "\ud800",
]
READERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "node": (NODE.to_json(), lambda data: Node.from_json(data, 1)),
    "round": (ROUND.to_json(), Round.from_json),
    "order": (ORDER.to_json(), DrainOrder.from_json),
    "mesh": (ROUND.mesh.to_json().encode() if ROUND.mesh else b"", lambda data: MeshPlan.from_json(data.decode())),
}


def mutated(value: Any, rng: random.Random) -> Any:
    """The same JSON with something else somewhere."""
    if rng.random() < 0.15 or not isinstance(value, list | dict) or not value:
        return rng.choice(ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {name: one for name, one in value.items() if name != key} | ({"more": 1} if rng.random() < 0.5 else {})
    return {**value, key: mutated(value[key], rng)}


@pytest.mark.parametrize("kind", READERS)
def test_a_record_of_another_shape_is_a_value_error(kind: str) -> None:
    data, read = READERS[kind]
    read(data)
    rng, num_refused = random.Random(7), 0
    for _ in range(1500):
        odd = json.dumps(mutated(json.loads(data), rng)).encode()
        try:
            read(odd)
        except ValueError:
            num_refused += 1
    assert num_refused > 700
    for junk in (b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"null", b"[]", b"", b"\xff\xfe"):
        with pytest.raises(ValueError):
            read(junk)


def test_plain_fields_are_of_their_types() -> None:
    for name, value in (("slots", "8"), ("port", 1.5), ("draining", 1), ("host", None), ("generation", True)):
        fields = {**json.loads(NODE.to_json()), name: value}
        with pytest.raises(ValueError, match=f"Node.{name}"):
            Node.from_json(json.dumps(fields).encode(), 1)
    rows = {**json.loads(ROUND.to_json()), "participants": [["n-1", "8"]]}
    with pytest.raises(ValueError, match=r"Participant.slots"):
        Round.from_json(json.dumps(rows).encode())
    assert Node.from_json(NODE.to_json(), 0) == NODE
    assert Round.from_json(ROUND.to_json()) == ROUND
    assert dataclasses.replace(NODE, failure=None) == Node.from_json(
        dataclasses.replace(NODE, failure=None).to_json(), 0
    )


def test_a_workers_channel_may_hold_anything(tmp_path: Path) -> None:
    channel = Channel.create(tmp_path / "channel")
    try:
        for seed in range(200):
            channel._memory[4:64] = random.Random(seed).randbytes(60)
            assert channel.progress().phase in WorkerPhase
            assert channel.stop_request() in StopReason
            channel.forked_pid()
        struct.pack_into("<I", channel._memory, 8, WorkerPhase.YIELDED)
        assert channel.progress().phase is WorkerPhase.YIELDED
    finally:
        channel.close()


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"message":' * 50_000, b'{"message": 1}', b"{}", b"\xff", b"[1]"])
def test_an_error_file_may_hold_anything(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "error.json").write_bytes(data)
    _error_file(str(tmp_path / "error.json"))


def test_events_may_be_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = b'{"ts": 1.0, "event": "finished"}'
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"\n".join([b"[" * 100_000, b'{"ts": 1' + b"0" * 400 + b', "event": "x"}', b'{"ts": NaN}', good]))
    events, num_unreadable = files.read_events([path])
    assert (events, num_unreadable) == ([json.loads(good)], 3)
    monkeypatch.setattr(files, "_CONTENT_BYTES_MAX", 1 << 20)
    path.write_bytes(gzip.compress(bytes(100 << 20)))
    with pytest.raises(OSError, match="more than 1 MiB"):
        files.read_events([path])
