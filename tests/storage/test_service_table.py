"""What a rank hands to the service is stored as the rank would have stored it, byte for byte."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from storage.arena.slot import Slot
from storage.errors import Corrupt
from storage.format.containers import Container
from storage.format.framing import DESCRIPTOR, FramedItem
from storage.format.manifest import TensorEntry, ValueEntry
from storage.format.tensors import tensor_over
from storage.format.values import encode_value
from storage.run.attempt import StateContents
from storage.saving.saveplan import Chunk
from storage.saving.writing import Payload, write_payloads
from storage.service import table
from storage.stores.memory import MemoryStore

ATTEMPT = "a" * 8
CONTENTS = StateContents(
    {"w": TensorEntry(dtype="float32", shape=(3, 1000), path=("w",))},
    {"n": ValueEntry(path=("n",))},
    (Container(path=(), kind="dict", keys=("w", "n"), names=("w", "n")),),
)


def chunk(key: str, tensor: torch.Tensor | None = None) -> Chunk:
    if tensor is None:
        return Chunk(key, (key,), None, None, None, "", 0)
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Chunk(key, (key,), (0,) * len(shape), shape, shape, dtype, tensor.nbytes)


def payloads(slot: Slot | None) -> list[Payload]:
    """Tensors of some kinds, several of one, and values."""
    found, at = [], 0
    kinds = [*[(torch.float32, (3, 1000))] * 5, *[(torch.int16, (2,))] * 4, (torch.bfloat16, ()), (torch.int64, (7,))]
    for number, (dtype, shape) in enumerate([*kinds, (torch.uint8, (2 << 20,))]):
        tensor = torch.arange(torch.Size(shape).numel()).add(number).to(dtype).reshape(shape)
        if slot is not None:
            copy = tensor_over(slot.memory[at:], dtype, shape)
            copy.copy_(tensor)
            tensor, at = copy, at + -(-tensor.nbytes // 64) * 64
        found.append(Payload(chunk(f"t{number}", tensor), tensor))
    return [*found, Payload(chunk("n"), encode_value("n", {"a": [1, "b"]}))]


def stored(found: list[Payload]) -> tuple[dict[str, bytes], object]:
    store = MemoryStore("x")
    objects, items = write_payloads(store, "", ATTEMPT, 3, found)
    return {entry.name: store.read(entry.name) for entry in objects}, items


@pytest.mark.parametrize("has_slot", [True, False])
def test_a_table_stores_what_the_payloads_would(has_slot: bool) -> None:
    slot = Slot.create(8 << 20) if has_slot else None
    mine = payloads(slot)
    written = table.write(mine, slot, CONTENTS, None)
    read = table.read(Slot.from_fd(_copy(written)), None if slot is None else Slot.from_fd(_copy(slot)))
    assert read.contents == CONTENTS
    assert read.staging_error is None
    assert any(isinstance(payload.content, FramedItem) for payload in read.payloads), "the framing travels"
    assert stored(read.payloads) == stored(mine)
    if slot is not None:
        assert written.size_bytes < 1 << 20, "tensors that lie in the slot are not copied"


def again(slot: Slot, *, value: object, start: int = 0, first: bytes = b"") -> list[Payload]:
    """Tensors of one kind in a slot, whose bytes are their places in it, and a value."""
    found = []
    for number in range(3):
        at = start + number * 4096
        tensor = tensor_over(slot.memory[at:], torch.float32, (8,))
        tensor.fill_(at)
        slot.memory[at : at + len(first)] = first
        found.append(Payload(CHUNKS[number], tensor))
    return [*found, Payload(CHUNKS[3], encode_value("n", value))]


CHUNKS = [*(chunk(f"t{number}", torch.zeros(8)) for number in range(3)), chunk("n")]


def test_of_a_save_like_the_one_before_only_the_values_are_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    slot, writer, made = Slot.create(1 << 20), table.TableWriter(), list[int]()
    table.write(again(slot, value=1), slot, CONTENTS, None)  # the framing is proven by tensors that differ
    whole = table._written

    def counted(*given: Any) -> Any:
        made.append(1)
        return whole(*given)

    monkeypatch.setattr(table, "_written", counted)

    def check(payloads: list[Payload], contents: StateContents | None = CONTENTS, num_made: int = 0) -> None:
        made.clear()
        written = writer.write(payloads, slot, contents, None)
        assert len(made) == num_made
        assert bytes(written.memory) == bytes(table.write(payloads, slot, contents, None).memory)
        assert stored(table.read(written, slot).payloads) == stored(payloads)

    check(again(slot, value=1), num_made=1)
    check(again(slot, value=2))
    check(again(slot, value="longer" * 99), num_made=1)
    check(again(slot, value="others" * 99))
    check(again(slot, value="others" * 99, start=64), num_made=1)
    check(again(slot, value="others" * 99, start=64), None, num_made=1)
    check(again(slot, value="others" * 99, start=64), None)
    check(again(slot, value="others" * 99, start=64)[1:], None, num_made=1)
    check(again(slot, value="others" * 99, start=64), num_made=1)
    for _ in range(2):  # what torch stores in an odd way is looked at each time
        check(again(slot, value="others" * 99, start=64, first=DESCRIPTOR), num_made=1)
    check(again(slot, value="others" * 99, start=64), num_made=1)
    monkeypatch.setattr("storage.format.items.framing_now", lambda kind: None)  # torch was found to store otherwise
    check(again(slot, value="others" * 99, start=64), num_made=1)


def test_why_nothing_was_staged_travels_as_well() -> None:
    read = table.read(table.write([], None, None, "MemoryError: no room"), None)
    assert (read.payloads, read.contents, read.staging_error) == ([], None, "MemoryError: no room")


def test_a_damaged_table_is_refused() -> None:
    written = table.write(payloads(None), None, CONTENTS, None)
    written.memory[200] ^= 1
    with pytest.raises(Corrupt, match="damaged"):
        table.read(written, None)
    written.memory[:8] = b"\x7f" * 8
    with pytest.raises(Corrupt, match="longer than its slot"):
        table.read(written, None)


def test_a_table_that_reaches_out_of_its_slot_is_refused() -> None:
    slot = Slot.create(8 << 20)
    written = table.write(payloads(slot), slot, None, None)
    with pytest.raises(Corrupt, match="bytes that are not in its slot"):
        table.read(written, Slot.create(4096))
    with pytest.raises(Corrupt, match="bytes that are not in its slot"):
        table.read(written, None)


def test_what_is_not_sealed_is_no_slot() -> None:
    fd = os.memfd_create("x")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="no slot"):
        Slot.from_fd(fd)


def test_the_service_needs_no_torch() -> None:
    script = "import sys, storage.service.process\nprint('torch' in sys.modules, 'boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_field_of_the_contents_travels() -> None:
    assert {field.name for field in dataclasses.fields(StateContents)} == {
        field.name for field in dataclasses.fields(table.ContentsRow)
    }


def _copy(slot: Slot) -> int:
    return os.dup(slot.fd)
